"""Stopping a training from outside: signals and the time limit, without losing the step in progress."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
TIME_LIMIT = 1  # beside the numbers of signals: a number that none of SIGNALS has


class Stopped(SystemExit):
    """Ends the process after training was stopped on purpose; nothing failed, and the run can be resumed."""


class StopRequests:
    """Notes signals while a training runs, so that it can stop between two steps.

    While `deferring` is set, the first signal is only noted, for `requested`; otherwise there is nothing to finish and
    it raises `Stopped`. A second signal ends the process at once. Processes forked from this one (loading workers)
    leave signals to it: a scheduler sends them to everybody.

    Args:
        exit_code: of `Stopped` after a signal or the time limit; Ctrl-C has 130 as everywhere.
        max_time: how long this process may train: "DD:HH:MM:SS", or a mapping such as `{hours: 3}`; None for ever.
            Each part of a resumed run has the whole time.

    Raises:
        ValueError: if `max_time` is neither.
    """

    def __init__(self, exit_code: int, max_time: str | Mapping[str, float] | None = None) -> None:
        self.exit_code = exit_code
        self.deferring = False
        self._deadline = None if max_time is None else time.monotonic() + seconds(max_time)
        self._owner = os.getpid()
        self._received: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def install(self) -> None:
        """Take the signals; again after Lightning has taken them."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def requested(self) -> int | None:
        """The number of the signal received so far, `TIME_LIMIT`, or None."""
        if self._received is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_LIMIT
        return self._received

    def code(self, reason: int) -> int:
        """The process's exit code for a reason that `requested` gave."""
        return 130 if reason == signal.SIGINT else self.exit_code

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self._received is not None:
            print(f"{describe(number)} again: stopping at once.", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._received = number
        if not self.deferring:
            print(f"{describe(number)}: stopping.", file=sys.stderr, flush=True)
            raise Stopped(self.code(number))
        print(f"{describe(number)}: the step in progress is finished and saved first.", file=sys.stderr, flush=True)


def describe(reason: int) -> str:
    """A reason to stop, in words."""
    return "Time limit (trainer.max_time)" if reason == TIME_LIMIT else signal.Signals(reason).name


def seconds(duration: str | Mapping[str, float]) -> float:
    """A duration as Lightning writes them, "DD:HH:MM:SS" or the arguments of `timedelta`, in seconds."""
    try:
        if isinstance(duration, Mapping):  # in a config it is a DictConfig, which is no dict
            return timedelta(**duration).total_seconds()
        days, hours, minutes, rest = (int(part) for part in str(duration).split(":"))
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds()
    except (TypeError, ValueError):
        raise ValueError(
            f"trainer.max_time={duration}: expected 'DD:HH:MM:SS', such as '00:03:30:00', or {{hours: 3}}."
        ) from None


class Agreement:
    """Lets all processes decide the same at the same step, for the price of a few bytes that travel during a step.

    The numbers of a step are exchanged (maximum over the processes) while the next step runs, on a process group of the
    CPU's own: no GPU waits, and the answer is one step old.
    """

    def __init__(self) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group = None
        if several and torch.distributed.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, values: list[int], now: bool = False) -> list[int]:
        """The maxima of what the processes gave one call earlier; with `now`, of this call too."""
        if self._group is None:
            return values
        known = self.finish(len(values))
        numbers = torch.tensor(values)
        self._pending = (torch.distributed.all_reduce(numbers, _MAX, group=self._group, async_op=True), numbers)
        if now:
            latest = self.finish(len(values))
            known = [max(pair) for pair in zip(known, latest, strict=True)]
        return known

    def finish(self, length: int) -> list[int]:
        """Wait for what is on its way; zeros if nothing is."""
        if self._pending is None:
            return [0] * length
        work, numbers = self._pending
        self._pending = None
        work.wait()
        return [int(number) for number in numbers]


_MAX = torch.distributed.ReduceOp.MAX if torch.distributed.is_available() else None
