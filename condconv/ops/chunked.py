"""Mix kernels, then convolve: in chunks, with a small workspace, and nothing kept for the backward.

Mathematics, for example n: `W_n = sum_e a_ne W_e`, `y_n = W_n * x_n`. Backward, with `dW_n` the kernel gradient of
example n: `dx_n = W_n^T * dy_n`, `da_ne = <dW_n, W_e>`, `dW_e = sum_n a_ne dW_n`.

Mixed kernels of a whole batch are N x P numbers (P weights a layer), far more than any cache. So forward and backward
walk over tiles of (examples, output channels) whose mixed kernels fit in a workspace that stays in the cache and is
used again for each tile. Tiles prefer few output channels and many examples: each expert weight is then read once,
and its gradient written once. On a CPU they are as small as the L2 of a core: `_cached_budget`. The backward mixes
again instead of saving. How one tile is convolved is a subclass of `PerExampleConv`, in the files `gemm.py`,
`grouped.py`, `depthwise.py` and `depthwise_sum.py`.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from condconv.ops.spec import ConvSpec, crop_to_live_taps, memory_format_of, mixing_dtype
from condconv.ops.workspace import workspace

AUTOMATIC_WORKSPACE_BYTES = {"cpu": 16 << 20, "cuda": 24 << 20}
"""Most workspace when the caller gives 0: inside the last-level cache of one CPU core complex, inside the L2 of a
data-centre GPU."""

CACHED_BYTES = 2 << 20
"""Mixed kernels of a tile that a CPU core still has in its L2 or near it when they are convolved."""
CACHED_EXAMPLES = 16
"""Examples of such a tile: enough rows for the products that mix, few enough for many output channels."""
LEAST_CHANNELS = 128
"""Output channels of such a tile, which may cost more than `CACHED_BYTES`: narrow products are slow."""

UNFOLDED_EXAMPLES = 8
"""Most examples of a tile in the forward of a layer with patches, on a CPU: with more channels instead its products are
up to a fifth faster. The backward, which would read and write the experts more often, gains nothing."""

PATCHES_BYTES = 16 << 20
"""Most memory for what a convolution lays out beside kernels; a tile takes fewer examples where it would be more."""


class PerExampleConv(abc.ABC):
    """The convolution of a few examples with kernels of their own; one subclass for each way to compute it.

    An instance serves all tiles of output channels of the same examples, so it may keep what they share.

    Args:
        x_NCHW: The examples.
        kernel_RS: Kernel size.
        spec: Geometry.
    """

    def __init__(self, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> None:
        self.x_NCHW = x_NCHW
        self.kernel_RS = kernel_RS
        self.spec = spec

    most_bytes: int | None = None
    """Of what `bytes_per_example` counts, for all examples of a tile; None for `PATCHES_BYTES`."""

    @classmethod
    def bytes_per_example(cls, x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec) -> int:
        """Memory that the convolution of an example takes beyond its arguments and results, for patches or copies."""
        return 0

    @abc.abstractmethod
    def forward(self, kernel_NKCRS: Tensor, y_NKPQ: Tensor) -> None:
        """Write the output for a tile of output channels; `y_NKPQ` is a view into the layer's output."""

    @abc.abstractmethod
    def input_gradient(self, grad_y_NKPQ: Tensor, kernel_NKCRS: Tensor, grad_x_NCHW: Tensor, first: bool) -> None:
        """Write (`first`) or add a tile's part of the input gradient to `grad_x_NCHW`, a view."""

    def finish_input_gradient(self, grad_x_NCHW: Tensor) -> None:  # noqa: B027 - most have nothing left to do
        """Called after the last tile, for what was not written before."""

    @abc.abstractmethod
    def kernel_gradient(self, grad_y_NKPQ: Tensor) -> Tensor:
        """The gradient of a tile's kernels `[N, K, C/G, R, S]`, or any shape of as many elements in that order."""


class Tile(NamedTuple):
    """Examples and output channels whose kernels are mixed at once."""

    examples: slice
    channels: slice


def plan_tiles(
    batch: int,
    out_channels: int,
    weights_per_channel: int,
    split_channels: bool,
    itemsize: int,
    budget_bytes: int,
    most_examples: int | None = None,
) -> list[Tile]:
    """Tiles of (examples, output channels) whose mixed kernels fit in the budget, of at most so many examples.

    Each holds at least one example and 32 output channels.
    Output channels are split first, where they may be; what is then still too large is split over examples.
    """
    budget = max(1, budget_bytes // itemsize)
    channel_step = out_channels
    if split_channels:
        fitting = budget // max(1, min(batch, most_examples or batch) * weights_per_channel)
        channel_step = min(out_channels, max(32, fitting // 16 * 16))
    example_step = min(batch, most_examples or batch, max(1, budget // max(1, channel_step * weights_per_channel)))
    example_step = max(1, example_step)
    return [
        Tile(slice(n, min(n + example_step, batch)), slice(k, min(k + channel_step, out_channels)))
        for n in range(0, batch, example_step)
        for k in range(0, out_channels, channel_step)
    ]


def most_examples_of(
    conv: type[PerExampleConv], x_NCHW: Tensor, kernel_RS: tuple[int, int], spec: ConvSpec
) -> int | None:
    """Examples of a tile whose patches or copies stay small; None where there are none."""
    bytes_per_example = conv.bytes_per_example(x_NCHW, kernel_RS, spec)
    return max(1, (conv.most_bytes or PATCHES_BYTES) // bytes_per_example) if bytes_per_example else None


def _cached_budget(batch: int, experts: int, positions: int, bytes_per_channel: int) -> tuple[int, int]:
    """Bytes of a tile on a CPU and its most examples.

    A tile of fewer channels than positions would read the maps more than the kernels. Measured, forward and backward
    of pointwise layers on one core: docs/experiments.md, "Which tiles for mixed kernels on a CPU?".
    """
    examples = min(batch, max(CACHED_EXAMPLES, experts))
    wanted = examples * max(LEAST_CHANNELS, positions) * bytes_per_channel
    return min(max(CACHED_BYTES, wanted), AUTOMATIC_WORKSPACE_BYTES["cpu"]), examples


class _Mixer:
    """Mixed kernels of one tile after another, and the way back from their gradients to routing and experts."""

    def __init__(
        self,
        x_NCHW: Tensor,
        routing_NE: Tensor,
        weight_EKCRS: Tensor,
        split_channels: bool,
        budget: int,
        most_examples: int | None,
        positions: int,
        backward: bool = False,
    ) -> None:
        self.dtype = mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
        self.compute_dtype = x_NCHW.dtype
        self.routing_NE = routing_NE.to(self.dtype)
        self.kernel_CRS = weight_EKCRS.shape[2:]
        self.weights_per_channel = self.kernel_CRS.numel()
        self.weight_EM = weight_EKCRS.reshape(weight_EKCRS.shape[0], -1)
        itemsize = torch.finfo(self.dtype).bits // 8
        shares_patches = most_examples is not None
        if not budget and split_channels and x_NCHW.device.type == "cpu":
            rows = min(x_NCHW.shape[0], most_examples or x_NCHW.shape[0])
            if shares_patches and not backward:
                rows = min(rows, UNFOLDED_EXAMPLES)
            experts, per_channel = weight_EKCRS.shape[0], self.weights_per_channel * itemsize
            budget, most_examples = _cached_budget(rows, experts, positions, per_channel)
        budget = budget or AUTOMATIC_WORKSPACE_BYTES.get(x_NCHW.device.type, 4 << 20)
        shape = (x_NCHW.shape[0], weight_EKCRS.shape[1], self.weights_per_channel)
        self.tiles = plan_tiles(*shape, split_channels, itemsize, budget, most_examples)
        if not shares_patches:
            # The experts of some channels stay in the cache for all examples. Patches are rather made only once.
            self.tiles.sort(key=lambda tile: tile.channels.start)

    def _columns(self, tile: Tile) -> slice:
        return slice(tile.channels.start * self.weights_per_channel, tile.channels.stop * self.weights_per_channel)

    def experts(self, tile: Tile) -> Tensor:
        return self.weight_EM[:, self._columns(tile)].to(self.dtype)

    def kernels(self, tile: Tile) -> Tensor:
        routing_nE, weight_Em = self.routing_NE[tile.examples], self.experts(tile)
        rows, columns = routing_nE.shape[0], weight_Em.shape[1]
        mixed_nm = workspace.get(rows * columns, routing_nE, "mixed").view(rows, columns)
        torch.mm(routing_nE, weight_Em, out=mixed_nm)
        return mixed_nm.to(self.compute_dtype).view(rows, -1, *self.kernel_CRS)

    def add_gradients(
        self, tile: Tile, grad_kernel_NKCRS: Tensor, grad_routing_NE: Tensor | None, grad_weight_EM: Tensor | None
    ) -> None:
        """Reduce a tile's kernel gradients onto the routing weights and onto the experts."""
        rows = tile.examples.stop - tile.examples.start
        grad_nm = grad_kernel_NKCRS.reshape(rows, -1).to(self.dtype)
        if grad_routing_NE is not None:
            weight_Em = self.experts(tile)
            # The long dimension is summed over; libraries are up to twice as fast with the smaller matrix on the left.
            if weight_Em.shape[0] < grad_nm.shape[0]:
                grad_routing_NE[tile.examples] += torch.mm(weight_Em, grad_nm.T).T
            else:
                grad_routing_NE[tile.examples].addmm_(grad_nm, weight_Em.T)
        if grad_weight_EM is not None:
            target_Em = grad_weight_EM[:, self._columns(tile)]
            routing_En = self.routing_NE[tile.examples].T
            if (
                tile.examples.start == 0
            ):  # the first examples write, the others add: no pass over the experts to zero them
                torch.mm(routing_En, grad_nm, out=target_Em)
            else:
                target_Em.addmm_(routing_En, grad_nm)


def forward(
    conv: type[PerExampleConv],
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    workspace_bytes: int,
) -> Tensor:
    """Per-example convolution without bias; see `condconv.functional.condconv2d` for shapes."""
    size_HW = (x_NCHW.shape[2], x_NCHW.shape[3])
    weight_EKCRS, spec, _ = crop_to_live_taps(weight_EKCRS, size_HW, spec)
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    most_examples = most_examples_of(conv, x_NCHW, kernel_RS, spec)
    height, width = spec.output_size(size_HW, kernel_RS)
    mixer = _Mixer(x_NCHW, routing_NE, weight_EKCRS, spec.groups == 1, workspace_bytes, most_examples, height * width)
    y_NKPQ = torch.empty(
        (x_NCHW.shape[0], weight_EKCRS.shape[1], height, width),
        dtype=x_NCHW.dtype,
        device=x_NCHW.device,
        memory_format=memory_format_of(x_NCHW),
    )
    chunks: dict[int, PerExampleConv] = {}
    for tile in mixer.tiles:
        chunk = chunks.pop(tile.examples.start, None) or conv(x_NCHW[tile.examples], kernel_RS, spec)
        chunk.forward(mixer.kernels(tile), y_NKPQ[tile.examples, tile.channels])
        if tile.channels.stop < weight_EKCRS.shape[1]:
            chunks[tile.examples.start] = chunk
    return y_NKPQ


def backward(
    conv: type[PerExampleConv],
    grad_y_NKPQ: Tensor,
    x_NCHW: Tensor,
    routing_NE: Tensor,
    weight_EKCRS: Tensor,
    spec: ConvSpec,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, routing weights and expert weights, each only where `needs` asks for it."""
    full_shape = weight_EKCRS.shape
    weight_EKCRS, spec, where = crop_to_live_taps(weight_EKCRS, (x_NCHW.shape[2], x_NCHW.shape[3]), spec)
    kernel_RS = (weight_EKCRS.shape[3], weight_EKCRS.shape[4])
    need_x, need_routing, need_weight = needs
    # The input gradient is a sum over tiles of output channels, which half precision must not accumulate.
    half = x_NCHW.dtype != mixing_dtype(x_NCHW, routing_NE, weight_EKCRS)
    split = spec.groups == 1 and not (half and need_x)
    most_examples = most_examples_of(conv, x_NCHW, kernel_RS, spec)
    positions = grad_y_NKPQ.shape[2] * grad_y_NKPQ.shape[3]
    mixer = _Mixer(x_NCHW, routing_NE, weight_EKCRS, split, workspace_bytes, most_examples, positions, backward=True)
    grad_x = torch.empty_like(x_NCHW) if need_x else None
    grad_routing = torch.zeros_like(mixer.routing_NE) if need_routing else None
    grad_weight = mixer.weight_EM.new_empty(mixer.weight_EM.shape, dtype=mixer.dtype) if need_weight else None
    chunks: dict[int, PerExampleConv] = {}
    for tile in mixer.tiles:
        first, last = tile.channels.start == 0, tile.channels.stop == full_shape[1]
        chunk = chunks.pop(tile.examples.start, None) or conv(x_NCHW[tile.examples], kernel_RS, spec)
        if not last:
            chunks[tile.examples.start] = chunk
        grad_y = grad_y_NKPQ[tile.examples, tile.channels]
        if grad_x is not None:
            chunk.input_gradient(grad_y, mixer.kernels(tile), grad_x[tile.examples], first)
            if last:
                chunk.finish_input_gradient(grad_x[tile.examples])
        if need_routing or need_weight:
            mixer.add_gradients(tile, chunk.kernel_gradient(grad_y), grad_routing, grad_weight)
    if grad_weight is not None:
        grad_weight = restore_dead_taps(grad_weight.view(weight_EKCRS.shape).to(weight_EKCRS.dtype), full_shape, where)
    return grad_x, None if grad_routing is None else grad_routing.to(routing_NE.dtype), grad_weight


def store(target: Tensor, value: Tensor, first: bool) -> None:
    """Write the first part of a sum, add the others."""
    if first:
        target.copy_(value)
    else:
        target.add_(value)


def restore_dead_taps(grad_EKCRS: Tensor, full_shape: torch.Size, where: tuple[slice, slice]) -> Tensor:
    """The gradient of whole kernels from that of their live taps; the others have none."""
    if grad_EKCRS.shape == full_shape:
        return grad_EKCRS
    full_EKCRS = grad_EKCRS.new_zeros(full_shape)
    full_EKCRS[:, :, :, where[0], where[1]] = grad_EKCRS
    return full_EKCRS
