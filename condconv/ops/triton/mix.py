"""Mixing the experts' kernels on a GPU, and its two transposes.

Mathematics, with one example's kernel as a row of P numbers:
    mix      kernel[n, p] = sum_e a[n, e] W[e, p]          accumulated in float32, rounded once to the workspace's dtype
    experts  dW[e, p]    += sum_n a[n, e] dkernel[n, p]    one program owns a block of p for all n: no atomics
    routing  da[n, e]     = sum_p dkernel[n, p] W[e, p]    partial sums per block of p, added up in a second step
Both transposes read the kernel gradients once, in one launch.

Letters: n examples of a tile, E experts (padded to 16 or more, at most 64), P weights of a tile.
Precision: accumulation in float32. With a workspace of a half type the matrix units multiply; float32 factors (routing
weights, master weights) are then split into two numbers of that type, so that they keep 16 bits in bfloat16, against
the 8 that the result is rounded to. With a float32 workspace all products are IEEE float32, whatever TF32 is allowed
elsewhere. Experts may lie in rows of a larger tensor: [E, rows, columns] with contiguous columns. Offsets over n and e
are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from condconv.ops.triton.launch import INTERPRETED, autotuned, dot, split, tile_configs

MIX_TILES = [(16, 256, 4, 1), (32, 128, 4, 1), (32, 256, 8, 1), (64, 128, 4, 1), (64, 256, 8, 1)]


@autotuned(tile_configs(("BLOCK_N", "BLOCK_P"), MIX_TILES, (16, 32)), key=["num_examples", "BLOCK_E", "CONTIGUOUS"])
@triton.jit
def _mix_kernel(
    routing_ptr,
    weight_ptr,
    kernel_ptr,
    num_examples,
    num_weights,
    num_experts,
    num_columns,
    weight_stride_e,
    weight_stride_row,
    CONTIGUOUS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks_p = tl.cdiv(num_weights, BLOCK_P)
    program = tl.program_id(0)
    n = ((program // blocks_p) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    p = (program % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    e = tl.arange(0, BLOCK_E)
    source = p if CONTIGUOUS else (p // num_columns) * weight_stride_row + p % num_columns
    routing = tl.load(
        routing_ptr + n * num_experts + e[None, :], mask=(n < num_examples) & (e[None, :] < num_experts), other=0.0
    )
    weight = tl.load(
        weight_ptr + e.to(tl.int64)[:, None] * weight_stride_e + source,
        mask=(e[:, None] < num_experts) & (p < num_weights),
        other=0.0,
    )
    weight = weight.to(tl.float32)
    mixed = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if kernel_ptr.dtype.element_ty == tl.float32:
        mixed = dot(routing, weight, mixed, "ieee")
    else:
        routing_high, routing_low = split(routing, kernel_ptr.dtype.element_ty)
        weight_high, weight_low = split(weight, kernel_ptr.dtype.element_ty)
        mixed = dot(routing_high, weight_high, mixed, "ieee")
        mixed = dot(routing_low, weight_high, mixed, "ieee")
        mixed = dot(routing_high, weight_low, mixed, "ieee")
    target = kernel_ptr + n * num_weights + p
    tl.store(target, mixed.to(kernel_ptr.dtype.element_ty), mask=(n < num_examples) & (p < num_weights))


@triton.jit
def _reduce_kernel(
    routing_ptr,
    weight_ptr,
    grad_kernel_ptr,
    grad_weight_ptr,
    partial_ptr,
    num_examples,
    num_weights,
    num_experts,
    weight_stride_e,
    grad_weight_stride_e,
    NEED_ROUTING: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    HALF: tl.constexpr = grad_kernel_ptr.dtype.element_ty != tl.float32
    program = tl.program_id(0)
    p = program * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    e = tl.arange(0, BLOCK_E)
    expert_mask = (e[:, None] < num_experts) & (p < num_weights)
    expert_rows = e.to(tl.int64)[:, None]
    if NEED_ROUTING:
        weight_rows = tl.load(weight_ptr + expert_rows * weight_stride_e + p, mask=expert_mask, other=0.0)
        weight_PE = tl.trans(weight_rows.to(tl.float32))
        if HALF:
            weight_high, weight_low = split(weight_PE, grad_kernel_ptr.dtype.element_ty)
        partial_ptr += program.to(tl.int64) * num_examples * num_experts
    grad_weight = tl.zeros((BLOCK_E, BLOCK_P), tl.float32)
    if ACCUMULATE:
        grad_weight += tl.load(grad_weight_ptr + expert_rows * grad_weight_stride_e + p, mask=expert_mask, other=0.0)
    for first in range(0, num_examples, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        grad_kernel = tl.load(
            grad_kernel_ptr + n[:, None] * num_weights + p,
            mask=(n[:, None] < num_examples) & (p < num_weights),
            other=0.0,
        )
        if NEED_WEIGHT:
            routing_EN = tl.load(
                routing_ptr + n[None, :] * num_experts + e[:, None],
                mask=(n[None, :] < num_examples) & (e[:, None] < num_experts),
                other=0.0,
            )
            if HALF:
                routing_high, routing_low = split(routing_EN, grad_kernel_ptr.dtype.element_ty)
                grad_weight = dot(routing_high, grad_kernel, grad_weight, "ieee")
                grad_weight = dot(routing_low, grad_kernel, grad_weight, "ieee")
            else:
                grad_weight = dot(routing_EN, grad_kernel, grad_weight, "ieee")
        if NEED_ROUTING:
            partial = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            if HALF:
                partial = dot(grad_kernel, weight_high, partial, "ieee")
                partial = dot(grad_kernel, weight_low, partial, "ieee")
            else:
                partial = dot(grad_kernel, weight_PE, partial, "ieee")
            tl.store(
                partial_ptr + n[:, None] * num_experts + e[None, :],
                partial,
                mask=(n[:, None] < num_examples) & (e[None, :] < num_experts),
            )
    if NEED_WEIGHT:
        target = grad_weight_ptr + expert_rows * grad_weight_stride_e + p
        tl.store(target, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=expert_mask)


def _block_e(num_experts: int) -> int:
    return max(16, int(triton.next_power_of_2(num_experts)))


def mix(routing_nE: Tensor, weight_Erc: Tensor, kernel_nP: Tensor) -> None:
    """Write the mixed kernels of n examples to `kernel_nP`.

    Args:
        routing_nE: float32, contiguous.
        weight_Erc: experts `[E, rows, columns]` of any float dtype; columns contiguous, P = rows * columns.
        kernel_nP: contiguous, in the dtype of the convolution's input.
    """
    num_examples, num_experts = routing_nE.shape
    num_weights, num_columns = kernel_nP.shape[1], weight_Erc.shape[2]
    contiguous = weight_Erc.shape[1] == 1 or weight_Erc.stride(1) == num_columns

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(num_examples, meta["BLOCK_N"]) * triton.cdiv(num_weights, meta["BLOCK_P"]),)

    _mix_kernel[grid](
        routing_nE,
        weight_Erc,
        kernel_nP,
        num_examples,
        num_weights,
        num_experts,
        num_columns,
        weight_Erc.stride(0),
        weight_Erc.stride(1),
        CONTIGUOUS=contiguous,
        BLOCK_E=_block_e(num_experts),
    )


def reduce(
    routing_nE: Tensor,
    weight_EP: Tensor,
    grad_kernel_nP: Tensor,
    grad_routing_nE: Tensor | None,
    grad_weight_EP: Tensor | None,
    accumulate: bool,
) -> None:
    """Reduce kernel gradients onto routing weights (added to) and experts (added to if `accumulate`, else written).

    Args:
        routing_nE: float32, contiguous.
        weight_EP: experts, rows contiguous, any float dtype.
        grad_kernel_nP: contiguous, float32 or a half type.
        grad_routing_nE: float32, or None when not needed.
        grad_weight_EP: rows contiguous, float32 if anything is ever added to it, or None when not needed.
        accumulate: whether `grad_weight_EP` holds the sum over earlier examples.
    """
    num_examples, num_experts = routing_nE.shape
    num_weights = grad_kernel_nP.shape[1]
    block_e = _block_e(num_experts)
    block_p = 32 if INTERPRETED.value else max(64, 2048 // block_e)
    programs = triton.cdiv(num_weights, block_p)
    unused = routing_nE
    partial_BnE = unused
    if grad_routing_nE is not None:
        partial_BnE = routing_nE.new_empty((programs, num_examples, num_experts))
    _reduce_kernel[(programs,)](
        routing_nE,
        weight_EP,
        grad_kernel_nP,
        unused if grad_weight_EP is None else grad_weight_EP,
        partial_BnE,
        num_examples,
        num_weights,
        num_experts,
        weight_EP.stride(0),
        0 if grad_weight_EP is None else grad_weight_EP.stride(0),
        NEED_ROUTING=grad_routing_nE is not None,
        NEED_WEIGHT=grad_weight_EP is not None,
        ACCUMULATE=accumulate and grad_weight_EP is not None,
        BLOCK_E=block_e,
        BLOCK_N=16 if INTERPRETED.value else 32,
        BLOCK_P=block_p,
        num_warps=4,
    )
    if grad_routing_nE is not None:
        grad_routing_nE += partial_BnE.sum(0)
