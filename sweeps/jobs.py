"""One job of a sweep: how its folder says how it stands, which command runs it, and what is written when it breaks."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import yaml

from condconv.files import LAST, newest_good
from configs.results import METRICS_FILE, ROOT, RunRecord, now, read_result, write_result
from configs.runs import CONFIG_FILE
from sweeps.plan import Job

LOG_FILE = "log.txt"
# So long may a job take to save its state after it was told to stop.
GRACE_S = 90.0
STATES = ("waiting", "running", "finished", "failed", "interrupted")


def state_on_disk(folder: Path) -> str:
    """What an earlier start left: "new" (nothing), "finished", "failed" or "unfinished"."""
    result = read_result(folder)
    if result is not None:
        return {"finished": "finished", "failed": "failed"}.get(result["status"], "unfinished")
    return "unfinished" if (folder / CONFIG_FILE).is_file() else "new"


@dataclass
class JobRun:
    """A job on its way through a sweep.

    Args:
        job: its name and its own overrides.
        folder: of the run.
        overrides: all of them, as train.py takes them.
        script: train.py.
        devices: how many it trains on.
    """

    job: Job
    folder: Path
    overrides: list[str]
    script: Path = ROOT / "train.py"
    state: str = "waiting"
    skipped: bool = False
    code: int | None = None
    started_s: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    devices: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    ticket: str = ""
    log_start: int = 0

    @property
    def name(self) -> str:
        return self.job.name

    def arguments(self) -> list[str]:
        """Of train.py: anew, or from the last checkpoint if there is one."""
        if (self.folder / CONFIG_FILE).is_file() and newest_good(self.folder / LAST):
            return [f"resume={quoted(self.folder)}"]
        return [*self.overrides, f"paths.run={quoted(self.folder)}"]

    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, str(ROOT / "sweeps" / "job.py"), str(self.script), *self.arguments()]

    @property
    def lock(self) -> Path:
        """A file that the job's process locks; it holds the ticket of the process that may."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    def is_held(self) -> bool:
        """Whether a process of an earlier start still trains in the folder, as submitit's do when a sweep is killed."""
        if not self.lock.exists():
            return False
        with self.lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def ended_meanwhile(self) -> bool:
        """Whether such a process has finished the job since the sweep began; then there is nothing to run."""
        if state_on_disk(self.folder) != "finished":
            return False
        self.begin()
        self.end(0)
        return True

    def is_to_run(self, stop: Event) -> bool:
        """Wait until nobody else trains in the folder; False if the sweep was stopped or the job is finished then."""
        while self.is_held() and not stop.is_set():
            stop.wait(0.5)
        return not stop.is_set() and not self.ended_meanwhile()

    def prepare(self) -> list[str]:
        """Clear what an earlier start left without a checkpoint, or how it ended, and return the command."""
        command = self.command()
        result = read_result(self.folder)
        if not command[-1].startswith("resume=") and self.folder.is_dir():
            shutil.rmtree(self.folder)
        elif result is not None:  # else a job that breaks before its training begins would end as the earlier start did
            write_result(self.folder, {**result, "status": "running", "ended": None, "error": None})
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG_FILE
        self.log_start = log.stat().st_size if log.is_file() else 0
        self.ticket = secrets.token_hex(8)
        self.lock.write_text(self.ticket)
        self.begin()
        return command

    def own_environment(self, parent: str) -> dict[str, str]:
        """What sweeps/job.py wants to know: the process to end with ("any": whichever started it), lock and log."""
        return {
            "CONDCONV_SWEEP_PROCESS": parent,
            "CONDCONV_SWEEP_LOCK": str(self.lock),
            "CONDCONV_SWEEP_TICKET": self.ticket,
            "CONDCONV_SWEEP_LOG": str(self.folder / LOG_FILE),
        }

    def begin(self) -> None:
        self.state, self.started_s = "running", time.time()

    def run(self, stop: Event, kill: Event, keep_open: tuple[int, ...] = ()) -> None:
        """Run the job in a process of its own and wait for it; `stop` lets it save its state, `kill` does not."""
        if not self.is_to_run(stop):
            return
        command = self.prepare()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the sweep, which passes it on in its own way
            env={**os.environ, **self.environment, **self.own_environment(str(os.getpid()))},
            pass_fds=keep_open,
        )
        told_s: float | None = None
        while process.poll() is None:
            if stop.is_set() and told_s is None:
                told_s = time.monotonic()
                _signal_group(process.pid, signal.SIGTERM)
            if kill.is_set() or (told_s is not None and time.monotonic() - told_s > GRACE_S):
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
            stop.wait(0.2) if told_s is None else time.sleep(0.2)
        self.end(process.returncode, stopped=stop.is_set())

    def end(self, code: int, stopped: bool = False) -> None:
        """Take over how the job ended; what it could not write into its result.json is written here."""
        self.code = code
        self.seconds = time.time() - self.started_s
        result = read_result(self.folder)
        status = result["status"] if result else None
        if status == "finished" and code == 0:
            self.state = "finished"
        elif stopped or (status == "interrupted" and code != 0):
            self.state = "interrupted"
        else:
            self.state = "failed"
            if status != "failed":
                self._write_failure(code)

    def _write_failure(self, code: int) -> None:
        result = read_result(self.folder)
        if result is None:  # it failed before its training began
            record = RunRecord(self.folder, self.name, self.overrides)
            result = {**record.result, "parts": 1, "command": self.command()}
        result |= {"status": "failed", "ended": now(), "error": self._reason(code)}
        write_result(self.folder, result)

    def _reason(self, code: int) -> str:
        if self.failure:
            return self.failure
        lines = self.log_tail().splitlines()
        said = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        if said:
            return said[-1]
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps because the machine ran out of memory" if name == "SIGKILL" else ""
            return f"The process was ended by {name}{hint}."
        return f"The process ended with code {code}; see {self.folder / LOG_FILE}."

    def log_tail(self, length: int = 20_000) -> str:
        """The end of what the job has said since this start: the log goes on where an earlier one ended."""
        return _tail(self.folder / LOG_FILE, length, self.log_start)

    def error(self) -> str:
        """Why it failed, or nothing."""
        return str((read_result(self.folder) or {}).get("error") or "")


@dataclass(frozen=True)
class Progress:
    """How far a running job is: `share` between 0 and 1 of its epochs, and its figure so far, if it has one."""

    share: float = 0.0
    figure: float | None = None


def progress(folder: Path, metric: str, total: Callable[[Path], tuple[int, int]]) -> Progress:
    """Read a running job's progress from its files; whatever is not there yet counts as nothing.

    Args:
        folder: of the run.
        metric: the figure wanted, such as val/top1; the last value is taken.
        total: folder -> (epochs, steps) of the whole training, -1 for what does not end it.
    """
    path = folder / METRICS_FILE
    try:
        with path.open(encoding="utf-8") as file:
            head = file.readline()
    except OSError:
        return Progress()
    text = _tail(path, 200_000)
    if not text.startswith(head):
        text = head + text.partition("\n")[2]
    figure, step, epoch = None, 0, 0.0
    for row in csv.DictReader(io.StringIO(text)):
        figure = _number(row.get(metric), figure)
        step = int(_number(row.get("step"), step) or 0)
        epoch = _number(row.get("epoch"), epoch) or 0.0
    epochs, steps = total(folder)
    share = (step + 1) / steps if steps > 0 else epoch / epochs if epochs > 0 else 0.0
    return Progress(min(max(share, 0.0), 1.0), figure)


def training_length(folder: Path) -> tuple[int, int]:
    """(epochs, steps) of a run's config, -1 for what does not end it."""
    try:
        trainer = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))["trainer"]
        return int(trainer.get("max_epochs") or -1), int(trainer.get("max_steps") or -1)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return -1, -1


def final_figure(result: Mapping[str, Any] | None, metric: str) -> tuple[str, float] | None:
    """(name, value) of the test figure of a finished run that goes with a validation metric, else that metric."""
    figures = (result or {}).get("figures") or {}
    for name in (metric.replace("val", "test", 1), metric):
        if isinstance(figures.get(name), int | float):
            return name, float(figures[name])
    return None


def quoted(path: Path) -> str:
    """A path as the value of an override, whatever signs it holds."""
    # Backslashes are themselves, except before a quote.
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), str(path))
    return f"'{text}'"


def _number(text: Any, otherwise: float | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return otherwise


def _tail(path: Path, length: int, start: int = 0) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - length))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _signal_group(pid: int, number: int) -> None:
    """To the job and every process it started, such as the other ranks of a distributed training."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
