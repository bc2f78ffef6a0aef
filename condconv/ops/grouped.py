"""Per-example convolution as one grouped convolution: the batch is folded into the channels, N * G groups.

`x [n,C,H,W]` becomes `[1,n*C,H,W]`, the kernels `[n*K,C/G,R,S]`. Any geometry, whatever the library's grouped
convolution makes of it: fast on few large maps, slow on small ones (pytorch issues 43544, 70954). Depthwise layers
have a file of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import PerExampleConv
from condconv.ops.spec import ConvSpec, Problem, memory_format_of


def supports(problem: Problem) -> str | None:
    """Every convolution."""
    return None


def _fold(tensor_NCHW: Tensor) -> Tensor:
    return tensor_NCHW.reshape(1, -1, *tensor_NCHW.shape[2:])


def _forward(x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    batch = x_NCHW.shape[0]
    folded = F.conv2d(
        _fold(x_NCHW), kernel_NKCRS.flatten(0, 1), None, spec.stride, spec.padding, spec.dilation, batch * spec.groups
    )
    y_NKPQ = folded.reshape(batch, -1, *folded.shape[2:])
    return y_NKPQ.contiguous(memory_format=memory_format_of(x_NCHW))


def _gradient(
    grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_MCRS: Tensor, spec: ConvSpec, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    groups = x_NCHW.shape[0] * spec.groups
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
        groups,
        mask,
    )


def _input_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_NKCRS: Tensor, spec: ConvSpec) -> Tensor:
    folded = _gradient(grad_y_NKPQ, x_NCHW, kernel_NKCRS.flatten(0, 1), spec, [True, False, False])[0]
    return folded.reshape(x_NCHW.shape)


def _kernel_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_shape: torch.Size, spec: ConvSpec) -> Tensor:
    # The values of the kernel do not enter its own gradient: one element, expanded, gives the shape.
    shape = (kernel_shape[0] * kernel_shape[1], *kernel_shape[2:])
    kernel_MCRS = x_NCHW.new_empty(shape)
    return _gradient(grad_y_NKPQ, x_NCHW, kernel_MCRS, spec, [False, True, False])[1].reshape(kernel_shape)


CONV = PerExampleConv(_forward, _input_gradient, _kernel_gradient)
