"""Per-example convolution, forward only, with experts that are kept in fewer bytes.

For one example mixing kernels is reading E x P weights (E experts of P weights), so fewer bytes are less time, if
nothing is gained back in unpacking them. Two codes of experts `[E, K, M]`, M = C/G R S weights of an output channel:

- bfloat16: a tile of output channels after the other is converted, in the workspace, and mixed by a matrix product.
- 8 bits with a scale per expert and output channel, as rows `[E, K, M + 8]` of bytes: `weight / scale + 128`, then
  scale and `-128 scale` in float32. That is the format of `quantized::embedding_bag_byte`, a kernel of torch for
  embedding tables, which sums weighted rows and converts them in registers: with rows (e, k) of weight a_ne it is
  the mixing of kernels. In memory K comes before E, so that it reads one row after the other. It costs as much for each
  example, so for larger batches tiles are converted here too.

All experts at once never exist in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from condconv.ops import mixture, single
from condconv.ops.choice import choose
from condconv.ops.chunked import AUTOMATIC_WORKSPACE_BYTES, PerExampleConv, Tile, most_examples_of, plan_tiles
from condconv.ops.depthwise import Depthwise
from condconv.ops.depthwise_sum import DepthwiseSum
from condconv.ops.gemm import Gemm
from condconv.ops.grouped import Grouped
from condconv.ops.operator import _dense
from condconv.ops.registry import AUTO, get_backend
from condconv.ops.spec import ConvSpec, Problem, is_channels_last, live_taps, memory_format_of, without_autocast
from condconv.ops.workspace import workspace

CONVOLUTIONS: dict[str, type[PerExampleConv]] = {
    "gemm": Gemm,
    "depthwise": Depthwise,
    "depthwise_sum": DepthwiseSum,
    "grouped": Grouped,
}
"""Backends that mix kernels first; the others read experts as they are."""
SINGLE = "single"

EXPERT_DTYPES = ("bf16", "int8")
_ZERO_POINT, _LEVELS, _TAIL_BYTES = 128, 127, 8
_MOST_BAGS = 4
"""Examples from which on converting a tile once is faster than in registers for each of them, on a CPU."""


def encode(weight: Tensor, expert_dtype: str) -> Tensor:
    """Experts `[E, K, ...]` of any floating dtype as bfloat16 `[E, K, M]` or as bytes `[E, K, M + 8]`, K outermost.

    Eight bits are rounded to nearest, symmetrically: the largest weight of each row (e, k) becomes 127 or -127.
    """
    if expert_dtype == "bf16":
        return weight.flatten(2).to(torch.bfloat16, copy=True)
    coded = []
    for weight_KM in weight.flatten(2):  # one expert at a time bounds the memory for this
        weight_KM = weight_KM.float()
        scale_K = weight_KM.abs().amax(1) / _LEVELS
        divisor_K1 = scale_K.where(scale_K > 0, 1)[:, None]
        coded.append(pack((weight_KM / divisor_K1).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale_K))
    return torch.stack(coded, dim=1).transpose(0, 1)


def pack(weight: Tensor, scale: Tensor) -> Tensor:
    """Rows of bytes from int8 weights `[..., M]` and their scales `[...]`."""
    tail = torch.stack([scale, scale * -_ZERO_POINT], dim=-1).float().contiguous().view(torch.uint8)
    return torch.cat([weight.contiguous().view(torch.uint8) ^ _ZERO_POINT, tail], dim=-1)


def unpack(experts_EKB: Tensor) -> tuple[Tensor, Tensor | None]:
    """The stored weights `[E, K, M]`, int8 or bfloat16, and for int8 their scales `[E, K]`."""
    if experts_EKB.dtype != torch.uint8:
        return experts_EKB, None
    weight = (experts_EKB[..., :-_TAIL_BYTES] ^ _ZERO_POINT).view(torch.int8)
    return weight, _scale(experts_EKB)


def _scale(experts_EKB: Tensor) -> Tensor:
    start = experts_EKB.shape[2] - _TAIL_BYTES
    # A copy also where one row counts as contiguous: its first byte must be one that a float may have.
    tail = experts_EKB[..., start : start + 4].clone(memory_format=torch.contiguous_format)
    return tail.view(torch.float32).squeeze(-1)


def decode(experts_EKB: Tensor, dtype: torch.dtype) -> Tensor:
    """The experts (or a tile of output channels) that are stored, `[E, K, M]`, in the workspace on a CPU."""
    experts, channels, length = experts_EKB.shape
    if experts_EKB.dtype != torch.uint8:
        values = experts_EKB
    else:
        values = experts_EKB[..., :-_TAIL_BYTES]
        length -= _TAIL_BYTES
    like = torch.empty(0, dtype=dtype, device=experts_EKB.device)
    decoded = workspace.get(experts * channels * length, like, "experts").view(experts, channels, length)
    decoded.copy_(values)
    if experts_EKB.dtype == torch.uint8:
        decoded.sub_(_ZERO_POINT).mul_(_scale(experts_EKB)[..., None])
    return decoded


@lru_cache(maxsize=256)
def _bags(experts: int, first: int, last: int, batch: int) -> tuple[Tensor, Tensor]:
    """Rows of the table that are summed, in order, and where each sum starts: one for each (example, channel)."""
    with torch.inference_mode(False):
        rows = torch.arange(first * experts, last * experts, dtype=torch.int32).repeat(batch)
        return rows, torch.arange(0, rows.numel() + 1, experts, dtype=torch.int32)


class Mixer:
    """Mixed kernels of one tile after another from stored experts."""

    def __init__(
        self,
        x_NCHW: Tensor,
        routing_NE: Tensor,
        experts_EKB: Tensor,
        kernel_CRS: Sequence[int],
        where_RS: tuple[slice, slice],
        groups: int,
        budget_bytes: int,
        most_examples: int | None,
    ) -> None:
        self.dtype = torch.float64 if x_NCHW.dtype == torch.float64 else torch.float32
        self.compute_dtype = x_NCHW.dtype
        self.routing_NE = routing_NE.to(self.dtype)
        self.experts_EKB = experts_EKB
        self.kernel_CRS = tuple(kernel_CRS)
        self.where_RS = where_RS
        self.length = torch.Size(kernel_CRS).numel()
        self.budget_bytes = budget_bytes or AUTOMATIC_WORKSPACE_BYTES.get(x_NCHW.device.type, 4 << 20)
        itemsize = torch.finfo(self.dtype).bits // 8
        batch, channels = x_NCHW.shape[0], experts_EKB.shape[1]
        self.tiles = plan_tiles(batch, channels, self.length, groups == 1, itemsize, self.budget_bytes, most_examples)
        is_table = experts_EKB.dtype == torch.uint8 and x_NCHW.device.type == "cpu" and self.dtype == torch.float32
        self.in_registers = is_table and batch <= _MOST_BAGS

    def kernels(self, tile: Tile) -> Tensor:
        """`[N, K, C/G, R, S]` of the tile's examples and output channels, live taps only."""
        routing_nE = self.routing_NE[tile.examples]
        mixed = self._sum_rows(routing_nE, tile) if self.in_registers else self._multiply(routing_nE, tile)
        kernel_nkCRS = mixed.to(self.compute_dtype).view(routing_nE.shape[0], -1, *self.kernel_CRS)
        return kernel_nkCRS[..., self.where_RS[0], self.where_RS[1]]

    def only_kernel(self) -> Tensor:
        """`[K, C/G, R, S]` of a single example, all output channels."""
        if len(self.tiles) == 1:
            return self.kernels(self.tiles[0])[0]
        return torch.cat([self.kernels(tile)[0].clone() for tile in self.tiles])

    def _sum_rows(self, routing_nE: Tensor, tile: Tile) -> Tensor:
        batch, experts = routing_nE.shape
        channels = tile.channels.stop - tile.channels.start
        rows, starts = _bags(experts, tile.channels.start, tile.channels.stop, batch)
        weights = routing_nE.repeat(1, channels).flatten()  # in memory of its own: the kernel reads no strides
        table = self.experts_EKB.transpose(0, 1).flatten(0, 1)  # a view, K outermost
        mixed: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            table, rows, starts, False, 0, False, weights, None, True
        )
        return mixed

    def _multiply(self, routing_nE: Tensor, tile: Tile) -> Tensor:
        rows, channels = routing_nE.shape[0], tile.channels.stop - tile.channels.start
        mixed_nm = workspace.get(rows * channels * self.length, routing_nE, "mixed").view(rows, -1)
        for part in channel_parts(
            tile.channels, self.experts_EKB.shape[0] * self.length, self.dtype, self.budget_bytes
        ):
            weight_Em = decode(self.experts_EKB[:, part], self.dtype).flatten(1)
            start = (part.start - tile.channels.start) * self.length
            torch.mm(routing_nE, weight_Em, out=mixed_nm[:, start : start + weight_Em.shape[1]])
        return mixed_nm


def channel_parts(channels: slice, weights_per_channel: int, dtype: torch.dtype, budget_bytes: int) -> list[slice]:
    """Parts of the output channels whose experts fit in the budget when they are decoded; at least one channel each."""
    step = max(1, budget_bytes // (weights_per_channel * dtype.itemsize))
    return [slice(k, min(k + step, channels.stop)) for k in range(channels.start, channels.stop, step)]


def _mixture(x_NCHW: Tensor, routing_NE: Tensor, experts_EKB: Tensor, kernel_CRS: list[int], spec: ConvSpec) -> Tensor:
    """All experts of a tile of output channels on all examples; for pointwise layers on maps of few positions."""
    y_NKPQ = _empty_output(x_NCHW, experts_EKB, kernel_CRS, spec)
    dtype = torch.float64 if x_NCHW.dtype == torch.float64 else torch.float32
    size = experts_EKB.shape[0] * torch.Size(kernel_CRS).numel()
    for part in channel_parts(slice(0, experts_EKB.shape[1]), size, dtype, AUTOMATIC_WORKSPACE_BYTES["cpu"]):
        weight = decode(experts_EKB[:, part], dtype).unflatten(2, kernel_CRS)
        y_NKPQ[:, part] = mixture.forward(x_NCHW, routing_NE, weight, spec, 0)
    return y_NKPQ


def _empty_output(x_NCHW: Tensor, experts_EKB: Tensor, kernel_CRS: list[int], spec: ConvSpec) -> Tensor:
    output_PQ = spec.output_size((x_NCHW.shape[2], x_NCHW.shape[3]), (kernel_CRS[1], kernel_CRS[2]))
    shape = (x_NCHW.shape[0], experts_EKB.shape[1], *output_PQ)
    return torch.empty(shape, dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=memory_format_of(x_NCHW))


def check_readable(name: str) -> None:
    """Raise `ValueError` unless the backend, or what "auto" takes in its place, reads compressed experts."""
    if name not in (AUTO, SINGLE, *CONVOLUTIONS):
        raise ValueError(
            f"backend={name!r} cannot read compressed experts: choose {AUTO!r} or one of "
            f"{', '.join((SINGLE, *CONVOLUTIONS))}."
        )


def _choose(name: str, problem: Problem) -> str:
    """The backend by name, or what "auto" would take, or the nearest that mixes kernels first."""
    if name != AUTO:
        check_readable(name)
        get_backend(name, problem)  # raises where it cannot run
        return name
    chosen = choose(problem).backend
    if chosen == SINGLE:
        return chosen
    pointwise = problem.spec.groups == 1 and problem.spec.is_pointwise(problem.kernel_RS)
    if chosen in CONVOLUTIONS or (chosen == "mixture" and pointwise and problem.batch > _MOST_BAGS):
        return chosen
    return "depthwise" if problem.is_depthwise else "grouped" if problem.spec.groups > 1 else "gemm"


@torch.library.custom_op("condconv::compressed_conv2d", mutates_args=())
def compressed_conv2d(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    experts_EKB: Tensor,
    kernel_CRS: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    workspace_bytes: int,
) -> Tensor:
    """Per-example convolution without bias and without gradients, by experts as `encode` stores them."""
    spec = ConvSpec((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
    if x_NCHW.shape[0] == 0:
        return _empty_output(x_NCHW, experts_EKB, kernel_CRS, spec)
    x_NCHW = _dense(x_NCHW)
    size_HW, kernel_RS = (x_NCHW.shape[2], x_NCHW.shape[3]), (kernel_CRS[1], kernel_CRS[2])
    problem = Problem(
        batch=x_NCHW.shape[0],
        in_channels=x_NCHW.shape[1],
        size_HW=size_HW,
        out_channels=experts_EKB.shape[1],
        kernel_RS=kernel_RS,
        experts=experts_EKB.shape[0],
        spec=spec,
        dtype=x_NCHW.dtype,
        weight_dtype=x_NCHW.dtype,
        device=x_NCHW.device.type,
        channels_last=is_channels_last(x_NCHW),
        training=False,
    )
    chosen = _choose(backend, problem)
    with without_autocast(x_NCHW.device):
        if chosen == "mixture":
            return _mixture(x_NCHW, routing_NE, experts_EKB, kernel_CRS, spec)
        rows, columns = live_taps(size_HW, kernel_RS, spec)
        where = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        live_RS = (rows.stop - rows.start, columns.stop - columns.start)
        spec = spec._replace(padding=(rows.padding, columns.padding))
        conv = CONVOLUTIONS.get(chosen)
        most_examples = most_examples_of(conv, x_NCHW, live_RS, spec) if conv else None
        mixer = Mixer(x_NCHW, routing_NE, experts_EKB, kernel_CRS, where, groups, workspace_bytes, most_examples)
        if conv is None:
            return single.convolve(x_NCHW, mixer.only_kernel(), spec)
        y_NKPQ = _empty_output(x_NCHW, experts_EKB, [kernel_CRS[0], *live_RS], spec)
        for tile in mixer.tiles:
            if tile.channels.start == 0:
                chunk = conv(x_NCHW[tile.examples], live_RS, spec)
            chunk.forward(mixer.kernels(tile), y_NKPQ[tile.examples, tile.channels])
        return y_NKPQ


@compressed_conv2d.register_fake
def _(
    x_NCHW: Tensor,
    routing_NE: Tensor,
    experts_EKB: Tensor,
    kernel_CRS: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    workspace_bytes: int,
) -> Tensor:
    spec = ConvSpec((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
    return _empty_output(x_NCHW, experts_EKB, kernel_CRS, spec)
