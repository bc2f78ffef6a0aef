"""Kernel gradient of the per-example 1x1 convolution, in Triton: to a workspace, or reduced where it is computed.

Mathematics: `dW_n[k, c] = sum_l dy[n, l, k] x[n, f(l), c]`, f as in `pointwise`. Two ways on from there:
    workspace   `kernel_gradient` writes dW_n for a tile of examples; `mix.reduce` then reads it once.
    fused       `expert_gradients`: one program owns a block (k, c) of the kernel for a range of examples, one after
                another, and reduces each block in registers: dW[e] += a[n, e] dW_n and da[n, e] = sum over blocks of
                <dW_n, W_e>. No traffic of size N x P at all; but E blocks are held in registers, so blocks are small
                and x and dy are read more often, and W_e is read once per example from the cache.

Letters as in `pointwise`. All accumulation in float32. No atomics: ranges and blocks each have their own partial sums,
which are added up in one order. Offsets across examples and experts are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv.ops.spec import ConvSpec, is_channels_last, memory_format_of
from condconv.ops.triton import tiles
from condconv.ops.triton.launch import (
    INTERPRETED,
    Steps,
    Strides,
    autotuned,
    dot,
    matmul_precision,
    spread,
    tile_configs,
)

GRADIENT_TILES = [
    (128, 128, 32, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 4, 3),
    (32, 64, 32, 4, 3),
    (64, 32, 32, 4, 3),
    (32, 32, 32, 4, 3),
]


@triton.jit
def _block_of_one(
    grad_y,
    x,
    row,
    column,
    num_positions,
    num_rows,
    num_columns,
    y_strides,
    x_strides,
    steps,
    STRIDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The `[k, c]` block of the kernel gradient of the example that `grad_y` and `x` point to."""
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, num_positions, BLOCK_L):
        position = first + tl.arange(0, BLOCK_L)
        far = spread(position, steps, STRIDED)
        a = tl.load(
            grad_y + position[None, :] * y_strides.l + row[:, None] * y_strides.c,
            mask=(position[None, :] < num_positions) & (row[:, None] < num_rows),
            other=0.0,
        )
        b = tl.load(
            x + far[:, None] * x_strides.l + column[None, :] * x_strides.c,
            mask=(position[:, None] < num_positions) & (column[None, :] < num_columns),
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    return acc


@autotuned(
    tile_configs(("BLOCK_K", "BLOCK_C", "BLOCK_L"), GRADIENT_TILES, (32, 32, 32)),
    key=["num_positions", "num_rows", "num_columns", "x_strides"],
    extents={"BLOCK_K": "num_rows", "BLOCK_C": "num_columns", "BLOCK_L": "num_positions"},
)
@triton.jit
def _kernel_gradient_kernel(
    grad_y_ptr,
    x_ptr,
    grad_kernel_ptr,
    num_positions,
    num_rows,
    num_columns,
    y_strides,
    x_strides,
    steps,
    STRIDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    blocks_c = tl.cdiv(num_columns, BLOCK_C)
    blocks = tl.cdiv(num_rows, BLOCK_K) * blocks_c
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = (block // blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = _block_of_one(
        grad_y_ptr + n * y_strides.n,
        x_ptr + n * x_strides.n,
        row,
        column,
        num_positions,
        num_rows,
        num_columns,
        y_strides,
        x_strides,
        steps,
        STRIDED,
        PRECISION,
        BLOCK_K,
        BLOCK_C,
        BLOCK_L,
    )
    target = grad_kernel_ptr + n * num_rows * num_columns + row[:, None] * num_columns + column[None, :]
    mask = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(target, acc.to(grad_kernel_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fused_kernel(
    grad_y_ptr,
    x_ptr,
    routing_ptr,
    weight_ptr,
    partial_weight_ptr,
    partial_routing_ptr,
    num_examples,
    examples_per_program,
    num_experts,
    num_positions,
    num_rows,
    num_columns,
    y_strides,
    x_strides,
    steps,
    NEED_ROUTING: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    STRIDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    blocks_c = tl.cdiv(num_columns, BLOCK_C)
    blocks = tl.cdiv(num_rows, BLOCK_K) * blocks_c
    part = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = (block // blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    first = part * examples_per_program
    last = tl.minimum(first + examples_per_program, num_examples)
    grad_y = grad_y_ptr + first.to(tl.int64) * y_strides.n
    x = x_ptr + first.to(tl.int64) * x_strides.n
    routing = routing_ptr + first.to(tl.int64) * num_experts + e
    partial_routing = partial_routing_ptr + (block.to(tl.int64) * num_examples + first) * num_experts + e
    num_weights = num_rows * num_columns
    in_block = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    expert_mask = (e < num_experts)[:, None, None] & in_block[None, :, :]
    offset = e.to(tl.int64)[:, None, None] * num_weights + (row[:, None] * num_columns + column[None, :])[None, :, :]
    grad_weight = tl.zeros((BLOCK_E, BLOCK_K, BLOCK_C), tl.float32)
    for _ in range(first, last):
        grad_kernel = _block_of_one(
            grad_y,
            x,
            row,
            column,
            num_positions,
            num_rows,
            num_columns,
            y_strides,
            x_strides,
            steps,
            STRIDED,
            PRECISION,
            BLOCK_K,
            BLOCK_C,
            BLOCK_L,
        )[None, :, :]
        if NEED_WEIGHT:
            routing_E = tl.load(routing, mask=e < num_experts, other=0.0)
            grad_weight += routing_E[:, None, None] * grad_kernel
        if NEED_ROUTING:
            weight = tl.load(weight_ptr + offset, mask=expert_mask, other=0.0).to(tl.float32)
            partial = tl.sum(tl.sum(weight * grad_kernel, 2), 1)
            tl.store(partial_routing, partial, mask=e < num_experts)
        grad_y += y_strides.n
        x += x_strides.n
        routing += num_experts
        partial_routing += num_experts
    if NEED_WEIGHT:
        target = partial_weight_ptr + part.to(tl.int64) * num_experts * num_weights + offset
        tl.store(target, grad_weight, mask=expert_mask)


def kernel_gradient(grad_y_nKPQ: Tensor, x_nCHW: Tensor, grad_kernel_nKTC: Tensor, call: tiles.Call) -> None:
    """Write the kernel gradients of a tile of examples and output channels."""
    num_examples, num_rows, _, num_columns = grad_kernel_nKTC.shape
    steps = Steps.of(x_nCHW, grad_y_nKPQ, call.spec)

    def grid(meta: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(num_rows, meta["BLOCK_K"]) * triton.cdiv(num_columns, meta["BLOCK_C"])
        return (num_examples * blocks,)

    _kernel_gradient_kernel[grid](
        grad_y_nKPQ,
        x_nCHW,
        grad_kernel_nKTC,
        grad_y_nKPQ[0, 0].numel(),
        num_rows,
        num_columns,
        call.y,
        call.x,
        steps,
        STRIDED=steps.strided,
        PRECISION=matmul_precision(x_nCHW.dtype),
    )


def _fused_blocks(num_experts: int) -> tuple[int, int, int, int]:
    """Blocks of experts, k, c and positions: E x k x c numbers stay in registers, 64 of each thread."""
    block_e = triton.next_power_of_2(num_experts)
    if INTERPRETED.value:
        return block_e, 16, 16, 32
    rows, columns = {1: (128, 128), 2: (64, 128), 4: (64, 64), 8: (64, 32), 16: (32, 32), 32: (16, 32), 64: (16, 16)}[
        block_e
    ]
    return block_e, rows, columns, 32


def expert_gradients(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    need_routing: bool,
    need_weight: bool,
    min_programs: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of routing and experts by the fused kernel.

    The batch is divided among programs only as far as needed for `min_programs` of them (0: twice the multiprocessors).
    """
    if not (need_routing or need_weight) or tiles.is_empty(
        x_NCHW, weight_EKCRS, (grad_y_NKPQ.shape[2], grad_y_NKPQ.shape[3])
    ):
        return (
            torch.zeros_like(routing_NE) if need_routing else None,
            torch.zeros_like(weight_EKCRS) if need_weight else None,
        )
    memory_format, channels_last = memory_format_of(x_NCHW), is_channels_last(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=memory_format)
    grad_y_NKPQ = grad_y_NKPQ.to(x_NCHW.dtype).contiguous(memory_format=memory_format)
    routing, weight = routing_NE.float().contiguous(), weight_EKCRS.contiguous()
    (num_examples, num_experts), (_, num_rows, num_columns) = routing.shape, weight.shape[:3]
    block_e, block_k, block_c, block_l = _fused_blocks(num_experts)
    blocks = triton.cdiv(num_rows, block_k) * triton.cdiv(num_columns, block_c)
    if min_programs == 0:
        on_gpu = x_NCHW.device.type == "cuda"
        min_programs = 2 * torch.cuda.get_device_properties(x_NCHW.device).multi_processor_count if on_gpu else 8
    examples_per_program = triton.cdiv(num_examples, min(num_examples, triton.cdiv(min_programs, blocks)))
    parts = triton.cdiv(num_examples, examples_per_program)
    partial_weight = routing.new_empty((parts, *weight.shape)) if need_weight else routing
    partial_routing = routing.new_empty((blocks, num_examples, num_experts)) if need_routing else routing
    _fused_kernel[(parts * blocks,)](
        grad_y_NKPQ,
        x_NCHW,
        routing,
        weight,
        partial_weight,
        partial_routing,
        num_examples,
        examples_per_program,
        num_experts,
        grad_y_NKPQ[0, 0].numel(),
        num_rows,
        num_columns,
        Strides.of(grad_y_NKPQ.shape, channels_last),
        Strides.of(x_NCHW.shape, channels_last),
        Steps.of(x_NCHW, grad_y_NKPQ, spec),
        NEED_ROUTING=need_routing,
        NEED_WEIGHT=need_weight,
        STRIDED=spec.stride != (1, 1),
        PRECISION=matmul_precision(x_NCHW.dtype),
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=8,
    )
    return (
        partial_routing.sum(0).to(routing_NE.dtype) if need_routing else None,
        partial_weight.sum(0).to(weight.dtype) if need_weight else None,
    )
