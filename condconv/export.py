"""The export form of a network: CondConv layers in plain torch with static weights, for runtimes that know no experts.

No convolution here has weights or a number of groups that depend on the batch, so batches (and, without TensorFlow's
padding, sizes) may be dynamic. Two forms, the two sides of y = sum_e a_e (W_e * x) = (sum_e a_e W_e) * x:

* "mixture": one static convolution computes the outputs of all experts, a batched product mixes them. Its weights are
  constants, so runtimes can lay them out in advance and quantise them; it costs E convolutions.
* "matmul": a matrix product mixes the kernels of each example, then pointwise and dense convolutions are batched matrix
  products over patches, depthwise ones a sum over the taps of the kernel. It costs one convolution.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.compress import CompressedLayer
from condconv.functional import channels_second
from condconv.layers import _PADDING_MODES, CondConv2d, CondLinear
from condconv.padding import pad_same_tf
from condconv.sharing import RoutingUnit, attach

FORMS = ("mixture", "matmul")


def export_form(model: nn.Module, form: str = "mixture") -> nn.Module:
    """A copy of `model` in eval mode whose CondConv layers are plain torch; everything else stays as it is.

    Args:
        model: any network, with or without CondConv layers.
        form: "mixture" or "matmul", see above.

    Raises:
        ValueError: an unknown form, or compressed experts.
    """
    if form not in FORMS:
        raise ValueError(f"unknown export form {form!r}: choose one of {', '.join(FORMS)}")
    if isinstance(model, CondConv2d | CondLinear):
        return _plain(copy.deepcopy(model), form).eval()
    copied = copy.deepcopy(model)
    plain: dict[nn.Module, nn.Module] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):  # a layer may have several names
        if isinstance(module, CondConv2d | CondLinear):
            if module not in plain:
                plain[module] = _plain(module, form)
            copied.set_submodule(name, plain[module])
    for layer, replacement in plain.items():
        unit = getattr(layer, "routing_unit", None)
        if isinstance(unit, RoutingUnit):  # a lone layer whose hooks bring its routing weights
            attach(replacement, unit)
    for module in copied.modules():
        unit = getattr(module, "routing_unit", None)
        if isinstance(unit, RoutingUnit):
            unit.chain[:] = [plain.get(each, each) for each in unit.chain]
    return copied.eval()


def _plain(layer: CondConv2d | CondLinear, form: str) -> nn.Module:
    if isinstance(layer, CompressedLayer):
        raise ValueError("the experts of the network are compressed: export it before compress_experts")
    return PlainLinear(layer, form) if isinstance(layer, CondLinear) else PlainConv2d(layer, form)


class _PlainLayer(nn.Module):
    """Experts as buffers; routing weights arrive as in the CondConv layer."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: CondConv2d | CondLinear, form: str) -> None:
        super().__init__()
        self.form = form
        self.num_experts = layer.num_experts
        self.router = layer.router
        self.routing: Tensor | None = None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def routing_weights(self, x: Tensor, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        if self.routing is not None:
            return self.routing
        assert self.router is not None, "a layer without a router gets its routing weights from its block"
        routing: Tensor = self.router(x)
        return routing


class PlainLinear(_PlainLayer):
    """`CondLinear` on inputs `[N, ..., C]`."""

    def __init__(self, layer: CondLinear, form: str) -> None:
        super().__init__(layer, form)
        self.shape = (layer.out_features, layer.in_features)
        self.register_buffer("weight", layer.weight.detach().clone().flatten(0, 1 if form == "mixture" else 0))

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """`[N, ..., K]`."""
        routing = self.routing_weights(channels_second(x), routing_weights).to(x.dtype)
        x_NLC = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        if self.form == "mixture":
            y_NLEK = F.linear(x_NLC, self.weight).unflatten(-1, (self.num_experts, self.shape[0]))
            y_NLK = torch.matmul(routing[:, None, None, :], y_NLEK).squeeze(2)
        else:
            mixed_NKC = (routing @ self.weight.flatten(1)).unflatten(1, self.shape)
            y_NLK = torch.matmul(x_NLC, mixed_NKC.transpose(1, 2))
        if self.bias is not None:
            y_NLK = y_NLK + (routing @ self.bias).unsqueeze(1)
        return y_NLK.squeeze(1) if x.dim() == 2 else y_NLK.unflatten(1, x.shape[1:-1])


class PlainConv2d(_PlainLayer):
    """`CondConv2d` on inputs `[N, C, H, W]`."""

    def __init__(self, layer: CondConv2d, form: str) -> None:
        super().__init__(layer, form)
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.groups, self.in_channels, self.out_channels = layer.groups, layer.in_channels, layer.out_channels
        self.same_tf = layer.padding == "same_tf"
        self.pad_mode = _PADDING_MODES[layer.padding_mode]
        self.amounts = [0] * 4 if layer.padding in ("valid", "same_tf") else layer._explicit_padding()
        weight_EKCRS = layer.weight.detach().clone()
        if form == "mixture":  # groups outermost, then experts: the layout of a grouped convolution's outputs
            by_group = weight_EKCRS.unflatten(1, (self.groups, -1)).transpose(0, 1)
            self.register_buffer("weight", by_group.flatten(0, 2).contiguous())
        else:
            self.register_buffer("weight", weight_EKCRS.flatten(1))

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """`[N, K, P, Q]`."""
        routing = self.routing_weights(x, routing_weights).to(x.dtype)
        if self.same_tf:
            x = pad_same_tf(x, self.kernel_size, self.stride, self.dilation)
        elif any(self.amounts):
            x = F.pad(x, self.amounts, mode=self.pad_mode)
        y = self._mix_outputs(x, routing) if self.form == "mixture" else self._mix_kernels(x, routing)
        return y if self.bias is None else y + (routing @ self.bias)[:, :, None, None]

    def _mix_outputs(self, x: Tensor, routing_NE: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, None, self.stride, 0, self.dilation, self.groups)
        size_PQ = y.shape[2:]
        y_NGEL = y.unflatten(1, (self.groups, self.num_experts, -1)).flatten(3)
        if self.groups == 1:
            y_NGL = torch.matmul(routing_NE[:, None, None, :], y_NGEL).squeeze(2)
        else:  # runtimes would make one tiny product for every group
            y_NGL = (y_NGEL * routing_NE[:, None, :, None]).sum(2)
        y_NKPQ: Tensor = y_NGL.unflatten(2, (self.out_channels // self.groups, *size_PQ)).flatten(1, 2)
        return y_NKPQ

    def _mix_kernels(self, x: Tensor, routing_NE: Tensor) -> Tensor:
        kernels = routing_NE @ self.weight  # [N, K * C/G * R * S]
        group_channels = self.in_channels // self.groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        if group_channels == 1:
            w_NKT = kernels.unflatten(1, (self.out_channels, taps))
            multiplier = self.out_channels // self.in_channels
            y: Tensor | None = None
            for tap, view in enumerate(self._taps(x)):
                view = view.repeat_interleave(multiplier, dim=1) if multiplier > 1 else view
                product = view * w_NKT[:, :, tap, None, None]
                y = product if y is None else y + product
            assert y is not None
            return y
        views = self._taps(x)
        size_PQ = views[0].shape[2:]
        patches = views[0].unsqueeze(2) if taps == 1 else torch.stack(views, dim=2)  # [N, C, T, P, Q]
        patches_NGIL = patches.unflatten(1, (self.groups, group_channels)).flatten(2, 3).flatten(3)
        w_NGKI = kernels.unflatten(1, (self.groups, self.out_channels // self.groups, group_channels * taps))
        y_NKPQ: Tensor = torch.matmul(w_NGKI, patches_NGIL).flatten(1, 2).unflatten(2, size_PQ)
        return y_NKPQ

    def _taps(self, x: Tensor) -> list[Tensor]:
        """For each tap of the kernel, the padded input at the positions that it meets: `[N, C, P, Q]` each."""
        spans = [
            (x.shape[2 + i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] * self.stride[i] + 1
            for i in (0, 1)
        ]
        views = []
        for r, s in itertools.product(range(self.kernel_size[0]), range(self.kernel_size[1])):
            top, left = r * self.dilation[0], s * self.dilation[1]
            rows = slice(top, top + spans[0], self.stride[0])
            views.append(x[:, :, rows, left : left + spans[1] : self.stride[1]])
        return views
