"""Conditionally parameterized convolution as functions: validate once, hand over to the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops import reference
from condconv.ops.operator import conv2d, convolve, is_unobserved, needs_plain_torch
from condconv.ops.registry import AUTO, REFERENCE, check_name
from condconv.ops.spec import ConvSpec, mixing_dtype, under_autocast, without_autocast

_debug = False


def set_debug(enabled: bool) -> None:
    """Check that routing weights are finite at every call. Costs a synchronisation with the GPU; off by default."""
    global _debug
    _debug = enabled


IntPair = int | tuple[int, int]
Padding = int | tuple[int, int] | Literal["same", "valid", "same_tf"]


def _pair(value: IntPair, name: str, minimum: int) -> tuple[int, int]:
    # Layers keep checked pairs, and with one example microseconds count.
    if type(value) is tuple and len(value) == 2 and all(type(v) is int and v >= minimum for v in value):
        return value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < minimum for v in pair):
        raise ValueError(f"{name} must be an integer >= {minimum} or a pair of them, got {value!r}.")
    return pair[0], pair[1]


def _resolve_padding(
    padding: Padding,
    size_HW: tuple[int, int],
    kernel_RS: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding (before, after) for height and for width."""
    if not isinstance(padding, str):
        height, width = _pair(padding, "padding", 0)
        return (height, height), (width, width)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same" and stride != (1, 1):
        raise ValueError(
            'padding="same" needs stride 1, as in torch; TensorFlow\'s rule for strides is padding="same_tf".'
        )
    if padding not in ("same", "same_tf"):
        raise ValueError(f'padding must be an integer, a pair, "same", "valid" or "same_tf", got {padding!r}.')

    def around(i: int) -> tuple[int, int]:
        outputs = -(-size_HW[i] // stride[i])
        total = max(0, (outputs - 1) * stride[i] + dilation[i] * (kernel_RS[i] - 1) + 1 - size_HW[i])
        return total // 2, total - total // 2

    return around(0), around(1)


def _check_tensors(x: Tensor, routing: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions {tuple(x.shape)}.")
    if weight.dim() != 5:
        raise ValueError(
            f"weight must be [E, K, C / groups, R, S], got {weight.dim()} dimensions {tuple(weight.shape)}."
        )
    experts, out_channels, group_channels = weight.shape[:3]
    if 0 in weight.shape:
        raise ValueError(f"weight [E, K, C / groups, R, S] is empty: {tuple(weight.shape)}.")
    if not isinstance(groups, int) or groups < 1 or out_channels % groups:
        raise ValueError(f"groups={groups} must be an integer >= 1 that divides the {out_channels} output channels.")
    if x.shape[1] != group_channels * groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, the weight expects {group_channels * groups} "
            f"({group_channels} in each of {groups} groups)."
        )
    if routing.dim() != 2 or routing.shape[1] != experts:
        raise ValueError(f"routing_weights must be [N, E] with E = {experts} experts, got {tuple(routing.shape)}.")
    if routing.shape[0] != x.shape[0]:
        raise ValueError(f"routing_weights has {routing.shape[0]} rows for {x.shape[0]} examples.")
    if bias is not None and bias.shape != (experts, out_channels):
        raise ValueError(f"bias must be [E, K] = ({experts}, {out_channels}), got {tuple(bias.shape)}.")
    for name, tensor in (("routing_weights", routing), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}.")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
    if _debug:
        _check_finite(routing)


def _check_finite(routing_weights: Tensor) -> None:
    examples = (~routing_weights.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if examples:
        raise ValueError(
            f"routing_weights of examples {examples[:10]} are not finite: the router or its input diverged."
        )


def _compute_input(x: Tensor, weight: Tensor) -> Tensor:
    """The input in the dtype to compute in: autocast's, else its own, which must then be the weight's."""
    if not x.is_floating_point():
        raise ValueError(
            f"x must be floating point, got {x.dtype}; convert images with x.float() / 255 or a normalisation."
        )
    autocast = under_autocast(x.device)
    if autocast and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype != weight.dtype:
        advice = "" if autocast else ", or use torch.autocast"
        raise ValueError(f"x is {x.dtype} but the weight is {weight.dtype}; convert one{advice}.")
    return x


def _geometry(
    x: Tensor, kernel_RS: tuple[int, int], stride: IntPair, padding: Padding, dilation: IntPair, groups: int
) -> tuple[Tensor, ConvSpec]:
    """The input, padded where its padding is not symmetric, and the geometry of the convolution that is left."""
    stride_HW, dilation_HW = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    size_HW = (x.shape[2], x.shape[3])
    rows, columns = _resolve_padding(padding, size_HW, kernel_RS, stride_HW, dilation_HW)
    if rows[0] != rows[1] or columns[0] != columns[1]:
        x = F.pad(x, (*columns, *rows))
        rows = columns = (0, 0)
    spec = ConvSpec(stride_HW, (rows[0], columns[0]), dilation_HW, groups)
    output_PQ = spec.output_size((x.shape[2], x.shape[3]), kernel_RS)
    if 0 in size_HW:
        raise ValueError(f"x {tuple(x.shape)} has maps without a single position.")
    if output_PQ[0] < 1 or output_PQ[1] < 1:
        raise ValueError(
            f"A {kernel_RS[0]}x{kernel_RS[1]} kernel (dilation {dilation_HW}, padding {padding!r}) does not fit "
            f"into a {size_HW[0]}x{size_HW[1]} map."
        )
    return x, spec


def condconv2d(
    x: Tensor,
    routing_weights: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    backend: str = "auto",
    workspace_bytes: int = 0,
) -> Tensor:
    """Convolve every example with its own mixture of expert kernels (paper section 3, equation 1).

    Args:
        x: Input `[N, C, H, W]`, contiguous or channels last; float64, float32, bfloat16 or float16. N may be 0.
        routing_weights: `[N, E]`, any real numbers. Mixing is done in float32, also under autocast and for half
            precision. On CUDA it is a product like any other (but in the Triton kernels): where TF32 is allowed
            (`torch.backends.cuda.matmul.fp32_precision = "tf32"`, before torch 2.9 `allow_tf32`; off by default), its
            factors are rounded to that.
        weight: Expert kernels `[E, K, C / groups, R, S]`.
        bias: Expert biases `[E, K]`, mixed like the kernels, or None.
        stride: As in `torch.nn.functional.conv2d`.
        padding: Zero padding: an integer, a (height, width) pair, "valid", "same" (stride 1), or "same_tf":
            TensorFlow's rule, whose output has `ceil(size / stride)` positions and whose odd padding goes to the
            bottom and the right.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`; C for a depthwise convolution.
        backend: One of `condconv.list_backends()`. "auto" decides by shape, see `condconv.explain`, and is "reference"
            inside `torch.func` derivatives (compiled or not) and forward-mode differentiation, which the other
            algorithms do not have.
        workspace_bytes: Memory for mixed kernels; 0 for an automatic value. Results do not depend on it but for
            rounding.

    Returns:
        `[N, K, P, Q]` in the dtype and memory format that `conv2d` would return.

    Raises:
        ValueError: For shapes, dtypes, devices or options that do not fit together, and for a backend that cannot run.
        RuntimeError: For a derivative that a backend asked for by name does not have.
    """
    check_name(backend)
    if not isinstance(workspace_bytes, int) or workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be an integer >= 0, 0 for an automatic value, got {workspace_bytes!r}.")
    _check_tensors(x, routing_weights, weight, bias, groups)
    x = _compute_input(x, weight)
    x, spec = _geometry(x, (weight.shape[3], weight.shape[4]), stride, padding, dilation, groups)
    if backend != REFERENCE and needs_plain_torch(x, routing_weights, weight):
        if backend != AUTO:
            raise RuntimeError(
                f"backend={backend!r} has gradients by backward() only. Derivatives of torch.func and forward-mode "
                "differentiation need backend='reference' (or 'auto', which takes it for them)."
            )
        backend = REFERENCE
    if backend == REFERENCE:
        with without_autocast(x.device):
            return reference.condconv2d(x, routing_weights, weight, bias, spec)
    training = torch.is_grad_enabled() and (x.requires_grad or routing_weights.requires_grad or weight.requires_grad)
    run: Callable[..., Tensor] = convolve if not training and is_unobserved(x, routing_weights, weight) else conv2d
    y = run(
        x, routing_weights, weight, spec.stride, spec.padding, spec.dilation, groups, backend, training, workspace_bytes
    )
    return y if bias is None else y + _mix_bias(routing_weights, bias, y.dtype)[:, :, None, None]


def _mix_bias(routing_weights: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    with without_autocast(routing_weights.device):
        mix = mixing_dtype(routing_weights, bias)
        return (routing_weights.to(mix) @ bias.to(mix)).to(dtype)


def check_positions(x: Tensor) -> None:
    """Refuse what is not `[N, ..., C]` with at least one position for each example."""
    if x.dim() < 2:
        raise ValueError(f"x must be [N, ..., C], got {x.dim()} dimensions {tuple(x.shape)}.")
    if 0 in x.shape[1:-1]:
        raise ValueError(f"x [N, ..., C] has no positions between examples and channels, got {tuple(x.shape)}.")


def channels_second(x: Tensor) -> Tensor:
    """The input `[N, ..., C]` of a linear layer as routers pool it: `[N, C, ...]`."""
    return x if x.dim() == 2 else x.movedim(-1, 1)


def cond_linear(
    x: Tensor,
    routing_weights: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int = 0,
) -> Tensor:
    """Apply to every example its own mixture of expert matrices.

    Args:
        x: `[N, C]`, or `[N, ..., C]` whose inner positions share the example's matrix.
        routing_weights: `[N, E]`.
        weight: Expert matrices `[E, K, C]`.
        bias: Expert biases `[E, K]` or None.
        backend: As in `condconv2d`; the layer is a pointwise convolution over the inner positions.
        workspace_bytes: As in `condconv2d`.

    Returns:
        `[N, ..., K]`.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    if weight.dim() != 3:
        raise ValueError(f"weight must be [E, K, C], got {weight.dim()} dimensions {tuple(weight.shape)}.")
    check_positions(x)
    x_NLC = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    x_NC1L = x_NLC.transpose(1, 2).unsqueeze(2)
    y_NK1L = condconv2d(x_NC1L, routing_weights, weight[..., None, None], bias, 1, 0, 1, 1, backend, workspace_bytes)
    return y_NK1L.squeeze(2).transpose(1, 2).reshape(*x.shape[:-1], weight.shape[1])
