"""Per-example convolution as one grouped convolution: the batch is folded into the channels, N * G groups.

`x [n,C,H,W]` becomes `[1,n*C,H,W]`, the kernels `[n*K,C/G,R,S]`. Any geometry, whatever the library's grouped
convolution makes of it: fast on few large maps, slow on small ones (pytorch issues 43544, 70954). Depthwise layers
have a file of their own. Large examples of layers with groups, in channels last, are not folded: `loop`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv.ops import loop
from condconv.ops.chunked import PerExampleConv, store
from condconv.ops.spec import ConvSpec, Problem, convolution_gradient

SMALLEST_KERNEL_GRADIENT = 1 << 17
"""Numbers in an example from which on the loop's kernel gradient is faster too."""


def supports(problem: Problem) -> str | None:
    """Every convolution."""
    return None


def _fold(tensor_NCHW: Tensor) -> Tensor:
    return tensor_NCHW.reshape(1, -1, *tensor_NCHW.shape[2:])


class Grouped(PerExampleConv):
    """The library's grouped convolution and its gradients."""

    def __init__(self, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> None:
        super().__init__(x_NCHW, kernel_RS, spec)
        self.loops = spec.groups > 1 and loop.is_faster(x_NCHW)

    def forward(self, kernel_NKCRS: Tensor, y_NKPQ: Tensor) -> None:
        """One convolution of a single example with N times the channels."""
        if self.loops:
            loop.forward(self.x_NCHW, kernel_NKCRS, y_NKPQ, self.spec)
            return
        spec, groups = self.spec, self.x_NCHW.shape[0] * self.spec.groups
        kernels = kernel_NKCRS.flatten(0, 1)
        folded = F.conv2d(_fold(self.x_NCHW), kernels, None, spec.stride, spec.padding, spec.dilation, groups)
        y_NKPQ.copy_(folded.view(y_NKPQ.shape))

    def input_gradient(self, grad_y_NKPQ: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, first: bool) -> None:
        """The library's input gradient."""
        if self.loops:
            loop.input_gradient(grad_y_NKPQ, self.x_NCHW, kernel_NKCRS, grad_x_NCHW, self.spec, first)
            return
        grad = self._library_gradient(grad_y_NKPQ, kernel_NKCRS.flatten(0, 1), [True, False, False])[0]
        store(grad_x_NCHW, grad.view(grad_x_NCHW.shape), first)

    def kernel_gradient(self, grad_y_NKPQ: Tensor) -> Tensor:
        """The library's weight gradient, for which the values of the kernels do not matter."""
        if self.loops and self.x_NCHW[0].numel() >= SMALLEST_KERNEL_GRADIENT:
            return loop.kernel_gradient(grad_y_NKPQ, self.x_NCHW, self.kernel_RS, self.spec)
        channels = grad_y_NKPQ.shape[0] * grad_y_NKPQ.shape[1]
        group_channels = self.x_NCHW.shape[1] // self.spec.groups
        kernel_MCRS = self.x_NCHW.new_empty((channels, group_channels, *self.kernel_RS))
        return self._library_gradient(grad_y_NKPQ, kernel_MCRS, [False, True, False])[1].view(grad_y_NKPQ.shape[0], -1)

    def _library_gradient(
        self, grad_y_NKPQ: Tensor, kernel_MCRS: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec._replace(groups=self.x_NCHW.shape[0] * self.spec.groups)
        return convolution_gradient(_fold(grad_y_NKPQ), _fold(self.x_NCHW), kernel_MCRS, spec, mask)
