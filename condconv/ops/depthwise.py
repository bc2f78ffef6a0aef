"""Per-example depthwise convolution: the batch folded into the channels of one depthwise convolution.

A depthwise convolution does not mix channels, so N examples of C channels are one example of N*C channels. That holds
for the forward and for the input gradient. The kernel gradient is a depthwise convolution too, of x by dy: `dW[c,r,s]
= sum_pq dy[c,p,q] x[c, p*stride + r*dilation - padding, ...]`, that is, dy is the kernel, and stride and dilation
change places. On small maps this is several times faster than the library's own weight gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv
from condconv.ops.spec import ConvSpec, Problem, is_channels_last

LARGEST_GRADIENT_KERNEL = 16 * 16
"""Maps of dy with more positions than this go to the library's weight gradient instead of serving as kernels."""


def supports(problem: Problem) -> str | None:
    """Depthwise layers with one output channel per input channel."""
    return None if problem.is_depthwise else "not a depthwise layer with as many output as input channels"


def _fold(tensor_NCHW: Tensor) -> Tensor:
    """`[1, N*C, H, W]` in the tensor's memory format: channels last copies runs of C numbers, contiguous is a view."""
    batch, channels, height, width = tensor_NCHW.shape
    if not is_channels_last(tensor_NCHW):
        return tensor_NCHW.reshape(1, batch * channels, height, width)
    return tensor_NCHW.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)


def _unfold(folded: Tensor, batch: int, channels_last: bool) -> Tensor:
    """The inverse of `_fold`."""
    _, _, height, width = folded.shape
    if not channels_last:
        return folded.reshape(batch, -1, height, width)
    y_HWNC = folded.permute(0, 2, 3, 1).reshape(height, width, batch, -1)
    return y_HWNC.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _is_scale(kernel_shape: torch.Size, spec: ConvSpec) -> bool:
    """Whether the convolution only scales each channel: what is left of any kernel on a 1x1 map.

    Apart for being cheaper, these must not reach the library: on one thread it runs 1x1 kernels group by group.
    """
    return kernel_shape[3:] == (1, 1) and spec.padding == (0, 0) and spec.stride == (1, 1)


def _forward(x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    if _is_scale(kernel_NKCRS.shape, spec):
        return x_NCHW * kernel_NKCRS[:, :, 0]
    kernel_MCRS = kernel_NKCRS.flatten(0, 1)
    folded = F.conv2d(_fold(x_NCHW), kernel_MCRS, None, spec.stride, spec.padding, spec.dilation, kernel_MCRS.shape[0])
    return _unfold(folded, x_NCHW.shape[0], is_channels_last(x_NCHW))


def _input_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    if _is_scale(kernel_NKCRS.shape, spec):
        return grad_y_NKPQ * kernel_NKCRS[:, :, 0]
    folded = _library_gradient(grad_y_NKPQ, x_NCHW, kernel_NKCRS.flatten(0, 1), spec, [True, False, False])[0]
    return _unfold(folded, x_NCHW.shape[0], is_channels_last(x_NCHW))


def _kernel_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_shape: torch.Size, spec: ConvSpec) -> Tensor:
    height, width = grad_y_NKPQ.shape[2:]
    if height * width > LARGEST_GRADIENT_KERNEL:
        shape = (kernel_shape[0] * kernel_shape[1], *kernel_shape[2:])
        kernel_MCRS = x_NCHW.new_empty(shape)
        return _library_gradient(grad_y_NKPQ, x_NCHW, kernel_MCRS, spec, [False, True, False])[1].view(kernel_shape)
    if height * width == 1:  # a 1x1 kernel: dy scales the one window of x that it was computed from
        rows, columns = (slice(None, None, step) for step in spec.dilation)
        window = F.pad(x_NCHW, (spec.padding[1], spec.padding[1], spec.padding[0], spec.padding[0]))[
            :, :, rows, columns
        ]
        return (window[:, :, : kernel_shape[3], : kernel_shape[4]] * grad_y_NKPQ).unsqueeze(2)
    if _is_scale(kernel_shape, spec):
        return (x_NCHW * grad_y_NKPQ).sum((2, 3)).view(kernel_shape)
    x_folded = x_NCHW.reshape(1, -1, *x_NCHW.shape[2:])
    grad_as_kernel = grad_y_NKPQ.reshape(-1, 1, height, width)
    channels = grad_as_kernel.shape[0]
    grad = F.conv2d(x_folded, grad_as_kernel, None, spec.dilation, spec.padding, spec.stride, channels)
    # With a stride the last rows of x may meet no output: the convolution then has taps to spare.
    return grad[:, :, : kernel_shape[3], : kernel_shape[4]].reshape(kernel_shape)


def _library_gradient(
    grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_MCRS: Tensor, spec: ConvSpec, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        _fold(grad_y_NKPQ),
        _fold(x_NCHW),
        kernel_MCRS,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        [0, 0],
        kernel_MCRS.shape[0],
        mask,
    )


CONV = PerExampleConv(_forward, _input_gradient, _kernel_gradient)
