"""TensorFlow's "same" padding for static convolutions, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from condconv.functional import _resolve_padding


def pad_same_tf(
    x_NCHW: Tensor, kernel_RS: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Pad with zeros so that a convolution has `ceil(size / stride)` outputs; odd padding goes to bottom and right."""
    rows, columns = _resolve_padding("same_tf", (x_NCHW.shape[2], x_NCHW.shape[3]), kernel_RS, stride, dilation)
    return F.pad(x_NCHW, (*columns, *rows))


class Conv2dSameTF(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's padding: what a CondConv2d with padding="same_tf" becomes when it is collapsed."""

    def forward(self, x: Tensor) -> Tensor:
        kernel_RS, stride, dilation = ((pair[0], pair[1]) for pair in (self.kernel_size, self.stride, self.dilation))
        return super().forward(pad_same_tf(x, kernel_RS, stride, dilation))
