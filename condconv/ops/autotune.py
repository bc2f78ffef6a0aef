"""Measure which backend is fastest for a problem, and keep the answer on disk with what it holds for."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import condconv
from condconv.files import write_whole
from condconv.ops.registry import BACKENDS, Backend
from condconv.ops.spec import Problem, without_autocast

if sys.platform != "win32":
    import fcntl

SKIP_SLOWER_THAN = 4.0
"""A candidate whose first run takes this many times the best so far is not timed further."""


@dataclass(frozen=True)
class Measurement:
    """Times of all candidates for one problem, in milliseconds: forward, and backward too when training.

    A candidate that ran out of memory has an infinite one.
    """

    problem: Problem
    time_ms: dict[str, float]

    @property
    def backend(self) -> str:
        """The fastest candidate.

        Raises:
            torch.OutOfMemoryError: none had enough memory.
        """
        fastest = min(self.time_ms, key=lambda name: self.time_ms[name])
        if math.isinf(self.time_ms[fastest]):
            raise torch.OutOfMemoryError(
                f"Every backend ran out of memory: {', '.join(self.time_ms)}. Measure with a smaller batch. "
                f"The problem: {self.problem}"
            )
        return fastest

    @property
    def is_complete(self) -> bool:
        """Whether no candidate ran out of memory, of which there may be more another time."""
        return all(map(math.isfinite, self.time_ms.values()))


def default_cache() -> Path:
    """Where measurements are kept: the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "condconv" / "autotune.json"


def environment(device: str) -> str:
    """What a measurement holds for: versions, the model of GPU or processor and its threads."""
    versions = f"condconv {condconv.__version__}, torch {torch.__version__}"
    if device == "cuda":
        return f"{versions}, triton {_triton_version()}, {torch.cuda.get_device_name()}"
    return f"{versions}, {_processor()}, {torch.get_num_threads()} threads"


def _triton_version() -> str:
    try:
        import triton  # here alone: it takes long, and on a CPU nothing needs it
    except ImportError:
        return "none"
    return str(triton.__version__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def candidates(problem: Problem) -> list[Backend]:
    """The backends that can run a problem."""
    return [backend for backend in BACKENDS.values() if backend.supports(problem) is None]


def measure(problem: Problem, repeats: int = 5) -> Measurement:
    """Time every candidate on random tensors of the problem's shapes: medians of `repeats` runs after a first."""
    time_ms: dict[str, float] = {}
    for backend in candidates(problem):
        best = min(time_ms.values(), default=math.inf)
        try:
            time_ms[backend.name] = _candidate_ms(backend, problem, repeats, best)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            # Others need less: the training must not end here.
            time_ms[backend.name] = math.inf
    return Measurement(problem, time_ms)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch raises no error of its own kind for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _candidate_ms(backend: Backend, problem: Problem, repeats: int, best: float) -> float:
    run = _workload(backend, problem)
    run()
    first = _time_ms(run, problem.device)
    if first > SKIP_SLOWER_THAN * best:
        return first
    return statistics.median([first, *(_time_ms(run, problem.device) for _ in range(repeats - 1))])


def _workload(backend: Backend, problem: Problem) -> Callable[[], object]:
    device, batch = problem.device, problem.batch
    format_ = torch.channels_last if problem.channels_last else torch.contiguous_format

    def draw(channels: int, size_HW: tuple[int, int]) -> Tensor:
        # Not a contiguous copy: of 1x1 maps, whose strides tell the format too, that would be the tensor itself.
        shape = (batch, channels, *size_HW)
        return torch.empty(shape, device=device, dtype=problem.dtype, memory_format=format_).normal_()

    x, grad_y = draw(problem.in_channels, problem.size_HW), draw(problem.out_channels, problem.output_PQ)
    weight_shape = (problem.experts, problem.out_channels, problem.in_channels // problem.spec.groups)
    weight = torch.randn(*weight_shape, *problem.kernel_RS, device=device, dtype=problem.weight_dtype)
    routing = torch.rand(batch, problem.experts, device=device)

    def run() -> None:
        with without_autocast(x.device):  # as in the operator
            backend.forward(x, routing, weight, problem.spec, 0)
            if problem.training:
                backend.backward(grad_y, x, routing, weight, problem.spec, (True, True, True), 0)

    return run


def _time_ms(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def load_cache(path: Path, device: str) -> dict[str, dict[str, float]]:
    """Times by problem for this environment; empty when there is no file, with a warning when it cannot be read."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text()).get(environment(device), {})
        return {str(problem): {str(k): float(v) for k, v in times.items()} for problem, times in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"The autotune cache {path} cannot be read ({error}): measuring anew.", stacklevel=2)
        return {}


def save_cache(path: Path, device: str, measurements: list[Measurement]) -> None:
    """Add measurements to the file, which is as before or complete, and keep those that other processes add meanwhile.

    The latter needs locks of files, which Windows and some network folders lack. A folder that cannot be written is a
    warning, not the end of a run.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            everything = _merged(path, device, measurements)
            write_whole(path, [json.dumps(everything, indent=1).encode()])
    except OSError as error:
        warnings.warn(f"The autotune cache {path} cannot be written ({error}).", stacklevel=2)


def _merged(path: Path, device: str, measurements: list[Measurement]) -> dict[str, object]:
    """What the file holds, and the measurements."""
    try:
        everything = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        everything = {}
    if not isinstance(everything, dict):
        everything = {}
    kept = load_cache(path, device) if environment(device) in everything else {}
    return everything | {environment(device): kept | {str(m.problem): m.time_ms for m in measurements}}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let processes that change the file take turns: by a file beside it, since the file itself is replaced."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
