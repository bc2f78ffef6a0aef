"""Weights of other code bases and ours, and loading that is complete or does not happen.

timm's CondConv networks (`tf_efficientnet_cc_*`, which hold the authors' trained weights) differ from ours in two ways:

* expert kernels are flat, `[E, K * C/G * R * S]`, where ours are `[E, K, C/G, R, S]`; the order of values is the same;
* the router of a block is `<block>.routing_fn`, a linear layer; ours is `<block>.router.fc`.

Flat weights exist in this file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from condconv.compress import CompressedLayer
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import FCRouter, Router
from condconv.sharing import is_unit

State = Mapping[str, Tensor]

_TIMM_ROUTER = ".routing_fn."
_OUR_ROUTER = ".router.fc."
_LISTED = 8


def is_timm_condconv(state: State) -> bool:
    """Whether a state dict is of one of timm's CondConv networks."""
    return any(_TIMM_ROUTER in name for name in state)


def has_experts(state: State) -> bool:
    """Whether a state dict, in our layout or in timm's, holds CondConv layers; false for static networks."""
    return is_timm_condconv(state) or any(".router." in name or value.dim() == 5 for name, value in state.items())


def count_experts(state: State) -> int:
    """Experts of the CondConv layers of a state dict in timm's layout or ours; 0 for a static network."""
    for name, value in state.items():
        if name.endswith((f"{_TIMM_ROUTER}weight", f"{_OUR_ROUTER}weight")) or value.dim() == 5:
            return int(value.shape[0])
    return 0


def from_timm(state: State, network: nn.Module) -> dict[str, Tensor]:
    """A state dict of a timm CondConv network under our names and in the shapes of `network`.

    What does not fit `network` is handed on as it is, for `load_complete` to list.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace(_TIMM_ROUTER, _OUR_ROUTER)
        shape = shapes.get(name)
        flat = shape is not None and len(shape) == 5 and value.dim() == 2
        if flat and shape is not None and value.shape == (shape[0], shape[1:].numel()):
            value = value.view(shape)
        ours[name] = value
    return ours


def to_timm(network: nn.Module) -> dict[str, Tensor]:
    """The weights of `network` in the layout of timm's CondConv networks.

    Raises:
        ValueError: the network has layers or routers that timm's networks cannot have.
    """
    _check_timm_can(network)
    theirs: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        theirs[name.replace(_OUR_ROUTER, _TIMM_ROUTER)] = value.flatten(1) if value.dim() == 5 else value
    return theirs


def _check_timm_can(network: nn.Module) -> None:
    reasons = []
    for name, module in network.named_modules():
        if isinstance(module, CondLinear):
            reasons.append(f"{name} is a linear layer with experts (create the network with classifier=False)")
        elif isinstance(module, CompressedLayer):
            reasons.append(f"the experts of {name} are compressed")
        elif isinstance(module, Router) and type(module) is not FCRouter:
            reasons.append(f"{name} is a {type(module).__name__}, not the fully connected router (routing='fc')")
        elif isinstance(module, CondConv2d) and module.router is not None:
            reasons.append(f"{name} has a router of its own, not its block's")
        elif is_unit(module) and module.routing_unit.takes_previous:
            reasons.append(f"{name} uses the routing weights of the block before it (routing='fc' does not)")
    if not any(isinstance(module, CondConv2d) for module in network.modules()):
        reasons.append("there is no CondConv layer in it")
    if reasons:
        raise ValueError(f"This network has no counterpart in timm: {_some(reasons)}.")


def misfits(state: State, network: nn.Module) -> str:
    """What keeps a state dict from being the complete weights of `network`, in words; empty if nothing does."""
    own = network.state_dict()
    # Weights from before compression come without scales: loading computes them.
    compressed = [name for name, module in network.named_modules() if isinstance(module, CompressedLayer)]
    plain = [name for name in compressed if f"{name}.weight" in state and state[f"{name}.weight"].is_floating_point()]
    computed = {f"{name}.scale" for name in plain}
    missing = [name for name in own if name not in state and name not in computed]
    unknown = [name for name in state if name not in own]
    misshapen = [
        f"{name} {list(value.shape)}, in the network {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found if names)


def load_complete(network: nn.Module, state: State, source: str = "The state dict") -> None:
    """Load weights if every tensor of the network is there, nothing else is, and all shapes agree.

    Raises:
        ValueError: with the missing, unknown and misshapen tensors; the network is then unchanged.
    """
    problems = misfits(state, network)
    if problems:
        raise ValueError(f"{source} does not fit the network, so nothing was loaded. Tensors {problems}.")
    network.load_state_dict(dict(state))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
