"""Which layers of a network become CondConv layers, which of them share a router, and which cannot be converted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv.kinds import KINDS, layer_kind
from condconv.layers import CondConv2d, CondLinear
from condconv.patterns import matches, matches_end, nearest
from condconv.sharing import is_unit, pooled_input


@dataclass
class UnitPlan:
    """One unit of a network, before anything is changed: which layers, and the channels that its router will pool."""

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]  # by name relative to the unit; "" is the unit itself
    in_channels: int

    @property
    def is_layer(self) -> bool:
        return "" in self.layers

    @property
    def channels_last(self) -> bool:
        """Whether the unit is a lone linear layer, whose inputs are `[N, ..., C]`."""
        return isinstance(self.layers.get(""), nn.Linear)

    @property
    def router_name(self) -> str:
        """Where the unit's router goes, relative to it: not into a container, which would run it like any child."""
        if isinstance(self.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return f"{next(iter(self.layers))}.router"
        return "router"

    def full_name(self, layer: str) -> str:
        return f"{self.name}.{layer}" if layer else self.name


def plan_units(
    model: nn.Module, blocks: tuple[str, ...], layers: tuple[str, ...], exclude: tuple[str, ...], classifier: str | None
) -> list[UnitPlan]:
    """Find the units and their layers, and refuse what cannot be converted, before anything is changed."""
    names = dict(model.named_modules())
    names.pop("", None)
    if not blocks and classifier is None:
        raise ValueError("nothing to convert: give patterns of blocks, or the name of a classifier")
    _check_patterns(names, blocks, layers, exclude)
    chosen = [name for name in names if any(matches(name, pattern) for pattern in blocks)]
    for outer in chosen:
        inner = next((name for name in chosen if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(
                f"both {outer} and {inner} inside it match {', '.join(blocks)!r}: a layer can have only one router"
            )
    plans = []
    for name in chosen:
        found = _find_layers(name, names[name], layers, exclude)
        if found:
            plans.append(UnitPlan(name, names[name], found, _first_channels(names[name])))
    if blocks and not plans:
        kinds = sorted({str(layer_kind(m)) for name in chosen for m in names[name].modules() if layer_kind(m)})
        inside = f"{', '.join(kinds) or 'none'}{' (some excluded)' if exclude else ''}"
        raise ValueError(
            f"none of the {len(chosen)} modules that match {', '.join(blocks)!r} holds a layer that fits "
            f"{', '.join(layers)!r}; the kinds in them: {inside}"
        )
    if classifier is not None:
        plans.append(_plan_classifier(names, classifier, [plan.name for plan in plans]))
    _check_layers(model, plans)
    return plans


def _check_patterns(
    names: dict[str, nn.Module], blocks: tuple[str, ...], layers: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    for pattern in blocks:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"no module matches the block pattern {pattern!r}{nearest(pattern, names)}")
    for pattern in (*exclude, *(p for p in layers if p != "all" and p not in KINDS)):
        if not any(matches_end(name, pattern) for name in names):
            ends = {name.rpartition(".")[2] for name in names} | set(KINDS)
            raise ValueError(f"no module matches the layer pattern {pattern!r}{nearest(pattern, ends)}")


def _find_layers(
    unit_name: str, unit: nn.Module, layers: tuple[str, ...], exclude: tuple[str, ...]
) -> dict[str, nn.Module]:
    """The layers to convert, by name relative to the unit ("" for the unit itself)."""
    found: dict[str, nn.Module] = {}
    excluded: list[str] = []
    for name, module in unit.named_modules():
        full = f"{unit_name}.{name}" if name else unit_name
        if any(full.startswith(f"{outer}.") for outer in excluded):
            continue
        if any(matches_end(full, pattern) for pattern in exclude):
            excluded.append(full)
            continue
        if is_unit(module) or isinstance(module, CondConv2d | CondLinear):
            raise ValueError(f"{full} is a CondConv module already: a layer can be converted only once")
        if type(module).__name__ == "CondConv2d":
            raise ValueError(f"{full} is a conditional convolution of another library ({type(module).__module__})")
        kind = layer_kind(module)
        if kind is not None and any(
            wanted == "all" or (kind == wanted if wanted in KINDS else matches_end(full, wanted)) for wanted in layers
        ):
            found[name] = module
    return found


def _plan_classifier(names: dict[str, nn.Module], classifier: str, taken: list[str]) -> UnitPlan:
    if classifier not in names:
        raise ValueError(f"there is no module {classifier!r} to be the classifier{nearest(classifier, names)}")
    module = names[classifier]
    if is_unit(module) or isinstance(module, CondConv2d | CondLinear):
        raise ValueError(f"{classifier} is a CondConv module already: a layer can be converted only once")
    if layer_kind(module) is None:
        raise ValueError(f"the classifier {classifier} is a {type(module).__name__}, not a convolution or linear layer")
    if any(classifier == name or classifier.startswith(f"{name}.") for name in taken):
        raise ValueError(f"the classifier {classifier} is part of the blocks already: name it in one place")
    return UnitPlan(classifier, module, {"": module}, _first_channels(module))


def _first_channels(module: nn.Module) -> int:
    first = next(m for m in module.modules() if layer_kind(m))
    channels = first.in_features if isinstance(first, nn.Linear | CondLinear) else first.in_channels
    return int(channels)  # type: ignore[arg-type]  # attributes of modules are untyped


def _check_layers(model: nn.Module, plans: list[UnitPlan]) -> None:
    """Refuse layers whose behaviour a CondConv layer would not keep."""
    paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for plan in plans:
        if plan.router_name == "router" and not plan.is_layer and hasattr(plan.module, "router"):
            raise ValueError(f"{plan.name} already has an attribute 'router', the name under which its router would go")
        for name, layer in plan.layers.items():
            reason = _unsupported(layer)
            if reason is None and paths[layer] > 1:
                reason = "is used under several names, and would be replaced under one only"
            if reason is None and any(owners[p] > 1 for p in layer.parameters()):
                reason = "shares its parameters with another module, which experts cannot"
            if reason is not None:
                raise ValueError(
                    f"cannot convert {plan.full_name(name)} ({type(layer).__name__}): it {reason}. Exclude it, or use "
                    "a network with plain nn.Conv2d and nn.Linear layers"
                )


def _unsupported(layer: nn.Module) -> str | None:
    """Why a layer cannot be replaced, or None."""
    cls = type(layer)
    plain = cls in (nn.Conv2d, nn.Linear) or (cls.__module__, cls.__name__) == ("timm.layers.linear", "Linear")
    if not plain and not is_conv2d_same(layer):
        return "is a subclass that computes something else than nn.Conv2d or nn.Linear, e.g. standardised, quantised"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks):
        return "has hooks (weight normalisation, pruning, feature extraction), which would be lost"
    if any(getattr(layer, name).dtype.is_complex for name, _ in layer.named_parameters(recurse=False)):
        return "has complex weights"
    return None


def is_conv2d_same(layer: nn.Module) -> bool:
    """Whether this is timm's convolution with TensorFlow's padding; known by name, as timm is not imported here."""
    cls = type(layer)
    return cls.__name__ == "Conv2dSame" and cls.__module__.startswith("timm.") and isinstance(layer, nn.Conv2d)


def observe(model: nn.Module, plans: list[UnitPlan], example_input: Tensor) -> list[UnitPlan]:
    """Run the network once: units in the order of execution, with the channels of their true inputs."""
    seen: dict[str, int] = {}
    by_module = {plan.module: plan for plan in plans}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = by_module[module]
        x = pooled_input(plan.name, args, kwargs, plan.in_channels, plan.channels_last)
        seen.setdefault(plan.name, x.shape[1])

    training = {module: module.training for module in model.modules()}
    handles = [plan.module.register_forward_pre_hook(hook, with_kwargs=True) for plan in plans]
    model.eval()
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    missing = [plan.name for plan in plans if plan.name not in seen]
    if missing:
        raise ValueError(f"the forward pass with example_input does not call {', '.join(missing)}")
    order = {name: index for index, name in enumerate(seen)}
    for plan in plans:
        plan.in_channels = seen[plan.name]
    return sorted(plans, key=lambda plan: order[plan.name])
