"""Per-example convolution as batched matrix products.

Pointwise: with `x_n` as an `L x C` matrix (channels last) or `C x L` (contiguous), both without a copy, `y_n = x_n
W_n^T` or `W_n x_n`. Other kernels, dense or grouped: the patches are unfolded to `C R S x L` first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv
from condconv.ops.spec import ConvSpec, Problem, is_channels_last


def supports(problem: Problem) -> str | None:
    """Everything but depthwise layers, whose matrices have a single row."""
    if problem.is_depthwise and problem.in_channels > 1:
        return "a depthwise layer has no matrix product to batch: use backend='depthwise'"
    return None


def _is_plain(kernel_shape: torch.Size, spec: ConvSpec) -> bool:
    return spec.groups == 1 and spec.is_pointwise((kernel_shape[3], kernel_shape[4]))


def _subsample(x_NCHW: Tensor, spec: ConvSpec) -> Tensor:
    return x_NCHW if spec.stride == (1, 1) else x_NCHW[:, :, :: spec.stride[0], :: spec.stride[1]]


def _rows(tensor_NCHW: Tensor) -> Tensor:
    """`[N,L,C]`, a view when the tensor is channels last."""
    return tensor_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _unfold(x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> Tensor:
    """Patches `[N, G, C/G*R*S, L]`."""
    patches: Tensor = F.unfold(x_NCHW, kernel_RS, spec.dilation, spec.padding, spec.stride)
    return patches.view(patches.shape[0], spec.groups, -1, patches.shape[2])


def _matrices(kernel_NKCRS: Tensor, groups: int) -> Tensor:
    """Kernels `[N, G, K/G, C/G*R*S]`."""
    batch, out_channels = kernel_NKCRS.shape[:2]
    return kernel_NKCRS.reshape(batch, groups, out_channels // groups, -1)


def _forward(x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    batch, out_channels = kernel_NKCRS.shape[:2]
    output_PQ = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), (kernel_NKCRS.shape[3], kernel_NKCRS.shape[4]))
    channels_last = is_channels_last(x_NCHW)
    if _is_plain(kernel_NKCRS.shape, spec):
        x, kernel_NKC = _subsample(x_NCHW, spec), kernel_NKCRS.flatten(2)
        if channels_last:
            y_NLK = torch.bmm(_rows(x), kernel_NKC.transpose(1, 2))
            return y_NLK.view(batch, *output_PQ, out_channels).permute(0, 3, 1, 2)
        return torch.bmm(kernel_NKC, x.flatten(2)).view(batch, out_channels, *output_PQ)
    patches = _unfold(x_NCHW, (kernel_NKCRS.shape[3], kernel_NKCRS.shape[4]), spec)
    kernels = _matrices(kernel_NKCRS, spec.groups)
    if channels_last and spec.groups == 1:
        y_NLK = torch.bmm(patches[:, 0].transpose(1, 2), kernels[:, 0].transpose(1, 2))
        return y_NLK.view(batch, *output_PQ, out_channels).permute(0, 3, 1, 2)
    return torch.matmul(kernels, patches).view(batch, out_channels, *output_PQ)


def _input_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    if not _is_plain(kernel_NKCRS.shape, spec):
        grad_NGKL = grad_y_NKPQ.flatten(2).unflatten(1, (spec.groups, -1))
        patches = torch.matmul(_matrices(kernel_NKCRS, spec.groups).transpose(2, 3), grad_NGKL)
        kernel_RS = (kernel_NKCRS.shape[3], kernel_NKCRS.shape[4])
        return F.fold(patches.flatten(1, 2), x_NCHW.shape[2:], kernel_RS, spec.dilation, spec.padding, spec.stride)
    kernel_NKC = kernel_NKCRS.flatten(2)
    if is_channels_last(x_NCHW):
        product = torch.bmm(_rows(grad_y_NKPQ), kernel_NKC)
        grad = product.view(x_NCHW.shape[0], *grad_y_NKPQ.shape[2:], -1).permute(0, 3, 1, 2)
    else:
        grad = torch.bmm(kernel_NKC.transpose(1, 2), grad_y_NKPQ.flatten(2)).unflatten(2, grad_y_NKPQ.shape[2:])
    if spec.stride == (1, 1):
        return grad
    grad_x = torch.zeros_like(x_NCHW)
    _subsample(grad_x, spec).copy_(grad)
    return grad_x


def _kernel_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_shape: torch.Size, spec: ConvSpec) -> Tensor:
    if not _is_plain(kernel_shape, spec):
        patches = _unfold(x_NCHW, (kernel_shape[3], kernel_shape[4]), spec)
        grad_NGKL = grad_y_NKPQ.flatten(2).unflatten(1, (spec.groups, -1))
        return torch.matmul(grad_NGKL, patches.transpose(2, 3)).reshape(kernel_shape)
    x = _subsample(x_NCHW, spec)
    if is_channels_last(x_NCHW):
        return torch.bmm(_rows(grad_y_NKPQ).transpose(1, 2), _rows(x)).view(kernel_shape)
    return torch.bmm(grad_y_NKPQ.flatten(2), x.flatten(2).transpose(1, 2)).view(kernel_shape)


CONV = PerExampleConv(_forward, _input_gradient, _kernel_gradient)
