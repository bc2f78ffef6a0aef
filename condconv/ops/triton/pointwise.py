"""Per-example 1x1 convolution as one matrix product per example, in Triton.

Mathematics, for example n with its kernel `W_n[k, c]` from the workspace (or mixed in the kernel, `fuse_mixing`):
    forward          y[n, l, k]     = sum_c x[n, f(l), c] W_n[k, c]
    input gradient   dx[n, f(l), c] = sum_k dy[n, l, k] W_n[k, c]     the same kernel; zero at positions that f skips
    kernel gradient  dW_n[k, c]     = sum_l dy[n, l, k] x[n, f(l), c]     see `pointwise_gradient`
with f(l) = (l // Q) * stride_h * W + (l % Q) * stride_w, the input position of output position l.

Letters: n N examples, l L = P * Q output positions, c C and k K channels, e E experts; i and j are the summed and the
kept channel of a product. Activations have three strides (example, position, channel), which covers both memory
formats. Limits: one group, no padding. All accumulation in float32. Offsets across examples and experts are 64-bit,
inside one 32-bit. Every output element is written by one program in a fixed order: results are reproducible for a
given choice of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from condconv.ops.spec import ConvSpec, is_channels_last, memory_format_of
from condconv.ops.triton import pointwise_gradient, tiles
from condconv.ops.triton.launch import (
    Steps,
    Strides,
    autotuned,
    dot,
    empty_output,
    matmul_precision,
    spread,
    tile_configs,
)

PRODUCT_TILES = [
    (128, 128, 32, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 4, 4),
    (64, 32, 64, 4, 3),
    (32, 64, 64, 4, 3),
    (16, 64, 64, 4, 3),
    (32, 32, 32, 4, 3),
]


@autotuned(
    tile_configs(("BLOCK_L", "BLOCK_J", "BLOCK_I"), PRODUCT_TILES, (32, 32, 16)),
    key=["num_positions", "num_columns", "num_inner", "source_strides", "FUSE_MIXING", "kernel_stride_i"],
    extents={"BLOCK_L": "num_positions", "BLOCK_J": "num_columns", "BLOCK_I": "num_inner"},
)
@triton.jit
def _product_kernel(
    source_ptr,
    kernel_ptr,
    routing_ptr,
    target_ptr,
    num_positions,
    num_columns,
    num_inner,
    num_experts,
    source_strides,
    kernel_stride,
    kernel_stride_i,
    kernel_stride_j,
    target_strides,
    steps,
    STRIDED_SOURCE: tl.constexpr,
    STRIDED_TARGET: tl.constexpr,
    FUSE_MIXING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks_j = tl.cdiv(num_columns, BLOCK_J)
    blocks = tl.cdiv(num_positions, BLOCK_L) * blocks_j
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = (block // blocks_j) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = (block % blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    here = position[:, None] < num_positions
    wanted = column[None, :] < num_columns
    far = spread(position, steps, True) if STRIDED_SOURCE or STRIDED_TARGET else position
    source = source_ptr + n * source_strides.n + (far if STRIDED_SOURCE else position)[:, None] * source_strides.l
    kernel = kernel_ptr + column[None, :] * kernel_stride_j
    if not FUSE_MIXING:
        kernel += n * kernel_stride
    acc = tl.zeros((BLOCK_L, BLOCK_J), tl.float32)
    for first in range(0, num_inner, BLOCK_I):
        inner = first + tl.arange(0, BLOCK_I)
        a = tl.load(source + inner[None, :] * source_strides.c, mask=here & (inner[None, :] < num_inner), other=0.0)
        offset = inner[:, None] * kernel_stride_i
        mask = wanted & (inner[:, None] < num_inner)
        if FUSE_MIXING:
            mixed = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
            expert = kernel + offset
            for e in range(num_experts):
                routing = tl.load(routing_ptr + n * num_experts + e)
                mixed += routing * tl.load(expert, mask=mask, other=0.0).to(tl.float32)
                expert += kernel_stride
            b = mixed.to(source_ptr.dtype.element_ty)
        else:
            b = tl.load(kernel + offset, mask=mask, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    target = target_ptr + n * target_strides.n + (far if STRIDED_TARGET else position)[:, None] * target_strides.l
    target += column[None, :] * target_strides.c
    tl.store(target, acc.to(target_ptr.dtype.element_ty), mask=here & wanted)


def _product(
    source: Tensor,
    source_strides: Strides,
    kernel: Tensor,
    kernel_strides: tuple[int, int, int],
    routing_nE: Tensor | None,
    target: Tensor,
    target_strides: Strides,
    steps: Steps,
    strided_target: bool,
) -> None:
    """`target[n, l, j] = sum_i source[n, l, i] kernel[n, i, j]`; with `routing_nE`, `kernel` holds the experts.

    `kernel_strides` are those over examples (or experts), i and j.
    """
    num_positions = (source if strided_target else target)[0, 0].numel()
    num_examples, num_columns = target.shape[:2]

    def grid(meta: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(num_positions, meta["BLOCK_L"]) * triton.cdiv(num_columns, meta["BLOCK_J"])
        return (num_examples * blocks,)

    _product_kernel[grid](
        source,
        kernel,
        source if routing_nE is None else routing_nE,
        target,
        num_positions,
        num_columns,
        source.shape[1],
        0 if routing_nE is None else routing_nE.shape[1],
        source_strides,
        *kernel_strides,
        target_strides,
        steps,
        STRIDED_SOURCE=steps.strided and not strided_target,
        STRIDED_TARGET=steps.strided and strided_target,
        FUSE_MIXING=routing_nE is not None,
        PRECISION=matmul_precision(source.dtype),
    )


def _forward(x_nCHW: Tensor, kernel_nKTC: Tensor, y_nKPQ: Tensor, call: tiles.Call) -> None:
    channels, steps = kernel_nKTC.shape[3], Steps.of(x_nCHW, y_nKPQ, call.spec)
    strides = (kernel_nKTC.shape[1] * channels, 1, channels)
    _product(x_nCHW, call.x, kernel_nKTC, strides, None, y_nKPQ, call.y, steps, False)


def _input_gradient(grad_y_nKPQ: Tensor, kernel_nKTC: Tensor, grad_x_nCHW: Tensor, call: tiles.Call) -> None:
    channels, steps = kernel_nKTC.shape[3], Steps.of(grad_x_nCHW, grad_y_nKPQ, call.spec)
    strides = (kernel_nKTC.shape[1] * channels, channels, 1)
    if steps.strided:
        grad_x_nCHW.zero_()
    _product(grad_y_nKPQ, call.y, kernel_nKTC, strides, None, grad_x_nCHW, call.x, steps, True)


KERNELS = tiles.Kernels(_forward, _input_gradient, pointwise_gradient.kernel_gradient)


def forward(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    workspace_bytes: int,
    fuse_mixing: bool = False,
) -> Tensor:
    """Per-example pointwise convolution, see `condconv.ops.registry.Forward`.

    `fuse_mixing` mixes each block of the kernel where it is multiplied: no workspace, but every block of positions and
    every example reads E blocks of experts from the cache. Which is faster is for a measurement to say
    (docs/kernels.md).
    """
    output_PQ = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), (1, 1))
    if not fuse_mixing or tiles.is_empty(x_NCHW, weight_EKCRS, output_PQ):
        return tiles.forward(KERNELS, x_NCHW, routing_NE, weight_EKCRS, spec, workspace_bytes)
    x_NCHW, channels_last = x_NCHW.contiguous(memory_format=memory_format_of(x_NCHW)), is_channels_last(x_NCHW)
    _, out_channels, channels = weight_EKCRS.shape[:3]
    y_NKPQ = empty_output(x_NCHW, out_channels, output_PQ)
    _product(
        x_NCHW,
        Strides.of(x_NCHW.shape, channels_last),
        weight_EKCRS.contiguous(),
        (out_channels * channels, 1, channels),
        routing_NE.float().contiguous(),
        y_NKPQ,
        Strides.of(y_NKPQ.shape, channels_last),
        Steps.of(x_NCHW, y_NKPQ, spec),
        False,
    )
    return y_NKPQ


def backward(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
    fuse_reduction: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, routing and experts, see `condconv.ops.registry.Backward`.

    `fuse_reduction` reduces each block of the kernel gradients in registers (`pointwise_gradient`): no traffic of size
    N x P.
    """
    if not fuse_reduction:
        return tiles.backward(KERNELS, grad_y_NKPQ, x_NCHW, routing_NE, weight_EKCRS, spec, needs, workspace_bytes)
    need_x, need_routing, need_weight = needs
    grad_x, _, _ = tiles.backward(
        KERNELS, grad_y_NKPQ, x_NCHW, routing_NE, weight_EKCRS, spec, (need_x, False, False), workspace_bytes
    )
    grad_routing, grad_weight = pointwise_gradient.expert_gradients(
        grad_y_NKPQ, x_NCHW, routing_NE, weight_EKCRS, spec, need_routing, need_weight
    )
    return grad_x, grad_routing, grad_weight
