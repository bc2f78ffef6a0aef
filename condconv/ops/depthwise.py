"""Per-example depthwise convolution: the batch folded into the channels of one depthwise convolution, or a loop.

A depthwise convolution does not mix channels, so N examples of C channels are one example of N*C channels. That holds
for the forward and for the input gradient. The kernel gradient is a depthwise convolution too, of x by dy: `dW[c,r,s]
= sum_pq dy[c,p,q] x[c, p*stride + r*dilation - padding, ...]`, that is, dy is the kernel, and stride and dilation
change places. On small maps this is faster than the library's own weight gradient, which for anything but 3x3 kernels
is not vectorised in channels last: 40 ms against 0.3 ms for 5x5 kernels on 8x8 maps, 3072 channels, one core.

Large examples in channels last are not folded, which would copy them: `loop`.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops import loop
from condconv.ops.chunked import PerExampleConv, store
from condconv.ops.spec import ConvSpec, Problem, convolution_gradient, is_channels_last

LARGEST_GRADIENT_KERNEL = 64 * 64
"""Maps of dy with more positions than this go to the library's weight gradient instead of serving as kernels: on a CPU
none that was tried, as the convolution by dy is 2 to 5 times faster for 5x5 and 7x7 kernels."""
LARGEST_GRADIENT_KERNEL_OF_GPUS = 16 * 16
"""A guess: not run on a GPU."""
SMALLEST_LIBRARY_MAP = 7
"""Maps of at least this height and width in channels last: for 3x3 kernels the library's weight gradient is faster."""


def supports(problem: Problem) -> str | None:
    """Depthwise layers with one output channel per input channel."""
    return None if problem.is_depthwise else "not a depthwise layer with as many output as input channels"


def _fold(tensor_NCHW: Tensor) -> Tensor:
    """`[1, N*C, H, W]` in the tensor's memory format: channels last copies runs of C numbers, contiguous is a view."""
    batch, channels, height, width = tensor_NCHW.shape
    if not is_channels_last(tensor_NCHW):
        return tensor_NCHW.reshape(1, batch * channels, height, width)
    return tensor_NCHW.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)


def _uninitialised_fold(tensor_NCHW: Tensor) -> Tensor:
    """For an argument of which the library reads the shape alone."""
    batch, channels, height, width = tensor_NCHW.shape
    memory_format = torch.channels_last if is_channels_last(tensor_NCHW) else torch.contiguous_format
    return torch.empty(
        (1, batch * channels, height, width),
        dtype=tensor_NCHW.dtype,
        device=tensor_NCHW.device,
        memory_format=memory_format,
    )


def _store_unfolded(target_NCHW: Tensor, folded: Tensor, channels_last: bool, first: bool) -> None:
    """The inverse of `_fold`, into `target_NCHW`."""
    if not channels_last:
        store(target_NCHW, folded.reshape(target_NCHW.shape), first)
        return
    batch, channels, height, width = target_NCHW.shape
    folded_HWNC = folded.permute(0, 2, 3, 1).reshape(height, width, batch, channels)
    store(target_NCHW.permute(2, 3, 0, 1), folded_HWNC, first)


class Depthwise(PerExampleConv):
    """Three depthwise convolutions; products where a kernel or dy is a single point."""

    most_bytes = 2 << 20
    """Folded examples of a tile: the library reads them while they are in the cache, and the memory is used again."""

    @classmethod
    def bytes_per_example(cls, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> int:
        """Of the folded copy, in channels last on a CPU; contiguous examples are folded without one."""
        copies = x_NCHW.device.type == "cpu" and is_channels_last(x_NCHW) and not loop.is_faster(x_NCHW)
        return x_NCHW[0].numel() * x_NCHW.element_size() if copies else 0

    def __init__(self, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> None:
        super().__init__(x_NCHW, kernel_RS, spec)
        self.channels_last = is_channels_last(x_NCHW)
        # What is left of any kernel on a 1x1 map only scales each channel. That must not reach the library: on one
        # thread it runs 1x1 kernels group by group.
        self.scales = kernel_RS == (1, 1) and spec.padding == (0, 0) and spec.stride == (1, 1)
        self.loops = loop.is_faster(x_NCHW)
        # Both gradients read it, and a depthwise layer has a single tile of channels, so it is the same one.
        self.grad_y_folded: Tensor | None = None

    @cached_property
    def x_folded(self) -> Tensor:
        """The examples as channels of one, in their memory format."""
        return _fold(self.x_NCHW)

    def forward(self, kernel_NKCRS: Tensor, y_NKPQ: Tensor) -> None:
        """Depthwise convolution of the folded batch, or of one example after another."""
        if self.scales:
            torch.mul(self.x_NCHW, kernel_NKCRS[:, :, 0], out=y_NKPQ)
            return
        if self.loops:
            loop.forward(self.x_NCHW, kernel_NKCRS, y_NKPQ, self.spec)
            return
        kernels, spec = kernel_NKCRS.flatten(0, 1), self.spec
        folded = F.conv2d(self.x_folded, kernels, None, spec.stride, spec.padding, spec.dilation, kernels.shape[0])
        _store_unfolded(y_NKPQ, folded, self.channels_last, first=True)

    def input_gradient(self, grad_y_NKPQ: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, first: bool) -> None:
        """The library's input gradient, of the folded batch or of one example after another."""
        if self.scales:
            store(grad_x_NCHW, grad_y_NKPQ * kernel_NKCRS[:, :, 0], first)
            return
        if self.loops:
            loop.input_gradient(grad_y_NKPQ, self.x_NCHW, kernel_NKCRS, grad_x_NCHW, self.spec, first)
            return
        like = _uninitialised_fold(self.x_NCHW)
        folded = self._library_gradient(grad_y_NKPQ, like, kernel_NKCRS.flatten(0, 1), [True, False, False])[0]
        _store_unfolded(grad_x_NCHW, folded, self.channels_last, first)

    def kernel_gradient(self, grad_y_NKPQ: Tensor) -> Tensor:
        """Depthwise convolution of x by dy, with stride and dilation exchanged."""
        batch, channels, height, width = grad_y_NKPQ.shape
        spec, (rows, columns) = self.spec, self.kernel_RS
        if self.scales:
            return (self.x_NCHW * grad_y_NKPQ).sum((2, 3))
        if height * width == 1:  # a 1x1 kernel again: dy scales the one window of x that it was computed from
            pad_H, pad_W = spec.padding
            window = F.pad(self.x_NCHW, (pad_W, pad_W, pad_H, pad_H))[:, :, :: spec.dilation[0], :: spec.dilation[1]]
            return window[:, :, :rows, :columns] * grad_y_NKPQ
        if self._library_is_faster(height * width):
            kernel_MCRS = self.x_NCHW.new_empty((batch * channels, 1, rows, columns))
            grad_MCRS = self._library_gradient(grad_y_NKPQ, self.x_folded, kernel_MCRS, [False, True, False])[1]
            return grad_MCRS.view(batch, -1)
        kernels = grad_y_NKPQ.reshape(batch * channels, 1, height, width)
        grad = F.conv2d(self.x_folded, kernels, None, spec.dilation, spec.padding, spec.stride, batch * channels)
        # With a stride the last rows of x may meet no output: the convolution then has taps to spare.
        return grad[:, :, :rows, :columns].reshape(batch, channels, rows, columns)

    def _library_is_faster(self, positions: int) -> bool:
        suits = self.channels_last and self.x_NCHW.device.type == "cpu" and self.kernel_RS == (3, 3)
        largest = LARGEST_GRADIENT_KERNEL if self.x_NCHW.device.type == "cpu" else LARGEST_GRADIENT_KERNEL_OF_GPUS
        return positions > largest or (suits and min(self.x_NCHW.shape[2:]) >= SMALLEST_LIBRARY_MAP)

    def _library_gradient(
        self, grad_y_NKPQ: Tensor, x_folded: Tensor, kernel_MCRS: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec._replace(groups=kernel_MCRS.shape[0])
        if self.grad_y_folded is None:
            self.grad_y_folded = _fold(grad_y_NKPQ)
        return convolution_gradient(self.grad_y_folded, x_folded, kernel_MCRS, spec, mask)
