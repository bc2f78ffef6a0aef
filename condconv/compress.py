"""Experts in fewer bytes, for inference: at batch 1 a CondConv network spends its extra time on reading them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from condconv.functional import (
    Padding,
    _check_tensors,
    _compute_input,
    _geometry,
    _mix_bias,
    channels_second,
    check_positions,
)
from condconv.layers import CondConv2d, CondLinear, _CondLayer
from condconv.ops.compressed import EXPERT_DTYPES, check_readable, compressed_conv2d, encode, pack, unpack
from condconv.ops.operator import needs_plain_torch


def compress_experts(model: nn.Module, expert_dtype: str = "int8") -> nn.Module:
    """Store the experts of all CondConv layers in bfloat16 or in 8 bits, in place, for inference.

    Activations, biases, routers and arithmetic stay as they are. The layers remain `CondConv2d` and `CondLinear`, with
    the hooks that bring their routing weights, but `weight` is no parameter any more. State dicts hold it as int8 or
    bfloat16, and for int8 `scale [E, K]` in float32; loading takes these or the weights of the network before it was
    compressed.

    Args:
        model: A network with CondConv layers, or one such layer; backends "auto" or those that mix kernels first.
        expert_dtype: "int8": a scale for each expert and output channel, its largest weight / 127, rounded to nearest,
            a quarter of the bytes of float32. "bf16": half of them.

    Returns:
        The model itself.

    Raises:
        ValueError: For another dtype, no CondConv layer, layers that are compressed already, that compute their
            experts or whose backend cannot read compressed ones, weights that are not finite. The model is then
            unchanged.
    """
    if expert_dtype not in EXPERT_DTYPES:
        near = difflib.get_close_matches(str(expert_dtype), EXPERT_DTYPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"expert_dtype must be one of {', '.join(EXPERT_DTYPES)}, got {expert_dtype!r}{hint}.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CondConv2d | CondLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no CondConv layer, so there are no experts to compress.")
    for name, layer in layers.items():
        _check_layer(name or type(layer).__name__, layer)
    for layer in layers.values():
        _compress(layer, expert_dtype)
    return model


def _check_layer(name: str, layer: _CondLayer) -> None:
    if isinstance(layer, CompressedLayer):
        raise ValueError(f"The experts of {name} are compressed already ({layer.expert_dtype}).")
    try:
        check_readable(layer.backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise ValueError(f"{name} computes its experts (a parametrization, pruning): make them permanent first.")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite, so they have no scale.")


def _compress(layer: CondConv2d | CondLinear, expert_dtype: str) -> None:
    """Exchange the class and not the module: its place in the network, hooks and references to it stay valid."""
    weight = layer.weight.detach()
    del layer.weight
    layer.__class__ = CompressedLinear if isinstance(layer, CondLinear) else CompressedConv2d
    assert isinstance(layer, CompressedLayer)
    layer.expert_dtype = expert_dtype
    layer.kernel_shape = tuple(weight.shape)
    # Not persistent: state dicts hold `weight` and `scale`.
    layer.register_buffer("experts", encode(weight, expert_dtype), persistent=False)


class CompressedLayer(_CondLayer):
    """What both layers share: stored experts `[E, K, bytes or values]` (`condconv.ops.compressed`), and state."""

    expert_dtype: str
    kernel_shape: tuple[int, ...]
    experts: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read-only here
        """The stored weights in their shape, int8 or bfloat16."""
        return unpack(self.experts)[0].view(self.kernel_shape)

    @property
    def scale(self) -> Tensor | None:
        """`[E, K]`, what an int8 weight of 1 stands for; None for bfloat16."""
        return unpack(self.experts)[1]

    def dequantized(self) -> Tensor:
        """The experts in float32, all of them."""
        return _dequantize(self.weight, self.scale)

    def reset_parameters(self) -> None:
        """Refused: there is nothing to train."""
        raise RuntimeError("Compressed experts are for inference: initialise the network before compress_experts.")

    def extra_repr(self) -> str:
        """As before, with the dtype of the experts."""
        return f"{super().extra_repr()}, expert_dtype={self.expert_dtype!r}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # Dtype conversions are for activations and biases, experts keep theirs.
        experts = self.experts
        super()._apply(fn, recurse)
        if self.experts.dtype != experts.dtype:
            self.experts = experts.to(self.experts.device)
        return self

    def _convolve(
        self,
        x: Tensor,
        routing: Tensor,
        stride: tuple[int, int],
        padding: Padding,
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        """As `condconv2d`, with its checks."""
        with_gradient = any(t is not None and t.requires_grad for t in (x, routing, self.bias))
        if (torch.is_grad_enabled() and with_gradient) or needs_plain_torch(x, routing):
            raise RuntimeError(
                "Compressed experts are for inference and have no gradients: call the network under torch.no_grad() "
                "or torch.inference_mode(), or train it before compress_experts."
            )
        shape_EKCRS = (*self.kernel_shape, 1, 1)[:5]
        dtype = x.dtype if x.is_floating_point() else torch.float32
        # The checks look at shape, dtype and device of a weight; this one takes no memory.
        stand_in = self.experts.new_empty(1, dtype=dtype).expand(shape_EKCRS)
        _check_tensors(x, routing, stand_in, self.bias, groups)
        x = _compute_input(x, stand_in)
        kernel_RS = (shape_EKCRS[3], shape_EKCRS[4])
        x, spec = _geometry(x, kernel_RS, stride, padding, dilation, groups)
        options = (spec.stride, spec.padding, spec.dilation, groups, self.backend, self.workspace_bytes)
        y: Tensor = compressed_conv2d(x, routing, self.experts, shape_EKCRS[2:], *options)
        return y if self.bias is None else y + _mix_bias(routing, self.bias, y.dtype)[:, :, None, None]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        if self.scale is not None:
            destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}scale")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif tuple(weight.shape) != self.kernel_shape:
            error_msgs.append(f"{prefix}weight is {tuple(weight.shape)}, the layer's is {self.kernel_shape}.")
        elif not weight.is_floating_point() and scale is None:
            missing_keys.append(f"{prefix}scale")
        else:
            self.experts.copy_(_stored(weight.detach(), scale, self.expert_dtype))
        rest = {key: value for key, value in state_dict.items() if key not in (f"{prefix}weight", f"{prefix}scale")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _dequantize(weight: Tensor, scale: Tensor | None) -> Tensor:
    weight = weight.float()
    return weight if scale is None else weight * scale[(..., *[None] * (weight.dim() - 2))]


def _stored(weight: Tensor, scale: Tensor | None, expert_dtype: str) -> Tensor:
    """Experts of a state dict as the layer stores them; int8 ones unchanged where it stores int8."""
    if scale is not None and expert_dtype == "int8":
        return pack(weight.flatten(2), scale)
    return encode(_dequantize(weight, scale), expert_dtype)


class CompressedConv2d(CompressedLayer, CondConv2d):
    """`CondConv2d` with compressed experts; made by `compress_experts`."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """As `CondConv2d`, without gradients."""
        routing = self._routing_weights(x, routing_weights)
        x, padding = self._pad(x)
        stride, dilation = self.stride, self.dilation
        return self._convolve(x, routing, stride, padding, dilation, self.groups)


class CompressedLinear(CompressedLayer, CondLinear):
    """`CondLinear` with compressed experts; made by `compress_experts`."""

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """As `CondLinear`, without gradients."""
        check_positions(x)
        routing = self._routing_weights(channels_second(x), routing_weights)
        x_NLC = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        y_NK1L = self._convolve(x_NLC.transpose(1, 2).unsqueeze(2), routing, (1, 1), 0, (1, 1), 1)
        return y_NK1L.squeeze(2).transpose(1, 2).reshape(*x.shape[:-1], self.out_features)
