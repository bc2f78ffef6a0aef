"""What all launchers share: precisions, strides of activations, tile sizes, and the matrix product inside the kernels.

Letters as in `condconv.ops.spec`; T = R * S taps. Kernels see an activation `t_NCHW`, in either memory format, as
`t[n, l, c]` with l = h * W + w: three strides, and the position stride is C (channels last) or 1 (contiguous). What
belongs together is one argument, a named tuple, in launchers and kernels alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor

from condconv.ops.chunked import AUTOMATIC_WORKSPACE_BYTES
from condconv.ops.spec import ConvSpec, memory_format_of
from condconv.ops.triton.support import interpreted

INTERPRETED = tl.constexpr(interpreted())
"""Fixed when the kernels are defined: their decorators look at the same variable at the same time."""

SHARED_BYTES = 160 << 10
"""Shared memory that a tile configuration may plan with; an H100 has 227 KiB a block, an A100 163."""


class Strides(NamedTuple):
    """Element strides of an activation over example, position and channel."""

    n: int
    l: int  # noqa: E741  the letter of the legend
    c: int

    @classmethod
    def of(cls, shape_NCHW: torch.Size, channels_last: bool) -> Strides:
        _, channels, height, width = shape_NCHW
        size = channels * height * width
        return cls(size, channels, 1) if channels_last else cls(size, 1, height * width)


class Geometry(NamedTuple):
    """The map between positions of two activations: kernel width, widths and heights, and the convolution's numbers."""

    kernel_width: int
    source_height: int
    source_width: int
    target_width: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int

    @classmethod
    def of(cls, source: Tensor, target: Tensor, kernel_width: int, spec: ConvSpec) -> Geometry:
        """`source` is read at positions computed from those of `target`."""
        sizes = (source.shape[2], source.shape[3], target.shape[3])
        return cls(kernel_width, *sizes, *spec.stride, *spec.padding, *spec.dilation)


class Steps(NamedTuple):
    """How the positions of a pointwise convolution's output map to those of its input: constants of `spread`."""

    width: int
    row: int
    column: int

    @classmethod
    def of(cls, x_NCHW: Tensor, y_NKPQ: Tensor, spec: ConvSpec) -> Steps:
        return cls(y_NKPQ.shape[3], spec.stride[0] * x_NCHW.shape[3], spec.stride[1])

    @property
    def strided(self) -> bool:
        """Not a field: the interpreter of triton 3.6 takes no truth value inside a tuple."""
        return (self.row, self.column) != (self.width, 1)


@triton.jit
def spread(positions, steps, STRIDED: tl.constexpr):
    """The input position of an output position of a pointwise convolution."""
    if STRIDED:
        positions = (positions // steps.width) * steps.row + (positions % steps.width) * steps.column
    return positions


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32. The interpreter multiplies the bit patterns of bfloat16, so it gets float32 (exact)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def source_positions(target, tap, geometry, TRANSPOSED: tl.constexpr):
    """Position read for `target` through `tap`, and whether it exists.

    Forward: h = p * stride - padding + r * dilation. Transposed (input gradient): p = (h + padding - r * dilation) /
    stride.
    """
    r = tap // geometry.kernel_width
    s = tap % geometry.kernel_width
    row = target // geometry.target_width
    column = target % geometry.target_width
    if TRANSPOSED:
        row = row + geometry.padding_h - r * geometry.dilation_h
        column = column + geometry.padding_w - s * geometry.dilation_w
        valid = (row >= 0) & (column >= 0) & (row % geometry.stride_h == 0) & (column % geometry.stride_w == 0)
        row = row // geometry.stride_h
        column = column // geometry.stride_w
        valid = valid & (row < geometry.source_height) & (column < geometry.source_width)
    else:
        row = row * geometry.stride_h - geometry.padding_h + r * geometry.dilation_h
        column = column * geometry.stride_w - geometry.padding_w + s * geometry.dilation_w
        valid = (row >= 0) & (column >= 0) & (row < geometry.source_height) & (column < geometry.source_width)
    return row * geometry.source_width + column, valid


@triton.jit
def split(x, dtype: tl.constexpr):
    """A float32 tensor as the sum of two of a half type: 16 (bfloat16) or 22 (float16) bits of it."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


def matmul_precision(dtype: torch.dtype) -> str:
    """Precision of the convolution's products: exact for half types, IEEE for float32 unless the user allows TF32."""
    return "tf32" if dtype == torch.float32 and _tf32_is_allowed() else "ieee"


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # Older settings write the newer one (torch 2.9) too; once that one was set, reading `allow_tf32` is an error.
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def workspace_budget(workspace_bytes: int, device: torch.device) -> int:
    """Bytes for mixed kernels: the argument, or for 0 half of the GPU's L2, so that x and y have the other half."""
    if workspace_bytes:
        return workspace_bytes
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size) // 2 or AUTOMATIC_WORKSPACE_BYTES["cuda"]
    return AUTOMATIC_WORKSPACE_BYTES.get(device.type, 4 << 20)


def empty_output(x_NCHW: Tensor, channels: int, output_PQ: tuple[int, int]) -> Tensor:
    """`y_NKPQ`, uninitialised, in the dtype and memory format of x."""
    shape = (x_NCHW.shape[0], channels, *output_PQ)
    return torch.empty(shape, dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=memory_format_of(x_NCHW))


def tile_configs(
    names: tuple[str, ...], tiles: Sequence[tuple[int, ...]], small: tuple[int, ...]
) -> list[triton.Config]:
    """Candidates for autotuning: block sizes by name, then warps and stages. The interpreter gets one, small."""
    if INTERPRETED.value:
        return [triton.Config(dict(zip(names, small, strict=True)))]
    return [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in tiles
    ]


def autotuned(configs: list[triton.Config], key: list[str], extents: dict[str, str] | None = None) -> Any:
    """`triton.autotune` that is quick, and asks once: answers lie on disk, beside the kernels that triton compiled.

    `key` and `extents` (see `pruner`) name arguments of the kernel. A candidate is timed for ten milliseconds instead
    of a hundred: a layer has four such kernels of up to eight candidates, a network dozens of layers.
    """
    prune = {"early_config_prune": pruner(extents)} if extents else None
    return triton.autotune(configs, key, prune_configs_by=prune, do_bench=_time_briefly, cache_results=True)


def _time_briefly(run: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    return triton.testing.do_bench(run, warmup=2, rep=10, quantiles=quantiles)


def pruner(extents: dict[str, str]) -> Callable[..., list[triton.Config]]:
    """Drops tile candidates that the problem cannot use, before any is timed.

    `extents` maps a block's name to the kernel argument that it tiles. A block of twice the extent or more is waste;
    float32 products on the ordinary units need the registers that large tiles would take. Where all would be dropped,
    the smallest stays.
    """

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        arguments = {**arguments, **constants}
        element_bytes = next(a.element_size() for a in arguments.values() if isinstance(a, Tensor))

        def fits(config: triton.Config) -> bool:
            blocks = {name: config.kwargs[name] for name in extents}
            if any(blocks[n] > max(32, triton.next_power_of_2(arguments[extents[n]])) for n in extents):
                return False
            rows, columns, inner = blocks.values()
            in_registers = element_bytes == 4 and arguments.get("PRECISION") == "ieee"
            shared = (rows + columns) * inner * element_bytes * config.num_stages
            return shared <= SHARED_BYTES and not (in_registers and rows * columns > 64 * 64)

        def size(config: triton.Config) -> int:
            return math.prod(config.kwargs[name] for name in extents)

        return [config for config in configs if fits(config)] or [min(configs, key=size)]

    return prune
