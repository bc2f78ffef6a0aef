"""`metrics.csv` of a run as curves over epochs, however the file ends."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

Curves = dict[str, list[tuple[float, float]]]
"""metric -> points (epochs done, value), in order"""

DRAWN = ("train/", "val/", "val_ema/")
SPEED = "speed/images_per_second"


def read_metrics(path: Path) -> tuple[Curves, dict[str, float], str]:
    """The curves, the last value of every metric, and a sentence about what is wrong with the file (or nothing).

    Of a metric's values in one epoch the mean is drawn for `train/`, the last one otherwise. After a resume the file
    may hold a step twice: the later line counts.
    """
    if not path.is_file():
        return {}, {}, f"no {path.name}"
    history: list[dict[str, float]] = []
    broken = 0
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            # Every whole line ends with a line break; the last field of a cut one may be half a number.
            whole = (line.replace("\0", "") if line.endswith("\n") else line.rpartition(",")[0] for line in file)
            lines = csv.reader(whole)
            columns = next(lines, [])
            for line in lines:
                broken += len(line) != len(columns)
                history.append(dict(_numbers(columns, line)))
    except (OSError, csv.Error) as error:
        return {}, {}, f"{path.name} cannot be read ({error})"
    if not columns:
        return {}, {}, f"{path.name} is empty"
    problem = f"{path.name}: {broken} of {len(history)} lines have missing or extra fields" if broken else ""
    curves, last = summarize(history)
    return curves, last, problem


def _numbers(columns: list[str], line: list[str]) -> Iterator[tuple[str, float]]:
    for column, text in zip(columns, line, strict=False):
        if text:
            try:
                yield column, float(text)
            except ValueError:
                continue


def summarize(history: list[dict[str, float]]) -> tuple[Curves, dict[str, float]]:
    """(curves over epochs, last value of each metric) of logged lines, each with `step` and, mostly, `epoch`."""
    has_epochs = any("epoch" in line for line in history)
    values: dict[str, dict[float, dict[float, float]]] = {}
    last: dict[str, float] = {}
    for index, line in enumerate(history):
        step = line.get("step", float(index))
        position = line.get("epoch") if has_epochs else step
        for metric, value in line.items():
            last[metric] = value
            if metric.startswith(DRAWN) and position is not None and math.isfinite(value):
                values.setdefault(metric, {}).setdefault(position, {})[step] = value
    curves: Curves = {}
    for metric, by_position in values.items():
        points = []
        for position, by_step in sorted(by_position.items()):
            found = list(by_step.values())
            value = sum(found) / len(found) if metric.startswith("train/") else found[-1]
            points.append((position + (1 if has_epochs else 0), value))
        curves[metric] = points
    return curves, last
