"""A grouped convolution computed by a depthwise one with a channel multiplier, for hardware that prefers the latter.

With `C/G` input and `K/G` output channels in each of G groups, every input channel is convolved alone with the `K/G`
kernels that read it, which gives `[G, C/G, K/G]` maps; the sum over the input channels of a group (the middle axis;
summing the last one is the known mistake) are the K outputs. It trades `C/G` times the output memory for a path that
some hardware runs faster, and applies to ResNeXt. Per example like the rest: the batch is folded into the channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv, store
from condconv.ops.spec import Problem, convolution_gradient


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


class DepthwiseSum(PerExampleConv):
    """A depthwise convolution with a channel multiplier, and a sum."""

    def forward(self, kernel_NKCRS: Tensor, y_NKPQ: Tensor) -> None:
        """Every input channel with every kernel that reads it, then the sum over the input channels of a group."""
        batch, channels = self.x_NCHW.shape[:2]
        spec, kernels = self.spec, _depthwise_kernels(kernel_NKCRS, self.spec.groups)
        maps = F.conv2d(_fold(self.x_NCHW), kernels, None, spec.stride, spec.padding, spec.dilation, batch * channels)
        maps_NGCKPQ = maps.view(batch, spec.groups, channels // spec.groups, -1, *maps.shape[2:])
        y_NKPQ.copy_(maps_NGCKPQ.sum(2).flatten(1, 2))

    def input_gradient(self, grad_y_NKPQ: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, first: bool) -> None:
        """The library's input gradient of the depthwise convolution."""
        kernels = _depthwise_kernels(kernel_NKCRS, self.spec.groups)
        grad = self._library_gradient(grad_y_NKPQ, kernels, [True, False, False])[0]
        store(grad_x_NCHW, grad.view(grad_x_NCHW.shape), first)

    def kernel_gradient(self, grad_y_NKPQ: Tensor) -> Tensor:
        """The library's weight gradient of the depthwise convolution, in the order of the grouped kernels."""
        batch, out_channels = grad_y_NKPQ.shape[:2]
        group_channels = self.x_NCHW.shape[1] // self.spec.groups
        kernels = self.x_NCHW.new_empty((batch * out_channels * group_channels, 1, *self.kernel_RS))
        grad = self._library_gradient(grad_y_NKPQ, kernels, [False, True, False])[1]
        grad_NGCKRS = grad.view(batch, self.spec.groups, group_channels, -1, *self.kernel_RS)
        return grad_NGCKRS.transpose(2, 3)

    def _library_gradient(
        self, grad_y_NKPQ: Tensor, kernels: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels = self.x_NCHW.shape[:2]
        grad_y = _expand_gradient(grad_y_NKPQ, channels // self.spec.groups, self.spec.groups)
        spec = self.spec._replace(groups=batch * channels)
        return convolution_gradient(grad_y, _fold(self.x_NCHW), kernels, spec, mask)
