"""A grouped convolution computed by a depthwise one with a channel multiplier, for hardware that prefers the latter.

With `C/G` input and `K/G` output channels in each of G groups, every input channel is convolved alone with the `K/G`
kernels that read it, which gives `[G, C/G, K/G]` maps; the sum over the input channels of a group (the middle axis;
summing the last one is the known mistake) are the K outputs. It trades `C/G` times the output memory for a path that
some hardware runs faster, and applies to ResNeXt. Per example like the rest: the batch is folded into the channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv
from condconv.ops.spec import ConvSpec, Problem, memory_format_of


def supports(problem: Problem) -> str | None:
    """Layers with more than one group."""
    return None if problem.spec.groups > 1 else "it computes grouped convolutions, and this layer has one group"


def _depthwise_kernels(kernel_NKCRS: Tensor, groups: int) -> Tensor:
    """`[N * C * K/G, 1, R, S]`, in the order example, group, input channel and output channel of the group."""
    batch, out_channels, *kernel_CRS = kernel_NKCRS.shape
    kernel_NGKCRS = kernel_NKCRS.reshape(batch, groups, out_channels // groups, *kernel_CRS)
    return kernel_NGKCRS.transpose(2, 3).flatten(0, 3).unsqueeze(1)


def _fold(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.reshape(1, -1, *x_NCHW.shape[2:])


def _expand_gradient(grad_y_NKPQ: Tensor, group_channels: int, groups: int) -> Tensor:
    """The gradient of a sum is the same for all its terms: `[1, N * C * K/G, P, Q]`."""
    batch, _, *output_PQ = grad_y_NKPQ.shape
    grad_NG1KPQ = grad_y_NKPQ.reshape(batch, groups, 1, -1, *output_PQ)
    return grad_NG1KPQ.expand(-1, -1, group_channels, -1, -1, -1).reshape(1, -1, *output_PQ)


def _forward(x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    batch, channels = x_NCHW.shape[:2]
    kernels = _depthwise_kernels(kernel_NKCRS, spec.groups)
    maps = F.conv2d(_fold(x_NCHW), kernels, None, spec.stride, spec.padding, spec.dilation, batch * channels)
    maps_NGCKPQ = maps.view(batch, spec.groups, channels // spec.groups, -1, *maps.shape[2:])
    return maps_NGCKPQ.sum(2).flatten(1, 2).contiguous(memory_format=memory_format_of(x_NCHW))


def _library_gradient(
    grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernels: Tensor, spec: ConvSpec, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x_NCHW.shape[:2]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        _expand_gradient(grad_y_NKPQ, channels // spec.groups, spec.groups),
        _fold(x_NCHW),
        kernels,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        [0, 0],
        batch * channels,
        mask,
    )


def _input_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    kernels = _depthwise_kernels(kernel_NKCRS, spec.groups)
    return _library_gradient(grad_y_NKPQ, x_NCHW, kernels, spec, [True, False, False])[0].reshape(x_NCHW.shape)


def _kernel_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_shape: torch.Size, spec: ConvSpec) -> Tensor:
    batch, out_channels, group_channels, *kernel_RS = kernel_shape
    kernels = x_NCHW.new_empty((batch * out_channels * group_channels, 1, *kernel_RS))
    grad = _library_gradient(grad_y_NKPQ, x_NCHW, kernels, spec, [False, True, False])[1]
    grad_NGCKRS = grad.view(batch, spec.groups, group_channels, -1, *kernel_RS)
    return grad_NGCKRS.transpose(2, 3).reshape(kernel_shape)


CONV = PerExampleConv(_forward, _input_gradient, _kernel_gradient)
