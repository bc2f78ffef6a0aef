"""Turn the layers of any network into CondConv layers, in place, with one router per block.

Yang et al., *CondConv*, NeurIPS 2019: the router pools the input of the block, and its routing weights are used by all
CondConv layers of that block. A converted block has a submodule `router`; its convolutions keep their names and have
weights [E, K, C/G, R, S], so keys read `blocks.4.0.conv_pw.weight` and `blocks.4.0.router.fc.weight`. A block that is a
container (nn.Sequential would run it) keeps its router in its first CondConv layer: `features.3.0.router.fc.weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from condconv.initializers import CondLayer, LayerInit, initialize_experts, resolve_init
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import DEFAULT_GAIN, NETWORK_WIDE, Router, build_router, check_routing
from condconv.selection import UnitPlan, is_conv2d_same, observe, plan_units
from condconv.sharing import RoutingUnit, attach
from condconv.upcycle import Upcycle

Patterns = str | Sequence[str]

USES_PREVIOUS = (*NETWORK_WIDE, "hierarchical")
"""Routing functions in which a block needs the routing weights of the block before it."""


@dataclass(frozen=True)
class ConvertedUnit:
    """A block with one routing decision: its name, its converted layers and its router (full names), pooled channels.

    The router is None where the block uses the routing weights of the block before it.
    """

    name: str
    layers: tuple[str, ...]
    in_channels: int
    router: str | None


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; `str()` lists it."""

    num_experts: int
    routing: str
    units: tuple[ConvertedUnit, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of all CondConv layers."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def routers(self) -> tuple[str, ...]:
        """Full names of all routers."""
        return tuple(unit.router for unit in self.units if unit.router is not None)

    def __str__(self) -> str:
        counts = f"{len(self.layers)} CondConv layers of {self.num_experts} experts, {len(self.routers)} routers"
        lines = [f"{counts} ({self.routing})"]
        for unit in self.units:
            router = f"router on {unit.in_channels} channels" if unit.router else "shares the router before it"
            lines.append(
                f"  {unit.name}: {router}: {', '.join(name.removeprefix(unit.name + '.') for name in unit.layers)}"
            )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    num_experts: int,
    *,
    blocks: Patterns = (),
    layers: Patterns = "all",
    exclude: Patterns = (),
    classifier: str | None = None,
    routing: str = "fc",
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    temperature: float = 1.0,
    router_gain: float = DEFAULT_GAIN,
    backend: str = "auto",
    init: str | LayerInit = "independent",
    example_input: Tensor | None = None,
) -> Conversion:
    """Replace layers of `model` by CondConv layers of `num_experts` experts, in place.

    A converted network runs one forward pass at a time, since a block's layers find its routing weights in attributes.
    A second thread in the same block gets a RuntimeError: let threads take turns, or give each a `copy.deepcopy`.

    Args:
        model: any network made of nn.Conv2d and nn.Linear (timm's Conv2dSame is understood, other subclasses are not).
        num_experts: experts of every layer, at least 1.
        blocks: patterns of names of modules, see `condconv.patterns`. Each match gets one router, which pools the first
            input of the module's forward ([N, C, H, W] or [N, C]) and serves all converted layers in it. A match that
            is itself a convolution or linear layer gets a router pooled from its own input ([N, ..., C] for a linear
            layer).
        layers: which layers of the blocks: "all", kinds ("depthwise", "pointwise", "grouped", "dense", "linear"), or
            patterns of the end of their names ("conv_pw").
        exclude: patterns of the end of names; what they match stays static, with all below it ("se", "downsample").
        classifier: name of a convolution or linear layer to convert besides, with a router of its own.
        routing: one of `condconv.ROUTINGS`. "single": the first block's router serves all, the classifier included;
            "partially_shared": every other block has a router, which also serves the next; "hierarchical": a router
            also gets the routing weights of the block before it.
        dropout, expert_dropout, temperature: see `build_router`.
        router_gain: factor on the initial weights of routers, see `condconv.routing.FCRouter`; 1 is the authors'.
        backend: see `condconv2d`.
        init: "independent", or a function (layer, name) that initialises a static layer in place, see
            `condconv.initializers`. Either way the first expert is the static layer as it was. For trained networks
            "upcycle", "upcycle_neutral" or `Upcycle(noise=...)`: the output stays as it was, see `condconv.upcycle`.
        example_input: one input of the network; a forward pass with it (eval mode, no gradients) tells each block's
            input channels and the order of execution. Without it they follow from the order of registration: a block's
            input channels are those of its first convolution or linear layer.

    Returns:
        What was converted.

    Raises:
        ValueError: nothing matches, something cannot be converted or already is, or an argument is wrong. The network
            is then unchanged.
    """
    _check_arguments(num_experts, routing)
    init = resolve_init(init)
    plans = plan_units(model, _as_tuple(blocks), _as_tuple(layers), _as_tuple(exclude), classifier)
    if example_input is not None:
        plans = observe(model, plans, example_input)
    modules = [_build(plan, num_experts, backend, init) for plan in plans]
    options = {"dropout": dropout, "expert_dropout": expert_dropout, "temperature": temperature, "gain": router_gain}
    routers = [_build_router(index, plan, num_experts, routing, options) for index, plan in enumerate(plans)]
    if isinstance(init, Upcycle):
        init.settle((router, list(new.values())) for router, new in zip(routers, modules, strict=True))
    units = []
    chain: list[nn.Module] = []
    previous: RoutingUnit | None = None
    for plan, new_layers, router in zip(plans, modules, routers, strict=True):
        module = _install(model, plan, new_layers, router)
        place = plan.router_name if router is not None else None
        if routing in USES_PREVIOUS or not plan.is_layer:  # a lone layer with its own router needs no hooks
            takes_previous = previous is not None and (router is None or routing == "hierarchical")
            unit = RoutingUnit(plan.name, tuple(plan.layers), place, takes_previous, plan.channels_last)
            if routing in USES_PREVIOUS:
                unit.join(chain, module)
            attach(module, unit)
            previous = unit
        names = tuple(plan.full_name(name) for name in plan.layers)
        units.append(ConvertedUnit(plan.name, names, plan.in_channels, place and plan.full_name(place)))
    return Conversion(num_experts, routing, tuple(units))


def _as_tuple(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check_arguments(num_experts: int, routing: str) -> None:
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts must be an int of at least 1, got {num_experts!r}")
    check_routing(routing)


def _build(plan: UnitPlan, num_experts: int, backend: str, init: str | LayerInit) -> dict[str, CondLayer]:
    return {
        name: _replacement(static, plan.full_name(name), num_experts, backend, init)
        for name, static in plan.layers.items()
    }


def _replacement(static: nn.Module, name: str, num_experts: int, backend: str, init: str | LayerInit) -> CondLayer:
    """The CondConv layer of a static one: geometry, device, dtype, mode and frozen parameters are kept."""
    assert isinstance(static, nn.Conv2d | nn.Linear)
    options: dict[str, Any] = {
        "bias": static.bias is not None,
        "num_experts": num_experts,
        "router": None,
        "backend": backend,
        "device": static.weight.device,
        "dtype": static.weight.dtype,
    }
    # skip_init: every expert is written below, so the layer's own initialisation would be drawn in vain.
    if isinstance(static, nn.Linear):
        sizes = (static.in_features, static.out_features)
        layer: CondLayer = nn.utils.skip_init(CondLinear, *sizes, **options)
    else:
        sizes = (static.in_channels, static.out_channels)
        for attribute in ("kernel_size", "stride", "dilation", "groups", "padding_mode"):
            options[attribute] = getattr(static, attribute)
        options["padding"] = "same_tf" if is_conv2d_same(static) else static.padding
        layer = nn.utils.skip_init(CondConv2d, *sizes, **options)
    initialize_experts(layer, static, name, init)
    for parameter, value in static.named_parameters(recurse=False):
        getattr(layer, parameter).requires_grad_(value.requires_grad)
    return layer.train(static.training)


def _build_router(
    index: int,
    plan: UnitPlan,
    num_experts: int,
    routing: str,
    options: dict[str, float],
) -> Router | None:
    """The unit's router; None where the network-wide rule gives it the router of a unit before it."""
    if (routing == "single" and index) or (routing == "partially_shared" and index % 2):
        return None
    weight = next(p for layer in plan.layers.values() for p in layer.parameters())
    router = build_router(
        routing,
        plan.in_channels,
        num_experts,
        prev_experts=num_experts if routing == "hierarchical" and index else 0,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    return router.train(plan.module.training)


def _install(model: nn.Module, plan: UnitPlan, layers: dict[str, CondLayer], router: Router | None) -> nn.Module:
    """Put the new layers and the router in place; returns the module that is now the unit."""
    for name, layer in layers.items():
        model.set_submodule(plan.full_name(name), layer)
    module: nn.Module = layers[""] if plan.is_layer else plan.module
    if router is not None:  # not by set_submodule, which refuses a layer's own `router` while that is None
        owner, _, attribute = plan.router_name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, router)
    return module
