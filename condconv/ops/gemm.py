"""Per-example convolution as batched matrix products.

With D = C R S: the patches of an example are a matrix `X` of L x D, its kernels `W` of K x D, and `Y = X W^T`.
Backward: `dX = dY W`, `dW = dY^T X`. For pointwise kernels X is a view of the input, in both memory formats, and
nothing is copied. Other kernels are unfolded once for all tiles of output channels, and `dX` is folded once at the end.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv, store
from condconv.ops.spec import ConvSpec, Problem, is_channels_last
from condconv.ops.workspace import workspace


def supports(problem: Problem) -> str | None:
    """Everything but depthwise layers, whose matrices have a single row."""
    if problem.is_depthwise and problem.in_channels > 1:
        return "a depthwise layer has no matrix product to batch: use backend='depthwise'"
    return None


class Gemm(PerExampleConv):
    """Matrices in the orientation that the memory format gives for free: rows of positions, or columns of positions."""

    def __init__(self, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> None:
        super().__init__(x_NCHW, kernel_RS, spec)
        self.rows = is_channels_last(x_NCHW) and spec.groups == 1
        self.pointwise = spec.groups == 1 and spec.is_pointwise(kernel_RS)
        self.grad_patches_BLD: Tensor | None = None

    @classmethod
    def bytes_per_example(cls, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> int:
        """Of the unfolded patches; those of a pointwise layer are a view."""
        if spec.groups == 1 and spec.is_pointwise(kernel_RS):
            return 0
        height, width = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), kernel_RS)
        return height * width * x_NCHW.shape[1] * kernel_RS[0] * kernel_RS[1] * x_NCHW.element_size()

    @cached_property
    def patches_BLD(self) -> Tensor:
        """`[N * G, L, C/G * R * S]`, strided as it comes; an input gradient alone does without."""
        if self.pointwise:
            return self._matrix(_subsample(self.x_NCHW, self.spec))
        spec = self.spec
        columns: Tensor = F.unfold(self.x_NCHW, self.kernel_RS, spec.dilation, spec.padding, spec.stride)
        batch, depth, positions = columns.shape
        return columns.view(batch * spec.groups, depth // spec.groups, positions).transpose(1, 2)

    def _matrix(self, tensor_NCHW: Tensor) -> Tensor:
        """`[N * G, L, C / G]`, a view of a tensor or of a tile of its channels."""
        if self.rows:
            return tensor_NCHW.permute(0, 2, 3, 1).flatten(1, 2)
        batch, channels, height, width = tensor_NCHW.shape
        groups = self.spec.groups
        return tensor_NCHW.reshape(batch * groups, channels // groups, height * width).transpose(1, 2)

    def _kernels(self, kernel_NKCRS: Tensor) -> Tensor:
        """`[N * G, K / G, C/G * R * S]`."""
        batch, out_channels = kernel_NKCRS.shape[:2]
        return kernel_NKCRS.reshape(batch * self.spec.groups, out_channels // self.spec.groups, -1)

    def forward(self, kernel_NKCRS: Tensor, y_NKPQ: Tensor) -> None:
        """One product, written in place."""
        self._product(self.patches_BLD, self._kernels(kernel_NKCRS).transpose(1, 2), y_NKPQ, first=True)

    def input_gradient(self, grad_y_NKPQ: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, first: bool) -> None:
        """One product; of patches when the kernel is no point, and those are folded at the end."""
        grad_BLK, kernels = self._matrix(grad_y_NKPQ), self._kernels(kernel_NKCRS)
        if self.pointwise and self.spec.stride == (1, 1):
            self._product(grad_BLK, kernels, grad_x_NCHW, first)
        elif self.grad_patches_BLD is None:
            self.grad_patches_BLD = torch.bmm(kernels.transpose(1, 2), grad_BLK.transpose(1, 2)).transpose(1, 2)
        else:
            self.grad_patches_BLD.transpose(1, 2).baddbmm_(kernels.transpose(1, 2), grad_BLK.transpose(1, 2))

    def finish_input_gradient(self, grad_x_NCHW: Tensor) -> None:
        """Fold the gradients of patches, or put those of a strided pointwise layer in their places."""
        if self.grad_patches_BLD is None:
            return
        spec, columns_BDL = self.spec, self.grad_patches_BLD.transpose(1, 2)
        batch, _, height, width = grad_x_NCHW.shape
        if self.pointwise:
            grad_x_NCHW.zero_()
            target = _subsample(grad_x_NCHW, spec)
            target.copy_(columns_BDL.view(target.shape))
        else:
            columns = columns_BDL.reshape(batch, -1, columns_BDL.shape[2])
            grad_x_NCHW.copy_(
                F.fold(columns, (height, width), self.kernel_RS, spec.dilation, spec.padding, spec.stride)
            )

    def kernel_gradient(self, grad_y_NKPQ: Tensor) -> Tensor:
        """One product, in the memory of the mixed kernels, which have done their work by now."""
        grad_BKL, patches_BLD = self._matrix(grad_y_NKPQ).transpose(1, 2), self.patches_BLD
        shape = (grad_BKL.shape[0], grad_BKL.shape[1], patches_BLD.shape[2])
        grad_BKD = workspace.get(math.prod(shape), grad_BKL, "mixed").view(shape)
        return torch.bmm(grad_BKL, patches_BLD, out=grad_BKD)

    def _product(self, left_BLM: Tensor, right_BMK: Tensor, target_NKPQ: Tensor, first: bool) -> None:
        """`target (+)= left right`. Positions go to rows or to columns as the memory format has them."""
        target_BLK = self._matrix(target_NKPQ)
        if target_BLK.data_ptr() != target_NKPQ.data_ptr():  # a tile of a grouped or otherwise strided output
            product_BLK = torch.bmm(left_BLM, right_BMK)
            store(target_NKPQ, product_BLK.transpose(1, 2).reshape(target_NKPQ.shape), first)
        elif self.rows and target_BLK.device.type == "cpu" and not target_BLK.is_contiguous():
            # Into a tile of the channels the library would write one example after another, each on all threads.
            shape = (left_BLM.shape[0], left_BLM.shape[1], right_BMK.shape[2])
            product_BLK = workspace.get(math.prod(shape), left_BLM, "product").view(shape)
            store(target_BLK, torch.bmm(left_BLM, right_BMK, out=product_BLK), first)
        elif self.rows:
            target_BLK.baddbmm_(left_BLM, right_BMK, beta=0 if first else 1)
        else:
            target_BKL, beta = target_BLK.transpose(1, 2), 0 if first else 1
            target_BKL.baddbmm_(right_BMK.transpose(1, 2), left_BLM.transpose(1, 2), beta=beta)


def _subsample(x_NCHW: Tensor, spec: ConvSpec) -> Tensor:
    return x_NCHW if spec.stride == (1, 1) else x_NCHW[:, :, :: spec.stride[0], :: spec.stride[1]]
