"""timm's CondConv, to be measured beside ours: its layer, and networks with it that have our weights.

timm folds the batch into the groups of one convolution. `efficientnet_cc_b0_8e` is its network; elsewhere its layer is
put in the place of ours in the converted network, so that blocks, routers and everything static are the same modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv import CondConv2d, CondLinear
from condconv.checkpoints import from_timm, to_timm

TIMM_NETWORKS = {("efficientnet_b0", 8): "efficientnet_cc_b0_8e"}
"""timm's own networks by our name and number of experts, with the padding and BatchNorm of ours: not the `tf_` twin,
which pads for TensorFlow's weights, and which neither our network nor its static twin does by default."""


class PeerMissing(RuntimeError):
    """timm, or its CondConv2d, is not there."""


def timm_condconv2d(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    bias: bool,
    experts: int,
) -> nn.Module:
    """Layer of timm; `forward(x, routing_weights)`, weight `[E, K * C/G * R * S]`.

    Raises:
        PeerMissing: there is no timm with such a layer.
    """
    try:
        from timm.layers import CondConv2d as TimmCondConv2d
    except ImportError as error:
        raise PeerMissing(f"not run: {error}") from error
    # Its rule for padding="same" takes numbers, not pairs.
    numbers = [pair[0] if pair[0] == pair[1] else pair for pair in (kernel, stride, dilation)]
    return TimmCondConv2d(  # type: ignore[no-any-return]
        in_channels,
        out_channels,
        kernel_size=numbers[0],
        stride=numbers[1],
        padding=padding,
        dilation=numbers[2],
        groups=groups,
        bias=bias,
        num_experts=experts,
    )


class TimmLayer(nn.Module):
    """timm's layer where one of ours was: routing weights from the block's hooks, else from the layer's own router.

    A linear layer becomes a pointwise convolution of 1x1 maps: timm has no other.
    """

    def __init__(self, ours: CondConv2d | CondLinear) -> None:
        super().__init__()
        experts, out_channels = ours.weight.shape[:2]
        if isinstance(ours, CondConv2d):
            if ours.padding_mode != "zeros":
                raise PeerMissing(f"not run: timm's layer has no padding_mode={ours.padding_mode!r}")
            padding = "same" if isinstance(ours.padding, str) else ours.padding
            geometry = (ours.kernel_size, ours.stride, padding, ours.dilation, ours.groups)
            in_channels = ours.in_channels
        else:
            geometry = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
            in_channels = ours.in_features
        self.conv = timm_condconv2d(in_channels, out_channels, *geometry, ours.bias is not None, experts)
        with torch.no_grad():
            self.conv.weight.copy_(ours.weight.flatten(1))
            if ours.bias is not None:
                self.conv.bias.copy_(ours.bias)
        self.router = ours.router
        self.routing: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        routing = self.routing if self.routing is not None else self.router(x)
        # timm multiplies routing weights and experts in one dtype.
        routing = routing if torch.is_autocast_enabled(x.device.type) else routing.to(self.conv.weight.dtype)
        return self.conv(x, routing) if x.dim() == 4 else self.conv(x[:, :, None, None], routing).flatten(1)


@dataclass(frozen=True)
class Peer:
    """A network of timm's layers, and how its tensors are named and shaped in ours."""

    network: nn.Module
    title: str
    to_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    from_ours: Callable[[nn.Module], dict[str, Tensor]]

    def take_weights(self, ours: nn.Module) -> None:
        """Copy all parameters and buffers of our network."""
        self.network.load_state_dict(self.from_ours(ours))


def timm_peer(backbone: str, ours: nn.Module, experts: int) -> Peer:
    """Network of timm where there is one, else ours with timm's layers; the weights are those of `ours`.

    Raises:
        PeerMissing: timm has no such layer.
    """
    own = TIMM_NETWORKS.get((backbone, experts))
    peer = _layers_in_our_network(ours) if own is None else _own_network(own, ours)
    peer.take_weights(ours)
    return peer


def _own_network(name: str, ours: nn.Module) -> Peer:
    import timm

    if not timm.is_model(name):
        raise PeerMissing(f"not run: timm has no {name}")
    return Peer(timm.create_model(name), f"timm {name}", lambda tensors: from_timm(tensors, ours), to_timm)


def _layers_in_our_network(ours: nn.Module) -> Peer:
    network = copy.deepcopy(ours)
    shapes: dict[str, torch.Size] = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, CondConv2d | CondLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, TimmLayer(module))
            shapes[name] = module.weight.shape
    moved = {f"{layer}.{part}": f"{layer}.conv.{part}" for layer in shapes for part in ("weight", "bias")}
    back = {theirs: name for name, theirs in moved.items()}

    def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {back.get(name, name): tensor for name, tensor in tensors.items()}
        return {
            name: tensor.view(shapes[name.removesuffix(".weight")])
            if name in moved and tensor.dim() == 2 and name.endswith(".weight")
            else tensor
            for name, tensor in named.items()
        }

    def from_ours(network: nn.Module) -> dict[str, Tensor]:
        return {
            moved.get(name, name): tensor.flatten(1) if name in moved else tensor
            for name, tensor in network.state_dict().items()
        }

    return Peer(network, "timm's layer in our network", to_ours, from_ours)
