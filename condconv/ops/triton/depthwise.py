"""Per-example depthwise convolution, in Triton.

Mathematics, for example n with its kernel `W_n[t, c]`, t = (r, s), every channel on its own:
    forward          y[n, l, c]  = sum_t x[n, f(l, t), c] W_n[t, c]
    input gradient   dx[n, l, c] = sum_t dy[n, g(l, t), c] W_n[t, c]
    kernel gradient  dW_n[t, c]  = sum_l dy[n, l, c] x[n, f(l, t), c]
with f and g as in `dense` (`launch.source_positions`). Kernels are tiny: with `fuse_mixing` each program mixes the
taps that it needs, `W_n[t, c] = sum_e a[n, e] W[e, t, c]`, once for its positions; otherwise they come from the
workspace. On a small map the E experts that a program then reads outweigh the map, so the default fuses only where
positions are many.

Letters: n examples, l positions, T taps, c C channels, E experts; experts are transposed to `[E, T, C]` once per call,
so that they are read in runs of channels. Forward and input gradient are one kernel. Tiles have positions and channels
in the order of the memory format, so that neighbouring threads read neighbouring numbers.
Limits: one output channel per input channel. All accumulation in float32; mixed kernels are rounded to the input's
dtype whether fused or not. Offsets across examples and experts are 64-bit, inside one 32-bit. Kernel gradients of
ranges of positions are partial sums, added in one order; every element is written by one program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv.ops.spec import ConvSpec, crop_to_live_taps, is_channels_last, memory_format_of
from condconv.ops.triton import tiles
from condconv.ops.triton.launch import (
    INTERPRETED,
    Geometry,
    Strides,
    autotuned,
    empty_output,
    source_positions,
    tile_configs,
    workspace_budget,
)
from condconv.ops.triton.mix import mix, reduce

CONV_TILES = [(64, 32, 4, 1), (128, 32, 4, 1), (32, 64, 4, 1)]
GRADIENT_BLOCKS = (64, 32)
POSITIONS_PER_PROGRAM = 512
"""Of a kernel gradient: 512 positions of 32 channels of x and dy are 64 KiB of half precision, and stay in the L1."""


@triton.jit
def _oriented(position, channel, CHANNELS_LAST: tl.constexpr):
    """The two indices as the axes of a tile, the contiguous one last."""
    if CHANNELS_LAST:
        position = position[:, None]
        channel = channel[None, :]
    else:
        position = position[None, :]
        channel = channel[:, None]
    return position, channel


@autotuned(
    tile_configs(("BLOCK_L", "BLOCK_C"), CONV_TILES, (32, 16)),
    key=["num_positions", "num_channels", "TAPS", "geometry", "TRANSPOSED", "FUSE_MIXING", "CHANNELS_LAST"],
)
@triton.jit
def _conv_kernel(
    source_ptr,
    kernel_ptr,
    routing_ptr,
    target_ptr,
    num_positions,
    num_channels,
    num_experts,
    source_strides,
    kernel_stride,
    target_strides,
    geometry,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FUSE_MIXING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_l = tl.cdiv(num_positions, BLOCK_L)
    blocks = tl.cdiv(num_channels, BLOCK_C) * blocks_l
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position, channel = _oriented(
        (block % blocks_l) * BLOCK_L + tl.arange(0, BLOCK_L),
        (block // blocks_l) * BLOCK_C + tl.arange(0, BLOCK_C),
        CHANNELS_LAST,
    )
    here = (position < num_positions) & (channel < num_channels)
    source = source_ptr + n * source_strides.n + channel * source_strides.c
    kernel = kernel_ptr + channel
    if not FUSE_MIXING:
        kernel += n * kernel_stride
    acc = tl.zeros(here.shape, tl.float32)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        if FUSE_MIXING:
            expert = kernel + tap * num_channels
            mixed = tl.zeros(channel.shape, tl.float32)
            for e in range(num_experts):
                routing = tl.load(routing_ptr + n * num_experts + e)
                mixed += routing * tl.load(expert, mask=channel < num_channels, other=0.0).to(tl.float32)
                expert += kernel_stride
            weight = mixed.to(source_ptr.dtype.element_ty)
        else:
            weight = tl.load(kernel + tap * num_channels, mask=channel < num_channels, other=0.0)
        there, exists = source_positions(
            position,
            tap,
            geometry,
            TRANSPOSED,
        )
        value = tl.load(source + there * source_strides.l, mask=here & exists, other=0.0)
        acc += value.to(tl.float32) * weight.to(tl.float32)
    target = target_ptr + n * target_strides.n + position * target_strides.l + channel * target_strides.c
    tl.store(target, acc.to(target_ptr.dtype.element_ty), mask=here)


@triton.jit
def _kernel_gradient_kernel(
    grad_y_ptr,
    x_ptr,
    grad_kernel_ptr,
    num_positions,
    num_channels,
    num_parts,
    positions_per_part,
    y_strides,
    x_strides,
    geometry,
    TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(num_channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    example_part = (tl.program_id(0) // blocks).to(tl.int64)
    n = example_part // num_parts
    first = (example_part % num_parts).to(tl.int32) * positions_per_part
    last = tl.minimum(first + positions_per_part, num_positions)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    target = grad_kernel_ptr + example_part * TAPS * num_channels + channels
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    for tap in range(TAPS):
        grad = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(first, last, BLOCK_L):
            position, channel = _oriented(start + tl.arange(0, BLOCK_L), channels, CHANNELS_LAST)
            there, exists = source_positions(
                position,
                tap,
                geometry,
                False,
            )
            mask = exists & (position < last) & (channel < num_channels)
            y_offset = n * y_strides.n + (position * y_strides.l + channel * y_strides.c)
            x_offset = n * x_strides.n + (there * x_strides.l + channel * x_strides.c)
            grad_y = tl.load(grad_y_ptr + y_offset, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
            grad += tl.sum(grad_y * x, AXIS)
        tl.store(target + tap * num_channels, grad.to(grad_kernel_ptr.dtype.element_ty), mask=channels < num_channels)


class _Experts(NamedTuple):
    """Cropped to live taps and transposed: what forward and backward both begin with."""

    weight_ETC: Tensor
    kernel_width: int
    spec: ConvSpec
    where: tuple[slice, slice]

    @classmethod
    def of(cls, weight_EKCRS: Tensor, x_NCHW: Tensor, spec: ConvSpec) -> _Experts:
        live_EKCRS, spec, where = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
        weight_ETC = live_EKCRS.flatten(2).transpose(1, 2).contiguous()
        return cls(weight_ETC, live_EKCRS.shape[4], spec, where)


def _fuses(fuse_mixing: bool | None, num_positions: int, num_experts: int) -> bool:
    """By default where mixing a tap, E operations, is little beside using it everywhere. A rule, not measured."""
    return num_positions >= 16 * num_experts if fuse_mixing is None else fuse_mixing


def _convolve(
    source: Tensor,
    routing_NE: Tensor,
    experts: _Experts,
    target: Tensor,
    channels_last: bool,
    transposed: bool,
    fuse_mixing: bool,
    workspace_bytes: int,
) -> None:
    """Write the forward's or the input gradient's `target`, the batch in chunks unless mixing is fused."""
    num_experts, taps, channels = experts.weight_ETC.shape
    batch, num_positions = source.shape[0], target[0, 0].numel()
    step = batch
    kernel, kernel_stride = experts.weight_ETC, taps * channels
    if not fuse_mixing:
        budget = workspace_budget(workspace_bytes, source.device)
        step = min(batch, max(1, budget // (taps * channels * source.element_size())))
        kernel = source.new_empty((step, taps * channels))
    for first in range(0, batch, step):
        part, routing_nE = source[first : first + step], routing_NE[first : first + step]
        if not fuse_mixing:
            mix(routing_nE, experts.weight_ETC.view(num_experts, 1, -1), kernel[: part.shape[0]])

        def grid(meta: dict[str, int], examples: int = part.shape[0]) -> tuple[int]:
            blocks = triton.cdiv(num_positions, meta["BLOCK_L"]) * triton.cdiv(channels, meta["BLOCK_C"])
            return (examples * blocks,)

        _conv_kernel[grid](
            part,
            kernel,
            routing_nE,
            target[first : first + step],
            num_positions,
            channels,
            num_experts,
            Strides.of(source.shape, channels_last),
            kernel_stride,
            Strides.of(target.shape, channels_last),
            Geometry.of(source, target, experts.kernel_width, experts.spec),
            TAPS=taps,
            UNROLL=min(taps, 9),
            TRANSPOSED=transposed,
            FUSE_MIXING=fuse_mixing,
            CHANNELS_LAST=channels_last,
        )


def _expert_gradients(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    experts: _Experts,
    channels_last: bool,
    needs: tuple[bool, bool],
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of routing and experts `[E, T, C]`, float32."""
    num_experts, taps, channels = experts.weight_ETC.shape
    batch, num_positions = x_NCHW.shape[0], grad_y_NKPQ[0, 0].numel()
    block_l, block_c = (16, 16) if INTERPRETED.value else GRADIENT_BLOCKS
    per_part = 3 * block_l if INTERPRETED.value else POSITIONS_PER_PROGRAM
    parts = triton.cdiv(num_positions, per_part)
    row_bytes = parts * taps * channels * torch.float32.itemsize
    step = min(batch, max(1, workspace_budget(workspace_bytes, x_NCHW.device) // row_bytes))
    grad_routing = torch.zeros_like(routing_NE) if needs[0] else None
    grad_weight = torch.empty_like(experts.weight_ETC, dtype=torch.float32) if needs[1] else None
    # One part is rounded like any mixed kernel's gradient; several are added up in float32 first.
    space_dtype = x_NCHW.dtype if parts == 1 else torch.float32
    space = torch.empty((step, parts, taps * channels), dtype=space_dtype, device=x_NCHW.device)
    for first in range(0, batch, step):
        x, grad_y = x_NCHW[first : first + step], grad_y_NKPQ[first : first + step]
        grad_npP = space[: x.shape[0]]
        _kernel_gradient_kernel[(x.shape[0] * parts * triton.cdiv(channels, block_c),)](
            grad_y,
            x,
            grad_npP,
            num_positions,
            channels,
            parts,
            per_part,
            Strides.of(grad_y_NKPQ.shape, channels_last),
            Strides.of(x_NCHW.shape, channels_last),
            Geometry.of(x_NCHW, grad_y_NKPQ, experts.kernel_width, experts.spec),
            TAPS=taps,
            CHANNELS_LAST=channels_last,
            BLOCK_L=block_l,
            BLOCK_C=block_c,
            num_warps=4,
        )
        reduce(
            routing_NE[first : first + step],
            experts.weight_ETC.view(num_experts, -1),
            grad_npP[:, 0] if parts == 1 else grad_npP.sum(1).to(x_NCHW.dtype),
            None if grad_routing is None else grad_routing[first : first + step],
            None if grad_weight is None else grad_weight.view(num_experts, -1),
            first > 0,
        )
    return grad_routing, grad_weight


def forward(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    workspace_bytes: int,
    fuse_mixing: bool | None = None,
) -> Tensor:
    """Per-example depthwise convolution, see `registry.Forward`; `fuse_mixing` None: by the size of the map."""
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    output_PQ = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), kernel_RS)
    y_NKPQ = empty_output(x_NCHW, weight_EKCRS.shape[1], output_PQ)
    if tiles.is_empty(x_NCHW, weight_EKCRS, output_PQ):
        return y_NKPQ.zero_()
    x_NCHW, channels_last = x_NCHW.contiguous(memory_format=memory_format_of(x_NCHW)), is_channels_last(x_NCHW)
    experts = _Experts.of(weight_EKCRS, x_NCHW, spec)
    fused = _fuses(fuse_mixing, output_PQ[0] * output_PQ[1], routing_NE.shape[1])
    routing = routing_NE.float().contiguous()
    _convolve(x_NCHW, routing, experts, y_NKPQ, channels_last, False, fused, workspace_bytes)
    return y_NKPQ


def backward(
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
    fuse_mixing: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, routing and experts, see `condconv.ops.registry.Backward`."""
    need_x, need_routing, need_weight = needs
    if tiles.is_empty(x_NCHW, weight_EKCRS, (grad_y_NKPQ.shape[2], grad_y_NKPQ.shape[3])):
        return tiles.zero_gradients(x_NCHW, routing_NE, weight_EKCRS, needs)
    memory_format, channels_last = memory_format_of(x_NCHW), is_channels_last(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=memory_format)
    grad_y_NKPQ = grad_y_NKPQ.to(x_NCHW.dtype).contiguous(memory_format=memory_format)
    experts, routing = _Experts.of(weight_EKCRS, x_NCHW, spec), routing_NE.float().contiguous()
    grad_x, grad_routing, grad_weight = None, None, None
    if need_x:
        grad_x = torch.empty_like(x_NCHW, memory_format=memory_format)
        fused = _fuses(fuse_mixing, x_NCHW[0, 0].numel(), routing.shape[1])
        _convolve(grad_y_NKPQ, routing, experts, grad_x, channels_last, True, fused, workspace_bytes)
    if need_routing or need_weight:
        grad_routing, grad_ETC = _expert_gradients(
            grad_y_NKPQ, x_NCHW, routing, experts, channels_last, (need_routing, need_weight), workspace_bytes
        )
        if grad_ETC is not None:
            grad_EKTC = grad_ETC.transpose(1, 2).unsqueeze(3)
            grad_weight = tiles.restore(grad_EKTC, weight_EKCRS, experts.where)
    return grad_x, None if grad_routing is None else grad_routing.to(routing_NE.dtype), grad_weight
