"""A tile of examples, one after the other, each by the library's ordinary convolution with its own kernel.

For layers with groups whose examples are large and in channels last, on a CPU: there the library reads maps where they
are, while folding the batch into the channels copies them, in and out. Results are copied while they are in the cache.
Measured on one core, 16 examples: depthwise 672 x 14 x 14, 5x5: forward 3.1 ms against 11.0 folded, input gradient 9.3
against 16.3; 1024 channels in 32 groups, 14 x 14, 3x3 with stride 2, on a loaded machine: 46 against 104 and 51 against
185 ms.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import store
from condconv.ops.spec import ConvSpec, convolution_gradient, is_channels_last

SMALLEST_EXAMPLE = 1 << 15
"""Numbers in an example from which on the loop is faster than folding: 1152 x 7 x 7 is, 672 x 4 x 4 is not."""


def is_faster(x_NCHW: Tensor) -> bool:
    """Whether to go through examples one by one rather than to fold them."""
    return x_NCHW.device.type == "cpu" and is_channels_last(x_NCHW) and x_NCHW[0].numel() >= SMALLEST_EXAMPLE


def forward(x_NCHW: Tensor, kernel_NKCRS: Tensor, y_NKPQ: Tensor, spec: ConvSpec) -> None:
    """Write the output."""
    for x_1CHW, kernel_KCRS, y_KPQ in zip(x_NCHW.split(1), kernel_NKCRS, y_NKPQ, strict=True):
        y_KPQ.copy_(F.conv2d(x_1CHW, kernel_KCRS, None, *spec)[0])


def input_gradient(
    grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, spec: ConvSpec, first: bool
) -> None:
    """Write (`first`) or add the gradient of x; of x itself only the shape matters."""
    examples = zip(grad_y_NKPQ.split(1), x_NCHW.split(1), kernel_NKCRS, grad_x_NCHW, strict=True)
    for grad_1KPQ, x_1CHW, kernel_KCRS, target_CHW in examples:
        grad_1CHW = convolution_gradient(grad_1KPQ, x_1CHW, kernel_KCRS, spec, [True, False, False])[0]
        store(target_CHW, grad_1CHW[0], first)


def kernel_gradient(grad_y_NKPQ: Tensor, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> Tensor:
    """`[N, K, C/G, R, S]`."""
    batch, out_channels = grad_y_NKPQ.shape[:2]
    grad_NKCRS = x_NCHW.new_empty((batch, out_channels, x_NCHW.shape[1] // spec.groups, *kernel_RS))
    for grad_1KPQ, x_1CHW, target_KCRS in zip(grad_y_NKPQ.split(1), x_NCHW.split(1), grad_NKCRS, strict=True):
        target_KCRS.copy_(convolution_gradient(grad_1KPQ, x_1CHW, target_KCRS, spec, [False, True, False])[1])
    return grad_NKCRS
