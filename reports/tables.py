"""The numbers as CSV: one line for each run, counted or not, and one for each group."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from reports.comparison import Comparison, Row
from reports.configs import command_text, shortened
from reports.runs import Run
from reports.statistics import Difference, Spread

NUMBERS = ("model.params", "model.madds", "model.static_params", "model.static_madds", "images_per_second")
NUMBERS += ("peak_memory_mb", "seconds", "cpu_seconds", "epochs", "steps")
FACTS = ("device", "threads", "devices", "commit", "dirty", "started", "ended")
STAGES = ("train/", "val/", "val_ema/", "test/", "test_ema/")
FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def write_runs(path: Path, comparison: Comparison, paths: bool) -> Path:
    """Every run with all its figures, unscaled; `counts` and `reason` say whether it is in the means."""
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        lines += [_run_line(run, row.label, row.group.columns, paths) for run in row.group.runs]
    lines += [_run_line(run, "", {}, paths) for run in comparison.left_out]
    return _write(path, lines)


def _run_line(run: Run, label: str, columns: dict[str, Any], paths: bool) -> dict[str, Any]:
    facts = {key: run.result.get(key) for key in FACTS}
    return {
        "run": _safe(run.name),
        "group": _safe(label),
        "counts": not run.reason,
        "status": run.status,
        "reason": _safe(run.reason if paths else shortened(run.reason)),
        "seed": run.seed,
        **columns,
        **{name: value for name, value in sorted(run.figures.items()) if name.startswith(STAGES)},
        **{f"best {name}": value for name, value in sorted(run.best.items())},
        **{key.removeprefix("model."): run.number(key) for key in NUMBERS},
        **facts,
        "command": _safe(command_text(run.command, paths)),
        "problems": _safe("; ".join(run.problems)),
        **({"folder": _safe(str(run.folder))} if paths else {}),
    }


def write_groups(path: Path, comparison: Comparison) -> Path:
    """Every group with means, deviations, differences and costs; shares in percent."""
    return _write(path, [_group_line(row, comparison) for row in comparison.rows])


def _group_line(row: Row, comparison: Comparison) -> dict[str, Any]:
    name = comparison.metric.title
    line: dict[str, Any] = {"group": _safe(row.label), **row.group.columns, "n": row.value.n}
    line |= {f"{name} mean": row.value.mean, f"{name} sd": row.value.sd, "baseline": ""}
    if row.baseline is not None:
        line["baseline"] = _safe(row.baseline.label)
    line |= _difference("difference", row.difference)
    line |= {"params": row.params, "madds": row.madds}
    for key in ("images_per_second", "seconds_per_epoch", "cpu_seconds_per_epoch", "peak_memory_mb"):
        value: Spread | None = getattr(row, key)
        line |= {key: value.mean if value else None, f"{key} ratio": row.ratio(key)}
    line |= {f"{comparison.train_metric.title} mean": row.train.mean if row.train else None}
    return line | _difference("train difference", row.train_difference)


def _difference(name: str, found: Difference | None) -> dict[str, Any]:
    keys = {f"{name} pairs": "n", name: "mean", f"{name} low": "low", f"{name} high": "high"}
    return {column: getattr(found, key) if found else None for column, key in keys.items()}


def _safe(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text.startswith(FORMULAS) else text


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    return path
