"""Times of functions that take turns, so that a disturbance of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MAX_ROUNDS = 100

_clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each round, in order; the warm-up is not among them."""

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    def over(self, other: Timing) -> dict[str, float]:
        """Ratio of the medians over the rounds that both ran, and the smallest and largest ratio of one round."""
        both = list(zip(self.rounds_ms, other.rounds_ms, strict=False))
        medians = [statistics.median(column) for column in zip(*both, strict=True)]
        rounds = [a / b for a, b in both]
        return {"ratio": medians[0] / medians[1], "min": min(rounds), "max": max(rounds)}

    def as_json(self) -> dict[str, float]:
        return {
            "median_ms": self.median_ms,
            "min_ms": min(self.rounds_ms),
            "max_ms": max(self.rounds_ms),
            "rounds": len(self.rounds_ms),
        }


def failure(error: BaseException) -> str:
    """What a table says about a contender that could not run: out of memory, or the first line of its message."""
    text = str(error).strip() or type(error).__name__
    memory = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
    return "out of memory" if memory else text.splitlines()[0]


def use_processor_time() -> None:
    """From now on, times are of the processor, which other work disturbs less. For one thread on a CPU."""
    global _clock
    _clock = time.process_time


def time_once_ms(function: Callable[[], object], device: str) -> float:
    """One run, with the device's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = _clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (_clock() - start)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: str,
    budget_s: float,
    min_rounds: int = 3,
    warm_ms: Mapping[str, float] | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of all functions (A B C A B C ...), and the reasons of those that failed.

    Each has an equal share of the budget: warm-up runs tell how many rounds that is, at least `min_rounds`. The slow
    ones leave the circle first. What has run already, with its time in `warm_ms`, is not warmed up again.
    """
    rounds: dict[str, int] = {}
    failed: dict[str, str] = {}
    share_ms = 1e3 * budget_s / max(1, len(functions))
    for name, function in functions.items():
        try:
            first_ms = (warm_ms or {}).get(name) or time_once_ms(function, device)
            if first_ms < share_ms / min_rounds:  # the first run of something short is mostly preparation
                first_ms = min(first_ms, time_once_ms(function, device))
        except (RuntimeError, ValueError, MemoryError) as error:
            failed[name] = failure(error)
        else:
            rounds[name] = min(MAX_ROUNDS, max(min_rounds, int(share_ms / max(first_ms, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(max(rounds.values(), default=0)):
        for name, count in rounds.items():
            if turn < count:
                times[name].append(time_once_ms(functions[name], device))
    return {name: Timing(tuple(values)) for name, values in times.items()}, failed
