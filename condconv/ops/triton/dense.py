"""Per-example k x k convolution as an implicit matrix product, in Triton: patches are addressed, never stored.

Mathematics, for example n with its kernel `W_n[k, t, c]` from the workspace, t = (r, s), and all sums inside a group:
    forward          y[n, l, k]    = sum_tc x[n, f(l, t), c] W_n[k, t, c]
    input gradient   dx[n, l, c]   = sum_tk dy[n, g(l, t), k] W_n[k, t, c]
    kernel gradient  dW_n[k, t, c] = sum_l dy[n, l, k] x[n, f(l, t), c]
with f(l, t) the input position that output position l reads through tap t, g(l, t) the output position that reads input
position l through tap t, terms without such a position being zero (`launch.source_positions`).

Letters: n examples, l positions, T taps, c C and k K channels (of one group), G groups. Forward and input gradient are
one kernel: `target[n, l, j] = sum_ti source[n, position, i] B[n, t, i, j]`. Taps come before channels in the
workspace, so that B is read in runs of channels.
Limits: groups of fewer than 16 channels work but leave most of a tile empty; the input gradient of a convolution with
stride s multiplies the zeros of skipped positions, s_h * s_w times the needed work. All accumulation in float32.
Offsets across examples are 64-bit, inside one 32-bit. Every output element is written by one program in a fixed order.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from condconv.ops.triton import tiles
from condconv.ops.triton.launch import (
    Strides,
    autotuned,
    dot,
    matmul_precision,
    source_positions,
    tile_configs,
)

PRODUCT_TILES = [
    (128, 128, 32, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 32, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 32, 64, 4, 3),
    (64, 64, 32, 4, 3),
    (32, 32, 32, 4, 3),
]
GRADIENT_TILES = [(128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 3), (32, 32, 32, 4, 3)]


@autotuned(
    tile_configs(("BLOCK_L", "BLOCK_J", "BLOCK_I"), PRODUCT_TILES, (32, 32, 16)),
    key=["num_positions", "num_columns", "num_inner", "num_taps", "source_strides", "geometry", "TRANSPOSED"],
    extents={"BLOCK_L": "num_positions", "BLOCK_J": "num_columns", "BLOCK_I": "num_inner"},
)
@triton.jit
def _product_kernel(
    source_ptr,
    kernel_ptr,
    target_ptr,
    num_positions,
    num_columns,
    num_inner,
    num_taps,
    num_groups,
    source_strides,
    kernel_stride_t,
    kernel_stride_i,
    kernel_stride_j,
    target_strides,
    geometry,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks_j = tl.cdiv(num_columns, BLOCK_J)
    blocks = tl.cdiv(num_positions, BLOCK_L) * blocks_j
    block = tl.program_id(0) % blocks
    example_group = (tl.program_id(0) // blocks).to(tl.int64)
    n = example_group // num_groups
    group = example_group % num_groups
    position = (block // blocks_j) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = (block % blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    source = source_ptr + n * source_strides.n + group * num_inner * source_strides.c
    # A group's part of an example's kernel is K/G x T x C/G numbers, whichever of the two channels is summed over.
    kernel = kernel_ptr + example_group * num_inner * num_taps * num_columns + column[None, :] * kernel_stride_j
    blocks_i = tl.cdiv(num_inner, BLOCK_I)
    acc = tl.zeros((BLOCK_L, BLOCK_J), tl.float32)
    for step in range(0, num_taps * blocks_i):
        tap = step // blocks_i
        inner = (step % blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        there, exists = source_positions(
            position,
            tap,
            geometry,
            TRANSPOSED,
        )
        exists = exists & (position < num_positions)
        a = tl.load(
            source + there[:, None] * source_strides.l + inner[None, :] * source_strides.c,
            mask=exists[:, None] & (inner[None, :] < num_inner),
            other=0.0,
        )
        b = tl.load(
            kernel + tap * kernel_stride_t + inner[:, None] * kernel_stride_i,
            mask=(column[None, :] < num_columns) & (inner[:, None] < num_inner),
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    target = target_ptr + n * target_strides.n + group * num_columns * target_strides.c
    target += position[:, None] * target_strides.l + column[None, :] * target_strides.c
    mask = (position[:, None] < num_positions) & (column[None, :] < num_columns)
    tl.store(target, acc.to(target_ptr.dtype.element_ty), mask=mask)


@autotuned(
    tile_configs(("BLOCK_K", "BLOCK_C", "BLOCK_L"), GRADIENT_TILES, (32, 32, 32)),
    key=["num_positions", "num_rows", "num_columns", "num_taps", "x_strides", "geometry"],
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
    num_taps,
    num_groups,
    y_strides,
    x_strides,
    geometry,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    blocks_c = tl.cdiv(num_columns, BLOCK_C)
    blocks = tl.cdiv(num_rows, BLOCK_K) * blocks_c
    block = tl.program_id(0) % blocks
    tap = (tl.program_id(0) // blocks) % num_taps
    example_group = (tl.program_id(0) // blocks // num_taps).to(tl.int64)
    n = example_group // num_groups
    group = example_group % num_groups
    row = (block // blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_y = grad_y_ptr + n * y_strides.n + group * num_rows * y_strides.c + row[:, None] * y_strides.c
    x = x_ptr + n * x_strides.n + group * num_columns * x_strides.c + column[None, :] * x_strides.c
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, num_positions, BLOCK_L):
        position = first + tl.arange(0, BLOCK_L)
        there, exists = source_positions(
            position,
            tap,
            geometry,
            False,
        )
        exists = exists & (position < num_positions)
        a = tl.load(
            grad_y + position[None, :] * y_strides.l,
            mask=(position[None, :] < num_positions) & (row[:, None] < num_rows),
            other=0.0,
        )
        b = tl.load(x + there[:, None] * x_strides.l, mask=exists[:, None] & (column[None, :] < num_columns), other=0.0)
        acc = dot(a, b, acc, PRECISION)
    target = grad_kernel_ptr + example_group * num_rows * num_taps * num_columns
    target += (row[:, None] * num_taps + tap) * num_columns + column[None, :]
    mask = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(target, acc.to(grad_kernel_ptr.dtype.element_ty), mask=mask)


def _product(
    source: Tensor,
    source_strides: Strides,
    kernel_nKTC: Tensor,
    target: Tensor,
    target_strides: Strides,
    call: tiles.Call,
    transposed: bool,
) -> None:
    num_examples, _, num_taps, channels = kernel_nKTC.shape
    groups = call.spec.groups
    stride_k, stride_c = num_taps * channels, 1
    inner_stride, column_stride = (stride_k, stride_c) if transposed else (stride_c, stride_k)
    num_inner, num_columns = source.shape[1] // groups, target.shape[1] // groups
    num_positions = target[0, 0].numel()

    def grid(meta: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(num_positions, meta["BLOCK_L"]) * triton.cdiv(num_columns, meta["BLOCK_J"])
        return (num_examples * groups * blocks,)

    _product_kernel[grid](
        source,
        kernel_nKTC,
        target,
        num_positions,
        num_columns,
        num_inner,
        num_taps,
        groups,
        source_strides,
        channels,
        inner_stride,
        column_stride,
        target_strides,
        call.geometry,
        TRANSPOSED=transposed,
        PRECISION=matmul_precision(source.dtype),
    )


def _forward(x_nCHW: Tensor, kernel_nKTC: Tensor, y_nKPQ: Tensor, call: tiles.Call) -> None:
    _product(x_nCHW, call.x, kernel_nKTC, y_nKPQ, call.y, call, False)


def _input_gradient(grad_y_nKPQ: Tensor, kernel_nKTC: Tensor, grad_x_nCHW: Tensor, call: tiles.Call) -> None:
    _product(grad_y_nKPQ, call.y, kernel_nKTC, grad_x_nCHW, call.x, call, True)


def _kernel_gradient(grad_y_nKPQ: Tensor, x_nCHW: Tensor, grad_kernel_nKTC: Tensor, call: tiles.Call) -> None:
    num_examples, out_channels, num_taps, num_columns = grad_kernel_nKTC.shape
    groups = call.spec.groups
    num_rows = out_channels // groups

    def grid(meta: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(num_rows, meta["BLOCK_K"]) * triton.cdiv(num_columns, meta["BLOCK_C"])
        return (num_examples * groups * num_taps * blocks,)

    _kernel_gradient_kernel[grid](
        grad_y_nKPQ,
        x_nCHW,
        grad_kernel_nKTC,
        grad_y_nKPQ[0, 0].numel(),
        num_rows,
        num_columns,
        num_taps,
        groups,
        call.y,
        call.x,
        call.geometry,
        PRECISION=matmul_precision(x_nCHW.dtype),
    )


KERNELS = tiles.Kernels(_forward, _input_gradient, _kernel_gradient)

forward = partial(tiles.forward, KERNELS)
"""See `condconv.ops.registry.Forward`."""
backward = partial(tiles.backward, KERNELS)
"""See `condconv.ops.registry.Backward`."""
