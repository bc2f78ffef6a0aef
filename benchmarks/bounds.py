"""The least time that a layer can take: bytes over the measured copy bandwidth, operations over the measured rate.

Bytes: experts, inputs and outputs pass through memory once for each use; mixed kernels stay in a cache. Multiply-adds:
the cheaper of the two forms, mixing kernels first or running every expert, counted at the rate of one large matrix
product. No backend is expected to reach the bound; it tells how much there is left to gain.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.timing import time_once_ms
from condconv.ops.spec import Problem

_COPY_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """What this machine does: bytes per second read and written by a copy, multiply-adds per second by dtype."""

    copy_bytes_per_s: float
    madds_per_s: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_rates(device: str, dtypes: list[torch.dtype], repeats: int = 5) -> Rates:
    """Medians on large tensors."""
    source = torch.ones(_COPY_ELEMENTS[device], device=device)
    target = torch.empty_like(source)

    def median_s(function: object) -> float:
        assert callable(function)
        function()
        return statistics.median(time_once_ms(function, device) for _ in range(repeats)) / 1e3

    copied = 2 * source.numel() * source.element_size()
    copy_bytes_per_s = copied / median_s(lambda: target.copy_(source))
    madds_per_s: dict[str, float] = {}
    for dtype in dtypes:
        size = _MATRIX_SIZE[device]
        left = torch.ones(size, size, device=device, dtype=dtype)
        madds_per_s[str(dtype)] = size**3 / median_s(lambda left=left: left @ left)
    return Rates(copy_bytes_per_s, madds_per_s)


def least_bytes(problem: Problem) -> int:
    """Bytes to read and to write; of kernels, the taps that can reach the map."""
    height, width = problem.output_PQ
    x = problem.batch * problem.in_channels * problem.size_HW[0] * problem.size_HW[1] * problem.dtype.itemsize
    y = problem.batch * problem.out_channels * height * width * problem.dtype.itemsize
    experts = problem.experts * problem.kernel_size * problem.weight_dtype.itemsize
    forward = x + y + experts
    # Backward: read x, dy and the experts; write dx and the experts' gradients.
    return forward + (2 * x + y + 2 * experts if problem.training else 0)


def least_madds(problem: Problem) -> int:
    """Multiply-adds of the cheaper form; backward mixes again and has two products for each of the forward."""
    once = problem.batch * problem.kernel_size
    mixing, running = problem.experts, problem.positions
    if not problem.training:
        return once * min(mixing + running, mixing * running)
    # Mix first: mix twice, reduce kernel gradients onto routing and onto experts. Run all: three times everything.
    return once * min(4 * mixing + 3 * running, 3 * mixing * running)


def bound_ms(problem: Problem, rates: Rates) -> float:
    """Milliseconds that the layer takes at least, by memory or by arithmetic, whichever is longer."""
    by_memory = least_bytes(problem) / rates.copy_bytes_per_s
    by_arithmetic = least_madds(problem) / rates.madds_per_s[str(problem.dtype)]
    return 1e3 * max(by_memory, by_arithmetic)
