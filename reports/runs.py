"""The runs below a folder: what each was, how it ended, what it measured. Plain files alone, and none is trusted.

A run is a folder with `config.yaml`, `result.json`, `metrics.csv`, or an offline folder of W&B (`reports.wandb_files`).
Whatever is missing, truncated or of an unexpected type makes a problem that the page lists, never an exception.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reports.metrics import Curves, read_metrics

CONFIG, RESULT, METRICS, SWEEP = "config.yaml", "result.json", "metrics.csv", "sweep.json"
NEVER_ENTERED = {"latest-run", "checkpoints", ".git", ".hydra", ".venv", "__pycache__", "node_modules"}
FINISHED = "finished"
# libyaml reads a config twenty times faster; PyYAML may be built without it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ReportError(ValueError):
    """Something that who asked for the report can repair; the message says how."""


@dataclass
class Run:
    """One run.

    Attributes:
        folder: where its files are.
        config: the resolved config, empty if it could not be read.
        result: what `result.json` holds (see configs/results.py), or the same keys from W&B.
        status: "finished", "failed", "interrupted", "running", "incomplete", "unreadable" or "not started".
        curves: metric -> points (epochs done, value).
        problems: one sentence for each file that could not be read in full.
        reason: why it does not count; empty for a run that does.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    status: str = "incomplete"
    curves: Curves = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def name(self) -> str:
        return str(self.result.get("name") or self.config.get("name") or self.folder.name)

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def figures(self) -> dict[str, float]:
        return numbers(self.result.get("figures"))

    def figure(self, name: str) -> float | None:
        """A figure by its name; of the training loss, which is logged step by step, the last epoch's mean."""
        found = self.figures.get(name)
        points = self.curves.get(name) if name == "train/loss" else None
        # A curve has no point where the loss was no number.
        return points[-1][1] if points and (found is None or math.isfinite(found)) else found

    @property
    def figure_names(self) -> set[str]:
        """Of all figures, also those whose value JSON has no number for."""
        found = self.result.get("figures")
        return {str(name) for name in found} if isinstance(found, dict) else set()

    @property
    def best(self) -> dict[str, float]:
        return numbers(self.result.get("best"))

    @property
    def ended(self) -> str:
        return str(self.result.get("ended") or "")

    def number(self, key: str) -> float | None:
        """A number of `result.json` by its dotted name, such as "model.params"; None if it is missing or not finite."""
        value: Any = self.result
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return as_number(value)

    @property
    def command(self) -> list[str]:
        """The words of the command line; none if they were not kept."""
        words = self.result.get("command")
        return [str(word) for word in words] if isinstance(words, list) else []


def as_number(value: Any) -> float | None:
    """The finite number, or None: for booleans, text, NaN and whatever else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(mapping: Any) -> dict[str, float]:
    """The numbers of a mapping by name; NaN stays, since it says something about a run. Not a mapping: empty."""
    if not isinstance(mapping, dict):
        return {}
    found = {str(k): v for k, v in mapping.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: float(value) for key, value in found.items()}


def find_folders(roots: Sequence[Path]) -> Iterator[Path]:
    """Every folder below the roots that holds a run, in order of names; each once, through whatever links.

    Raises:
        ReportError: a root is not a folder.
    """
    seen: set[str] = set()
    for root in roots:
        if not root.is_dir():
            raise ReportError(f"runs={root}: there is no such folder.")
        for path, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            here = {CONFIG, RESULT, METRICS} & set(files)
            # A run's own W&B folder repeats what its plain files say; its analysis is no run.
            skipped = NEVER_ENTERED | ({"wandb", "analysis"} if here else set())
            folders[:] = sorted(name for name in folders if name not in skipped)
            if here or any(name.endswith(".wandb") for name in files):
                folders[:] = [name for name in folders if not any(name.endswith(".wandb") for name in files)]
                if here or parts_of_wandb_run(Path(path))[-1] == Path(path):  # a resumed run has several
                    yield Path(path)


def parts_of_wandb_run(folder: Path) -> list[Path]:
    """The folders `offline-run-<time>-<id>` of one id, oldest first: a resumed run gets another one each time."""
    _, dash, run_id = folder.name.rpartition("-")
    found = sorted(folder.parent.glob(f"*run-*-{glob.escape(run_id)}")) if dash else []
    return found if folder in found else [folder]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its `sweep.json` tells it: where, the command, and the jobs by name."""

    folder: Path
    command: list[str]
    jobs: tuple[str, ...]


def find_sweeps(roots: Sequence[Path], folders: Sequence[Path]) -> list[Sweep]:
    """The sweeps that the runs belong to, or that the roots are."""
    found = []
    for folder in dict.fromkeys([*roots, *(folder.parent for folder in folders)]):
        if (folder / SWEEP).is_file():
            content = _mapping(folder / SWEEP, [], _read_json)
            words, jobs = content.get("command"), content.get("jobs")
            command = [str(word) for word in words] if isinstance(words, list) else []
            found.append(Sweep(folder, command, tuple(map(str, jobs)) if isinstance(jobs, dict) else ()))
    return found


def planned(sweep: Sweep, folders: Sequence[Path]) -> list[Run]:
    """The jobs of a sweep that have no run's folder yet, as runs that do not count."""
    there = {folder.name for folder in folders if folder.parent == sweep.folder}
    missing = [name for name in sweep.jobs if name not in there]
    return [Run(sweep.folder / name, result={"name": name}, status="not started") for name in missing]


def read_run(folder: Path) -> Run:
    """Read what there is in a run's folder."""
    if not any((folder / name).is_file() for name in (CONFIG, RESULT, METRICS)):
        from reports.wandb_files import read_wandb

        return read_wandb(folder)
    run = Run(folder)
    run.config = _mapping(folder / CONFIG, run.problems, _read_yaml)
    run.result = _mapping(folder / RESULT, run.problems, _read_json)
    run.curves, last, problem = read_metrics(folder / METRICS)
    if problem:
        run.problems.append(problem)
    run.status = _status(run)
    if run.status != FINISHED:
        run.result.setdefault("figures", last)  # how far it came; never counted
    return run


def _status(run: Run) -> str:
    if not run.config:
        return "unreadable"
    status = str(run.result.get("status") or "")
    return status if status in (FINISHED, "failed", "interrupted", "running") else "incomplete"


def why_not(run: Run) -> str:
    """Why a run does not count, for what its own files say; empty if it does."""
    if run.status == FINISHED:
        return ""
    said = str(run.result.get("error") or "").strip()
    reasons = {
        "failed": f"failed: {said or 'no message'}",
        "interrupted": f"interrupted{': ' + said if said else ''}",
        "running": f"not finished: {RESULT} says running (it runs still, or was killed)",
        "unreadable": "; ".join(run.problems) or "its config could not be read",
        "not started": f"planned in {SWEEP}, not started",
        "incomplete": said if said else f"not finished: no readable {RESULT}",
    }
    return reasons[run.status]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader, both ways


def _mapping(path: Path, problems: list[str], read: Any) -> dict[str, Any]:
    if not path.is_file():
        problems.append(f"no {path.name}")
        return {}
    try:
        found = read(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problems.append(f"{path.name} cannot be read ({first[:120]})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no mapping")
        return {}
    return {str(key): value for key, value in found.items()}
