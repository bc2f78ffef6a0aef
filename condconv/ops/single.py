"""A batch of one example: mix its kernel, then an ordinary convolution by the library.

With one example there is nothing to batch: `y = (sum_e a_e W_e) * x` is a static convolution whose kernel has to be
made first. Making it reads E x P weights (E experts of P weights) once and is bound by memory: about 86 MB for
EfficientNet-B0 with 8 experts. On a CPU a matrix product with a single row reads them at full rate, but on one thread:
as a batch of products, each of a block of the weights, it does so on all. Experts of another dtype are converted and
added one after the other, in blocks of weights whose sum stays in the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.ops.chunked import restore_dead_taps
from condconv.ops.spec import (
    ConvSpec,
    Problem,
    convolution_gradient,
    crop_to_live_taps,
    is_channels_last,
    mixing_dtype,
)
from condconv.ops.workspace import workspace

BLOCK = 1 << 18
"""Weights of a block: 1 MB in float32, shared by the threads, inside the L2 of the cores."""
LARGEST_KEPT = 1 << 22
"""Weights of the largest kernel whose memory is kept for the next layer."""
SMALLEST_BLOCK = 1 << 14
"""Kernels of fewer weights are made by one product."""


def supports(problem: Problem) -> str | None:
    """A single example."""
    return None if problem.batch <= 1 else f"it convolves one example, and this batch has {problem.batch}"


def mix(routing_E: Tensor, weight_EM: Tensor) -> Tensor:
    """`sum_e a_e W_e`, `[M]`, in the dtype of the routing weights; on a CPU it holds until the next call."""
    if weight_EM.device.type != "cpu" or weight_EM.shape[1] < SMALLEST_BLOCK:
        return torch.mm(routing_E.unsqueeze(0), weight_EM.to(routing_E.dtype)).squeeze(0)
    mixed_M = _buffer(weight_EM.shape[1], routing_E)
    if weight_EM.dtype == routing_E.dtype:
        return _mix_in_products(routing_E, weight_EM, mixed_M)
    factors = routing_E.tolist()
    for start in range(0, mixed_M.shape[0], BLOCK):
        block = mixed_M[start : start + BLOCK]
        experts = weight_EM[:, start : start + BLOCK].to(mixed_M.dtype).unbind()
        torch.mul(experts[0], factors[0], out=block)
        for factor, expert in zip(factors[1:], experts[1:], strict=True):
            block.add_(expert, alpha=factor)
    return mixed_M


def _mix_in_products(routing_E: Tensor, weight_EM: Tensor, mixed_M: Tensor) -> Tensor:
    """The products of a batch are spread over threads: four for each, as far as blocks come out even."""
    experts, weights = weight_EM.shape
    blocks = math.gcd(weights, 4 * torch.get_num_threads())
    weight_BEM = weight_EM.view(experts, blocks, weights // blocks).transpose(0, 1)
    torch.bmm(routing_E.expand(blocks, 1, experts), weight_BEM, out=mixed_M.view(blocks, 1, -1))
    return mixed_M


def _buffer(numel: int, like: Tensor) -> Tensor:
    """Memory for a kernel. Touching fresh memory costs more than the work in it, so what is not huge is kept."""
    return workspace.get(numel, like, "single") if numel <= LARGEST_KEPT else like.new_empty(numel)


def forward(x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, spec: ConvSpec, workspace_bytes: int) -> Tensor:
    """Per-example convolution without bias; the workspace is the one kernel."""
    weight_EKCRS, spec, _ = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
    mixed_M = mix(routing_NE[0].to(dtype), weight_EKCRS.flatten(1))
    return convolve(x_NCHW, mixed_M.to(x_NCHW.dtype).view(weight_EKCRS.shape[1:]), spec)


def convolve(x_NCHW: Tensor, kernel_KCRS: Tensor, spec: ConvSpec) -> Tensor:
    """The ordinary convolution, in the memory format of its input; a pointwise one in channels last is a product."""
    channels_last = is_channels_last(x_NCHW)
    pointwise = spec.groups == 1 and spec.is_pointwise((kernel_KCRS.shape[2], kernel_KCRS.shape[3]))
    if pointwise and spec.stride == (1, 1) and channels_last:
        rows_LC = x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)
        y_LK = torch.mm(rows_LC, kernel_KCRS.flatten(1).t())
        return y_LK.view(1, *x_NCHW.shape[2:], -1).permute(0, 3, 1, 2)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return F.conv2d(x_NCHW, kernel_KCRS, None, *spec).contiguous(memory_format=memory_format)


def backward(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, routing weights and expert weights, each only where `needs` asks for it."""
    need_x, need_routing, need_weight = needs
    full_shape = weight_EKCRS.shape
    weight_EKCRS, spec, where = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    routing_E = routing_NE[0].to(mixing_dtype(x_NCHW, routing_NE, weight_EKCRS))
    weight_EM = weight_EKCRS.flatten(1)
    # Without an input gradient the values of the kernel do not matter, only its shape does.
    mixed_M = mix(routing_E, weight_EM) if need_x else routing_E.new_empty(weight_EM.shape[1])
    kernel_KCRS = mixed_M.to(x_NCHW.dtype).view(weight_EKCRS.shape[1:])
    mask = [need_x, need_routing or need_weight, False]
    grad_x, grad_kernel, _ = convolution_gradient(grad_y_NKPQ, x_NCHW, kernel_KCRS, spec, mask)
    grad_routing = grad_weight = None
    if mask[1]:
        grad_M = grad_kernel.flatten().to(routing_E.dtype)
        if need_routing:
            grad_routing = torch.mv(weight_EM.to(routing_E.dtype), grad_M).to(routing_NE.dtype).unsqueeze(0)
        if need_weight:
            grad_weight = torch.outer(routing_E, grad_M).to(weight_EKCRS.dtype).view(weight_EKCRS.shape)
            grad_weight = restore_dead_taps(grad_weight, full_shape, where)
    return grad_x if need_x else None, grad_routing, grad_weight
