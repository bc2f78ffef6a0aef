"""Times in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks import timing
from benchmarks.timing import Timing, failure, time_in_turns, time_once_ms


def test_contenders_take_turns_and_slow_ones_leave_first() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    functions = {"fast": contender("fast", 0.002), "slow": contender("slow", 0.04)}
    times, failed = time_in_turns(functions, "cpu", budget_s=0.1, min_rounds=2)
    assert not failed
    assert len(times["slow"].rounds_ms) == 2
    assert len(times["fast"].rounds_ms) > 2
    measured = order[-len(times["fast"].rounds_ms) - 2 :]
    assert measured[:4] == ["fast", "slow", "fast", "slow"]
    assert set(measured[4:]) == {"fast"}
    assert times["slow"].median_ms > times["fast"].median_ms


def test_what_is_warm_is_not_warmed_up_again() -> None:
    calls: list[int] = []
    times, _ = time_in_turns({"a": lambda: calls.append(1)}, "cpu", 0.02, min_rounds=2, warm_ms={"a": 10.0})
    assert len(calls) == len(times["a"].rounds_ms) == 2


def test_a_failure_is_noted_and_the_others_go_on() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    times, failed = time_in_turns({"broken": broken, "fine": lambda: None}, "cpu", 0.01)
    assert failed == {"broken": "no kernel"}
    assert set(times) == {"fine"}
    assert failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == "out of memory"


def test_ratios_are_of_medians_with_the_spread_of_rounds() -> None:
    ours, static = Timing((2.0, 4.0, 9.0)), Timing((1.0, 4.0, 3.0))
    assert ours.over(static) == {"ratio": 4.0 / 3.0, "min": 1.0, "max": 3.0}
    longer = Timing((1.0, 4.0, 3.0, 99.0, 99.0))
    assert ours.over(longer) == ours.over(static), "rounds that only one of them ran do not count"
    assert ours.as_json() == {"median_ms": 4.0, "min_ms": 2.0, "max_ms": 9.0, "rounds": 3}


def test_processor_time_does_not_count_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_clock", time.perf_counter)
    assert time_once_ms(lambda: time.sleep(0.02), "cpu") >= 20
    timing.use_processor_time()
    assert time_once_ms(lambda: time.sleep(0.02), "cpu") < 15
