"""The oracle: the paper's equation, one example at a time.

For example n: `y_n = (a_n1 W_1 + ... + a_nE W_E) * x_n + (a_n1 b_1 + ... + a_nE b_E)` (paper section 3, equation 1).
Plain torch, any dtype, no tricks: every other algorithm is tested against this one in float64. Slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.spec import ConvSpec, memory_format_of, mixing_dtype


def condconv2d(
    x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, bias_EK: Tensor | None, spec: ConvSpec
) -> Tensor:
    """Convolve every example with its own mixture of the experts' kernels.

    Kernels are mixed in float32 (float64 if an argument is float64) and rounded once to the dtype of `x_NCHW`.
    """
    dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
    outputs = []
    for x_CHW, routing_E in zip(x_NCHW, routing_NE.to(dtype), strict=True):
        kernel_KCRS = torch.einsum("e,ekcrs->kcrs", routing_E, weight_EKCRS.to(dtype)).to(x_NCHW.dtype)
        bias_K = None if bias_EK is None else (routing_E @ bias_EK.to(dtype)).to(x_NCHW.dtype)
        outputs.append(
            F.conv2d(x_CHW.unsqueeze(0), kernel_KCRS, bias_K, spec.stride, spec.padding, spec.dilation, spec.groups)
        )
    if not outputs:
        return _empty(x_NCHW, routing_NE, weight_EKCRS, bias_EK, spec)
    return torch.cat(outputs).contiguous(memory_format=memory_format_of(x_NCHW))


def _empty(x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, bias_EK: Tensor | None, spec: ConvSpec) -> Tensor:
    """No examples: an empty output that all arguments still get (zero) gradients from."""
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    shape = (0, weight_EKCRS.shape[1], *spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), kernel_RS))
    zero = x_NCHW.sum() + routing_NE.sum().to(x_NCHW.dtype) + 0 * weight_EKCRS.sum().to(x_NCHW.dtype)
    if bias_EK is not None:
        zero = zero + 0 * bias_EK.sum().to(x_NCHW.dtype)
    return zero.expand(shape).contiguous(memory_format=memory_format_of(x_NCHW))
