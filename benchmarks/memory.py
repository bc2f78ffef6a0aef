"""Peak memory of a training step beyond parameters, gradients and optimiser state.

On a CPU: one step under torch's profiler, which reports every allocation and release, also inside custom operators and
library calls. Gradients and optimiser state are known by their addresses and left out of the running total. On CUDA:
the allocator's own peak over what was there before the step; gradients that exist at that moment count, so the figure
is an upper bound.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

BYTES_PER_MB = 1e6


def peak_bytes(step: Callable[[], object], kept: Callable[[], Iterable[Tensor]], device: str) -> int:
    """Peak of one step, without what stays behind.

    Args:
        step: a training step.
        kept: asked after the step: the tensors that do not count, gradients and optimiser state.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return _peak(_events(profiler), {tensor.untyped_storage().data_ptr() for tensor in kept()})


def _events(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) in the order of time; bytes are negative for a release."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    found.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in found]


def _peak(events: list[tuple[int, int]], kept: set[int]) -> int:
    """Largest running total; the last allocation at an address that is kept in the end never counts."""
    last: dict[int, int] = {}
    for index, (address, size) in enumerate(events):
        if size > 0:
            last[address] = index
        else:
            last.pop(address, None)
    survivors = {index for address, index in last.items() if address in kept}
    live: dict[int, int] = {}
    total = peak = 0
    for index, (address, size) in enumerate(events):
        if size < 0:
            # What was allocated before the step, old gradients for one, was never counted.
            total -= live.pop(address, 0)
        elif index not in survivors:
            live[address] = size
            total += size
            peak = max(peak, total)
    return peak
