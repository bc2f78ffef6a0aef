"""result.json: how a run stands and what came out of it, as a plain file in its folder (docs/sweeps.md lists the keys).

A reader never sees half a file. `status` is "running", "finished", "failed" or "interrupted"; a run whose process was
killed keeps "running". Neither torch nor Lightning is imported at the top, so reports and sweeps read results quickly.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.memory import PeakMemory

RESULT_FILE = "result.json"
METRICS_FILE = "metrics.csv"
ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("running", "finished", "failed", "interrupted")
DISTRIBUTIONS = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "lightning": "pytorch-lightning"}


class RunRecord:
    """Keeps a run's result.json: written when it starts, at every checkpoint and when it ends.

    Args:
        folder: the run's folder. If a result.json lies there, of a run that is now resumed, its start, command and
            seconds are kept.
        name: of the run.
        overrides: of the command line.
        model: `model_size` of the module.
    """

    def __init__(
        self, folder: Path, name: str, overrides: Sequence[str] = (), model: Mapping[str, int] | None = None
    ) -> None:
        self.folder = folder
        self.enabled = True
        self._memory = PeakMemory()
        self._start_s = time.perf_counter()
        before = read_result(folder) or {}
        self._cpu_start_s = time.process_time()
        self._seconds_before = float(before.get("seconds") or 0.0)
        self._cpu_seconds_before = float(before.get("cpu_seconds") or 0.0)
        self.result: dict[str, Any] = {
            "status": "running",
            "name": name,
            "command": before.get("command") or list(sys.argv),
            "overrides": before.get("overrides") or list(overrides),
            "started": before.get("started") or now(),
            "ended": None,
            "parts": int(before.get("parts") or 0) + 1,
            "seconds": self._seconds_before,
            "cpu_seconds": self._cpu_seconds_before,
            "epochs": before.get("epochs") or 0,
            "steps": before.get("steps") or 0,
            "figures": {},
            "best": before.get("best") or {},
            "model": dict(model or {}),
            "images_per_second": before.get("images_per_second"),
            "peak_memory_mb": None,
            "memory_kind": None,
            "device": None,
            "threads": None,
            "devices": None,
            **code_version(),
            "versions": versions(),
            "error": None,
        }

    @property
    def seconds(self) -> float:
        """Wall time of the training, over all its parts."""
        return self._seconds_before + time.perf_counter() - self._start_s

    @property
    def cpu_seconds(self) -> float:
        """CPU time of this process, all its threads but not its loading processes, over all parts of the training.

        On a machine that is shared, or where a run is paused, it says more than the clock.
        """
        return self._cpu_seconds_before + time.process_time() - self._cpu_start_s

    def note(self, trainer: Any) -> None:
        """Take over how far Lightning's trainer has come; called at every checkpoint, so that a kill loses little."""
        self.result |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        self.result |= {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        savers = [
            saver for saver in trainer.checkpoint_callbacks if getattr(saver, "best_model_score", None) is not None
        ]
        self.result["best"] |= {saver.monitor: float(saver.best_model_score) for saver in savers if saver.monitor}
        self.write()

    def end(self, status: str, figures: Mapping[str, float] | None = None, error: str | None = None) -> None:
        """The last word: status, final figures, speed and memory."""
        kind, peak = self._memory.read()
        speed = training_speed(self.folder / METRICS_FILE)
        self.result |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        self.result |= {"status": status, "ended": now(), "figures": dict(figures or {})}
        self.result |= {"images_per_second": speed, "peak_memory_mb": peak, "memory_kind": kind, "error": error}
        self.write()

    def write(self) -> None:
        if not self.enabled:
            return
        try:
            write_result(self.folder, self.result)
        except OSError as error:  # a full disk: the checkpoint's own error says what to do, on all processes
            print(f"warning: {self.folder / RESULT_FILE}: {error.strerror}", file=sys.stderr)


@contextmanager
def recorded(record: RunRecord, trainer: Any) -> Iterator[dict[str, float]]:
    """While entered, the run is "running"; afterwards its record says how it ended, and its loggers have ended too.

    The caller puts the final figures into the yielded dictionary. Only the trainer's first process writes.
    """
    figures: dict[str, float] = {}
    status, message = "failed", None
    record.enabled = trainer.is_global_zero
    record.result |= run_setting(trainer)
    record.write()
    try:
        yield figures
        record.note(trainer)
        status = "finished"
    except (KeyboardInterrupt, SystemExit):  # a signal, a time limit, Ctrl-C: each ends as an exit
        status = "interrupted"
        raise
    except Exception as error:
        from configs.messages import explain

        message = explain(error)
        raise
    finally:
        record.end(status, figures, message)
        for logger in trainer.loggers:
            if hasattr(logger, "summarize"):
                logger.summarize(record.result)
            if hasattr(logger, "finish"):
                logger.finish(exit_code=int(status != "finished"))


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """The result.json of a run's folder; None if there is none, or if it is not readable as one."""
    try:
        result = json.loads((Path(folder) / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") in STATUSES else None


def write_result(folder: str | Path, result: Mapping[str, Any]) -> Path:
    """Write result.json whole or not at all; figures that are not finite become null, which JSON has no word for."""
    path = Path(folder) / RESULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    text = json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN compares false
    return value


def now() -> str:
    """This second, ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def code_version() -> dict[str, Any]:
    """`commit` of the repository and whether files were changed since (`dirty`); None where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Of Python and the packages that figures depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in {**DISTRIBUTIONS, "condconv": "condconv"}.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def model_size(module: Any, image_size: int) -> dict[str, int]:
    """Parameters and MADDs of a module's network on square images, and of its static twin; empty if it cannot run."""
    try:
        counted = module.complexity(image_size)
    except ValueError:
        return {}
    keys = ("params", "madds", "static_params", "static_madds")
    return {key: getattr(counted, key) for key in keys}


def run_setting(trainer: Any) -> dict[str, Any]:
    """`device` in words, `devices` (processes over all nodes) and `threads` of each, of a Lightning trainer."""
    import torch

    root = trainer.strategy.root_device
    device = torch.cuda.get_device_name(root) if root.type == "cuda" else _processor()
    return {"device": f"{root.type}: {device}", "threads": torch.get_num_threads(), "devices": trainer.world_size}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def training_speed(metrics: Path) -> float | None:
    """Images per second: median over the windows of metrics.csv after the first, which warms up; None without any."""
    column = "speed/images_per_second"
    try:
        with metrics.open(newline="", encoding="utf-8") as file:
            windows = [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
    except (OSError, ValueError):
        return None
    return statistics.median(windows[1:] or windows) if windows else None
