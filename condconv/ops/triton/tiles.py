"""Mix, convolve, reduce: the walk over tiles that `pointwise` and `dense` share, plain torch around their kernels.

Experts are seen as `weight_EKTC`: taps before input channels, so that a matrix product reads whole runs of channels.
For one tap that is a view; otherwise the experts are transposed once per call, E x P numbers against the N x P of the
mixed kernels.

Forward and kernel gradient go through tiles of (examples, output channels), the input gradient through tiles of
(examples, input channels): so no tile ever has to add to what another one wrote, except expert gradients over
examples, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condconv.ops.chunked import plan_tiles
from condconv.ops.spec import ConvSpec, crop_to_live_taps, is_channels_last, memory_format_of
from condconv.ops.triton.launch import Geometry, Strides, empty_output, workspace_budget
from condconv.ops.triton.mix import mix, reduce


class Call(NamedTuple):
    """What stays the same for all tiles of one call."""

    spec: ConvSpec
    geometry: Geometry
    """Of the forward and the kernel gradient, or of the input gradient."""
    x: Strides
    y: Strides


class Kernels(NamedTuple):
    """The launchers for one tile; `kernel_nKTC` is contiguous, and K or C may be a part of the layer's channels."""

    forward: Callable[[Tensor, Tensor, Tensor, Call], None]
    """(x_nCHW, kernel_nKTC, y_nKPQ, call): writes y."""
    input_gradient: Callable[[Tensor, Tensor, Tensor, Call], None]
    """(grad_y_nKPQ, kernel_nKTC, grad_x_nCHW, call): writes the gradient of x."""
    kernel_gradient: Callable[[Tensor, Tensor, Tensor, Call], None]
    """(grad_y_nKPQ, x_nCHW, grad_kernel_nKTC, call): writes the gradients of the mixed kernels."""


def taps_before_channels(weight_EKCRS: Tensor) -> Tensor:
    """`[E, K, T, C]`, contiguous; a view when there is one tap."""
    return weight_EKCRS.flatten(3).transpose(2, 3).contiguous()


def restore(grad_EKTC: Tensor, weight_EKCRS: Tensor, where: tuple[slice, slice]) -> Tensor:
    """The gradient in the layout and dtype of the experts, zero for taps that were cropped."""
    kernel_height, kernel_width = weight_EKCRS.shape[3:]
    rows, columns = where[0].stop - where[0].start, where[1].stop - where[1].start
    grad: Tensor = grad_EKTC.unflatten(2, (rows, columns)).permute(0, 1, 4, 2, 3)
    full = (rows, columns) == (kernel_height, kernel_width)
    if full and rows * columns == 1:
        return grad.reshape(weight_EKCRS.shape).to(weight_EKCRS.dtype)
    shape = weight_EKCRS.shape
    grad_EKCRS = weight_EKCRS.new_empty(shape) if full else weight_EKCRS.new_zeros(shape)
    grad_EKCRS[:, :, :, where[0], where[1]] = grad
    return grad_EKCRS


def workspace(
    like: Tensor, tiles: Sequence[tuple[slice, slice]], weights_per_channel: int
) -> Callable[[tuple[slice, slice]], Tensor]:
    """One buffer for the kernels of any of the tiles, given out as `[n, P]` rows of the tile's size."""

    def numel(tile: tuple[slice, slice]) -> tuple[int, int]:
        examples, channels = tile
        return examples.stop - examples.start, (channels.stop - channels.start) * weights_per_channel

    buffer = like.new_empty(max(rows * columns for rows, columns in map(numel, tiles)))

    def part(tile: tuple[slice, slice]) -> Tensor:
        rows, columns = numel(tile)
        return buffer[: rows * columns].view(rows, columns)

    return part


def is_empty(x_NCHW: Tensor, weight_EKCRS: Tensor, output_PQ: tuple[int, int]) -> bool:
    """Whether there is nothing to multiply: kernels cannot be launched on empty grids."""
    return x_NCHW.numel() == 0 or weight_EKCRS.numel() == 0 or min(output_PQ) <= 0


def zero_gradients(
    x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of an empty output."""
    need_x, need_routing, need_weight = needs
    return (
        torch.zeros_like(x_NCHW) if need_x else None,
        torch.zeros_like(routing_NE) if need_routing else None,
        torch.zeros_like(weight_EKCRS) if need_weight else None,
    )


def forward(
    kernels: Kernels, x_NCHW: Tensor, routing_NE: Tensor, weight_EKCRS: Tensor, spec: ConvSpec, workspace_bytes: int
) -> Tensor:
    """Per-example convolution without bias: shapes and dtypes of `condconv.ops.registry.Forward`."""
    size_HW = (x_NCHW.shape[2], x_NCHW.shape[3])
    output_PQ = spec.output_size(size_HW, (weight_EKCRS.shape[3], weight_EKCRS.shape[4]))
    y_NKPQ = empty_output(x_NCHW, weight_EKCRS.shape[1], output_PQ)
    if is_empty(x_NCHW, weight_EKCRS, output_PQ):
        return y_NKPQ.zero_()
    x_NCHW = x_NCHW.contiguous(memory_format=memory_format_of(x_NCHW))
    channels_last = is_channels_last(x_NCHW)
    weight_EKCRS, spec, _ = crop_to_live_taps(weight_EKCRS, size_HW, spec)
    strides = Strides.of(x_NCHW.shape, channels_last), Strides.of(y_NKPQ.shape, channels_last)
    call = Call(spec, Geometry.of(x_NCHW, y_NKPQ, weight_EKCRS.shape[4], spec), *strides)
    routing_NE, weight_EKTC = routing_NE.float().contiguous(), taps_before_channels(weight_EKCRS)
    _, out_channels, taps, channels = weight_EKTC.shape
    budget = workspace_budget(workspace_bytes, x_NCHW.device)
    tiles = plan_tiles(x_NCHW.shape[0], out_channels, taps * channels, spec.groups == 1, x_NCHW.element_size(), budget)
    space = workspace(x_NCHW, tiles, taps * channels)
    for tile in tiles:
        kernel_nP = space(tile)
        weight_EP = weight_EKTC[:, tile.channels].view(weight_EKTC.shape[0], -1)
        mix(routing_NE[tile.examples], weight_EP.unsqueeze(1), kernel_nP)
        kernel_nKTC = kernel_nP.view(kernel_nP.shape[0], -1, taps, channels)
        kernels.forward(x_NCHW[tile.examples], kernel_nKTC, y_NKPQ[tile.examples, tile.channels], call)
    return y_NKPQ


def backward(
    kernels: Kernels,
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, routing and experts where `needs` asks for them: see `condconv.ops.registry.Backward`."""
    need_x, need_routing, need_weight = needs
    if is_empty(x_NCHW, weight_EKCRS, (grad_y_NKPQ.shape[2], grad_y_NKPQ.shape[3])):
        return zero_gradients(x_NCHW, routing_NE, weight_EKCRS, needs)
    memory_format, channels_last = memory_format_of(x_NCHW), is_channels_last(x_NCHW)
    x_NCHW = x_NCHW.contiguous(memory_format=memory_format)
    grad_y_NKPQ = grad_y_NKPQ.to(x_NCHW.dtype).contiguous(memory_format=memory_format)
    strides = Strides.of(x_NCHW.shape, channels_last), Strides.of(grad_y_NKPQ.shape, channels_last)
    live_EKCRS, spec, where = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    routing, weight_EKTC = routing_NE.float().contiguous(), taps_before_channels(live_EKCRS)
    budget = workspace_budget(workspace_bytes, x_NCHW.device)
    grad_x, grad_routing, grad_weight = None, None, None
    kernel_width = live_EKCRS.shape[4]
    if need_x:
        grad_x = torch.empty_like(x_NCHW, memory_format=memory_format)
        call = Call(spec, Geometry.of(grad_y_NKPQ, x_NCHW, kernel_width, spec), *strides)
        _input_gradient(kernels, grad_y_NKPQ, routing, weight_EKTC, grad_x, call, budget)
    if need_routing or need_weight:
        grad_routing = torch.zeros_like(routing) if need_routing else None
        call = Call(spec, Geometry.of(x_NCHW, grad_y_NKPQ, kernel_width, spec), *strides)
        grad_EKTC = _expert_gradients(
            kernels, grad_y_NKPQ, x_NCHW, routing, weight_EKTC, grad_routing, need_weight, call, budget
        )
        grad_weight = None if grad_EKTC is None else restore(grad_EKTC, weight_EKCRS, where)
    return grad_x, None if grad_routing is None else grad_routing.to(routing_NE.dtype), grad_weight


def _input_gradient(
    kernels: Kernels,
    grad_y_NKPQ: Tensor,
    routing_NE: Tensor,
    weight_EKTC: Tensor,
    grad_x_NCHW: Tensor,
    call: Call,
    budget: int,
) -> None:
    """Tiles of (examples, input channels): each writes its own part of the gradient."""
    experts, out_channels, taps, channels = weight_EKTC.shape
    batch, itemsize = grad_x_NCHW.shape[0], grad_x_NCHW.element_size()
    tiles = plan_tiles(batch, channels, out_channels * taps, call.spec.groups == 1, itemsize, budget)
    space = workspace(grad_x_NCHW, tiles, out_channels * taps)
    for tile in tiles:
        kernel_nP = space(tile)
        weight_Erc = weight_EKTC.view(experts, out_channels * taps, channels)[:, :, tile.channels]
        mix(routing_NE[tile.examples], weight_Erc, kernel_nP)
        kernel_nKTC = kernel_nP.view(kernel_nP.shape[0], out_channels, taps, -1)
        # With groups the tile is all channels of x, which are `groups` times those of a kernel.
        grad_x = grad_x_NCHW[tile.examples] if call.spec.groups > 1 else grad_x_NCHW[tile.examples, tile.channels]
        kernels.input_gradient(grad_y_NKPQ[tile.examples], kernel_nKTC, grad_x, call)


def _expert_gradients(
    kernels: Kernels,
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKTC: Tensor,
    grad_routing_NE: Tensor | None,
    need_weight: bool,
    call: Call,
    budget: int,
) -> Tensor | None:
    """Adds to `grad_routing_NE`; returns the experts' gradient, in float32 if it is a sum over several tiles."""
    experts, out_channels, taps, channels = weight_EKTC.shape
    batch = x_NCHW.shape[0]
    tiles = plan_tiles(batch, out_channels, taps * channels, call.spec.groups == 1, x_NCHW.element_size(), budget)
    grad_EKTC = None
    if need_weight:
        in_one_go = all(tile.examples == slice(0, batch) for tile in tiles)
        grad_EKTC = torch.empty_like(weight_EKTC, dtype=weight_EKTC.dtype if in_one_go else torch.float32)
    space = workspace(x_NCHW, tiles, taps * channels)
    for tile in tiles:
        grad_kernel_nP = space(tile)
        grad_kernel_nKTC = grad_kernel_nP.view(grad_kernel_nP.shape[0], -1, taps, channels)
        grad_y_nKPQ = grad_y_NKPQ[tile.examples, tile.channels]
        kernels.kernel_gradient(grad_y_nKPQ, x_NCHW[tile.examples], grad_kernel_nKTC, call)
        reduce(
            routing_NE[tile.examples],
            weight_EKTC[:, tile.channels].view(experts, -1),
            grad_kernel_nP,
            None if grad_routing_NE is None else grad_routing_NE[tile.examples],
            None if grad_EKTC is None else grad_EKTC[:, tile.channels].view(experts, -1),
            tile.examples.start > 0,
        )
    return grad_EKTC
