"""What one per-example convolution is: its geometry, its problem size, and the taps of its kernel that can matter.

Letters used in all of `condconv.ops`: N batch, C H W input, K P Q output, R S kernel, E experts, G groups, L = P * Q
output positions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ConvSpec(NamedTuple):
    """Geometry of a 2-D convolution with symmetric zero padding, all pairs in (height, width) order."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size_HW: tuple[int, int], kernel_RS: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output, as `torch.nn.Conv2d` defines them."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                size_HW, self.padding, self.dilation, kernel_RS, self.stride, strict=True
            )
        )
        return height, width

    def is_pointwise(self, kernel_RS: tuple[int, int]) -> bool:
        """Whether every output position reads exactly one input position and no padding."""
        return kernel_RS == (1, 1) and self.padding == (0, 0)


@dataclass(frozen=True)
class Problem:
    """Everything that `supports` and the choice of a backend may look at. Hashable, so that answers can be cached."""

    batch: int
    in_channels: int
    size_HW: tuple[int, int]
    out_channels: int
    kernel_RS: tuple[int, int]
    experts: int
    spec: ConvSpec
    dtype: torch.dtype
    weight_dtype: torch.dtype
    device: str
    channels_last: bool
    training: bool

    @classmethod
    def of(cls, x_NCHW: Tensor, weight_EKCRS: Tensor, spec: ConvSpec, training: bool) -> Problem:
        """Describe the convolution of `x_NCHW` by `weight_EKCRS`; `training`: gradients will be asked for."""
        batch, in_channels, height, width = x_NCHW.shape
        experts, out_channels, _, kernel_height, kernel_width = weight_EKCRS.shape
        size_HW, kernel_RS, dtypes = (height, width), (kernel_height, kernel_width), (x_NCHW.dtype, weight_EKCRS.dtype)
        facts = (*dtypes, x_NCHW.device.type, is_channels_last(x_NCHW), training)
        return _problem(batch, in_channels, size_HW, out_channels, kernel_RS, experts, spec, *facts)

    @property
    def output_PQ(self) -> tuple[int, int]:
        return self.spec.output_size(self.size_HW, self.kernel_RS)

    @property
    def positions(self) -> int:
        """Output positions per example, P * Q."""
        height, width = self.output_PQ
        return height * width

    @property
    def is_depthwise(self) -> bool:
        return self.spec.groups == self.in_channels == self.out_channels

    @property
    def kernel_size(self) -> int:
        """Number of weights of one expert's kernel, after dead taps are cropped."""
        taps_R, taps_S = live_taps(self.size_HW, self.kernel_RS, self.spec)
        taps = (taps_R.stop - taps_R.start) * (taps_S.stop - taps_S.start)
        return self.out_channels * (self.in_channels // self.spec.groups) * taps


@lru_cache(maxsize=4096)
def _problem(*facts: Any) -> Problem:
    """The same object for the same facts: at batch 1 it is a noticeable part of a layer to make and compare one."""
    return Problem(*facts)


class Taps(NamedTuple):
    """A contiguous range of kernel taps in one dimension, and the padding that goes with it."""

    start: int
    stop: int
    padding: int


@lru_cache(maxsize=4096)
def _live_taps_1d(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    live = [
        tap for tap in range(kernel) if any(0 <= p * stride - padding + tap * dilation < size for p in range(outputs))
    ]
    if not live:
        return Taps(0, kernel, padding)
    # The smallest range whose padding is symmetric again and gives the same output size: backends know symmetric
    # padding only.
    for extra in range(kernel):
        for before in range(extra + 1):
            start, stop = live[0] - before, live[-1] + 1 + extra - before
            new_padding = padding - start * dilation
            if start < 0 or stop > kernel or new_padding < 0:
                continue
            if (size + 2 * new_padding - dilation * (stop - start - 1) - 1) // stride + 1 == outputs:
                return Taps(start, stop, new_padding)
    return Taps(0, kernel, padding)


def live_taps(size_HW: tuple[int, int], kernel_RS: tuple[int, int], spec: ConvSpec) -> tuple[Taps, Taps]:
    """The kernel rows and columns that can reach the map at all; the others only ever meet padding.

    A 5x5 kernel with padding 2 has one live tap on a 1x1 map and nine on a 2x2 map. Cropping to them is exact.
    """
    rows, columns = (
        _live_taps_1d(size_HW[i], kernel_RS[i], spec.stride[i], spec.padding[i], spec.dilation[i]) for i in (0, 1)
    )
    return rows, columns


def crop_to_live_taps(
    weight_EKCRS: Tensor, size_HW: tuple[int, int], spec: ConvSpec
) -> tuple[Tensor, ConvSpec, tuple[slice, slice]]:
    """The kernels without dead taps, the padding that goes with them, and where the taps lie in the full kernel."""
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    rows, columns = live_taps(size_HW, kernel_RS, spec)
    where = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    if (rows.stop - rows.start, columns.stop - columns.start) == kernel_RS:
        return weight_EKCRS.contiguous(), spec, where
    live = weight_EKCRS[:, :, :, where[0], where[1]].contiguous()
    return live, spec._replace(padding=(rows.padding, columns.padding)), where


def convolution_gradient(
    grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_KCRS: Tensor, spec: ConvSpec, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's gradients of a convolution, of (input, kernel, bias) where the mask asks for them."""
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad_y_NKPQ,
        x_NCHW,
        kernel_KCRS,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        [0, 0],
        spec.groups,
        mask,
    )


def is_channels_last(x_NCHW: Tensor) -> bool:
    """Whether the tensor is laid out as NHWC, or cut out of one that is.

    That is where strides grow from channels over columns and rows to examples: torch's rule (`suggest_memory_format`),
    by which its convolutions choose the format of their output. It tells 1x1 maps and single channels apart as well.
    """
    stride_N, stride_C, stride_H, stride_W = x_NCHW.stride()
    if stride_C > stride_W:  # NCHW, at once
        return False
    _, channels, height, width = x_NCHW.shape
    rows = stride_H * height
    grow = stride_C * channels <= stride_W and stride_W * width <= stride_H and rows <= stride_N
    if not grow or stride_C in (0, rows):  # expanded, or examples of one number
        return False
    try:
        x_NCHW.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # inside torch.func.vmap there is no such format
        return False
    return True


def memory_format_of(x_NCHW: Tensor) -> torch.memory_format:
    """The memory format that the output of a convolution of `x_NCHW` has."""
    return torch.channels_last if is_channels_last(x_NCHW) else torch.contiguous_format


def mixing_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype kernels are mixed in: float64 when any tensor is float64, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# torch 2.8 cannot trace it. What torch.compiler.assume_constant_result does, which would load the compiler, seconds.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for this device; some have none, as the one of meta tensors."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for this device; nothing where it is off."""
    return torch.autocast(device.type, enabled=False) if under_autocast(device) else nullcontext()
