"""Back to a static network: every CondConv layer becomes one kernel, mixed by routing weights that ignore the input.

Let m be the mean of the routing weights a over some images. The kernel of an image differs from the collapsed one by
sum_e (a_e - m_e) W_e. Its mean square over the images follows from the covariance C of the routing weights and the Gram
matrix of the experts, G_ef = <W_e, W_f>: it is trace(C G). The root of that over the norm of sum_e m_e W_e is what
`collapse` reports as the cost of a layer: 0 is exact, 1 drops as much as it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv.compress import CompressedLayer
from condconv.float64 import to_float64
from condconv.layers import CondConv2d, CondLinear
from condconv.padding import Conv2dSameTF
from condconv.recording import record_layers
from condconv.sharing import RoutingUnit, detach, is_unit

CondLayer = CondConv2d | CondLinear


class RoutingMoments:
    """Mean `[E]` and covariance `[E, E]` of the routing weights that one layer got, in float64 on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.num_examples = 0
        self._sum = torch.zeros(num_experts, dtype=torch.float64)
        self._products = torch.zeros(num_experts, num_experts, dtype=torch.float64)

    def update(self, routing_NE: Tensor) -> None:
        """Take in the routing weights of a batch."""
        routing = routing_NE.detach().cpu().double()
        self.num_examples += len(routing)
        self._sum += routing.sum(0)
        self._products += routing.T @ routing

    @property
    def mean(self) -> Tensor:
        return self._sum / self.num_examples

    @property
    def covariance(self) -> Tensor:
        return self._products / self.num_examples - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class CollapsedLayer:
    """A layer that became static: its routing weights and its cost (None where the routing weights were given)."""

    name: str
    routing: tuple[float, ...]
    cost: float | None


@dataclass(frozen=True)
class Collapse:
    """What `collapse` did; `str()` is a table with a line per layer."""

    layers: tuple[CollapsedLayer, ...]

    @property
    def exact(self) -> bool:
        """Whether routing was the same for all images seen: the static network computes the same for them."""
        return all(layer.cost is not None and layer.cost < 1e-5 for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{len(self.layers)} CondConv layers became static. Relative change of their kernels, RMS over images:"
        ]
        for layer in self.layers:
            cost = "not measured" if layer.cost is None else f"{layer.cost:.3g}"
            lines.append(f"  {layer.name.ljust(width)}  {cost}")
        return "\n".join(lines)


@torch.no_grad()
def routing_moments(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, RoutingMoments]:
    """Mean and covariance of the routing weights of every CondConv layer, by its name.

    Args:
        model: a network with CondConv layers; it runs in eval mode, and its modes are put back.
        batches: inputs of the network.

    Raises:
        ValueError: there is no CondConv layer, or one that the batches did not reach.
    """
    layers = _cond_layers(model)
    moments = {name: RoutingMoments(layer.num_experts) for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with record_layers(model, lambda name, routing_NE: moments[name].update(routing_NE)):
            for batch in batches:
                model(batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
    missed = [name for name, moment in moments.items() if not moment.num_examples]
    if missed:
        raise ValueError(f"no routing weights were seen for {', '.join(missed)}: give a batch that reaches them")
    return moments


Routing = Tensor | RoutingMoments


@torch.no_grad()
def collapse(model: nn.Module, routing: Routing | Mapping[str, Routing]) -> Collapse:
    """Replace every CondConv layer of `model` by a static one, in place, and take the routers out.

    Args:
        model: a network with CondConv layers.
        routing: what to mix experts by: routing weights `[E]` for all layers, or for each layer by its name; or
            `routing_moments(model, batches)`, whose means are taken and whose covariances tell the cost.

    Returns:
        The layers with their routing weights and cost; `print` it.

    Raises:
        ValueError: no CondConv layer, a layer without routing weights or with weights of another number of experts, or
            one without a router, to which the network itself passes routing weights. The network is then unchanged.
    """
    layers = _cond_layers(model)
    chosen: dict[str, Routing] = {}
    for name, layer in layers.items():
        if layer.router is None and layer.block is None and not is_unit(layer):
            raise ValueError(
                f"{name} has no router, so the network itself calls it with routing weights, which a static layer does "
                "not take"
            )
        if isinstance(routing, Mapping):
            if name not in routing:
                raise ValueError(f"no routing weights are given for {name}")
            chosen[name] = routing[name]
        else:
            chosen[name] = routing
        shape = tuple(_mean(chosen[name]).shape)
        if shape != (layer.num_experts,):
            raise ValueError(f"{name} has {layer.num_experts} experts, its routing weights the shape {shape}")
    report = tuple(
        CollapsedLayer(name, tuple(_mean(weights).tolist()), _cost(layers[name], weights))
        for name, weights in chosen.items()
    )
    replacements = {name: _static(layers[name], _mean(weights)) for name, weights in chosen.items()}
    _remove_routers(model)
    static = {layers[name]: replacement for name, replacement in replacements.items()}
    for name, layer in list(model.named_modules(remove_duplicate=False)):  # a layer may have several names
        if layer in static:
            model.set_submodule(name, static[layer])
    return Collapse(report)


def _cond_layers(model: nn.Module) -> dict[str, CondLayer]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CondConv2d | CondLinear)}
    if not layers:
        raise ValueError("the network has no CondConv layer")
    if "" in layers:
        raise ValueError("a lone layer cannot be replaced in place: put it into an nn.Sequential")
    if any(isinstance(layer, CompressedLayer) for layer in layers.values()):
        raise ValueError("the experts of the network are compressed: collapse it before compress_experts")
    return layers


def _mean(routing: Routing) -> Tensor:
    return routing if isinstance(routing, Tensor) else routing.mean


def _mixed(experts: Tensor, routing_E: Tensor) -> Tensor:
    wide = to_float64(experts)
    mixed: Tensor = torch.tensordot(to_float64(routing_E).to(wide.device), wide, 1)
    return mixed.to(experts.dtype)


def _cost(layer: CondLayer, routing: Routing) -> float | None:
    if isinstance(routing, Tensor):
        return None
    experts = torch.cat([part.cpu().double().flatten(1) for part in _experts(layer).values()], dim=1)
    gram = experts @ experts.T
    kept = float(routing.mean @ gram @ routing.mean)
    dropped = max(0.0, float((routing.covariance * gram).sum()))
    return math.sqrt(dropped / kept) if kept > 0.0 else math.inf if dropped > 0.0 else 0.0


def _experts(layer: CondLayer) -> dict[str, Tensor]:
    """Kernels and biases `[E, ...]`, also those that a parametrization or pruning computes."""
    return {name: part for name in ("weight", "bias") if (part := getattr(layer, name)) is not None}


def _static(layer: CondLayer, routing_E: Tensor) -> nn.Module:
    """The static layer with the mixed kernel; dtype, device, mode and frozen parameters are kept."""
    options: dict[str, Any] = {
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    static: nn.Module
    if isinstance(layer, CondLinear):
        static = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    else:
        for attribute in ("kernel_size", "stride", "dilation", "groups", "padding_mode"):
            options[attribute] = getattr(layer, attribute)
        same = layer.padding == "same_tf"
        cls = Conv2dSameTF if same else nn.Conv2d
        options["padding"] = 0 if same else layer.padding
        static = nn.utils.skip_init(cls, layer.in_channels, layer.out_channels, **options)
    for name, experts in _experts(layer).items():
        parameter = getattr(static, name)
        parameter.copy_(_mixed(experts, routing_E))
        # By its own name or as `weight_orig`, `parametrizations.weight.original`.
        sources = [p for own, p in layer.named_parameters() if name in own and not own.startswith("router.")]
        parameter.requires_grad_(any(source.requires_grad for source in sources))
    return static.train(layer.training)


def _remove_routers(model: nn.Module) -> None:
    for module in [module for module in model.modules() if is_unit(module)]:
        unit = module.routing_unit
        assert isinstance(unit, RoutingUnit)
        detach(module)
        if unit.router is not None:
            owner, _, attribute = unit.router.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
