"""Groups beside their static twins: one row of numbers for each group."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from reports.groups import Group, make_groups, name_groups, show, twin_identities
from reports.runs import ReportError, Run, why_not
from reports.statistics import Difference, Spread, paired_difference, spread

METRICS_BY_PREFERENCE = ("test/top1", "test/AP", "val/top1", "val/AP", "test/mAP", "val/mAP", "test/loss", "val/loss")


@dataclass(frozen=True)
class Metric:
    """How a figure is read and shown: shares in percent and differences in points, losses as they are."""

    name: str

    @property
    def is_share(self) -> bool:
        return bool(re.fullmatch(r"(top\d+|m?AP\w*|AR\w*|accuracy)", self.name.rsplit("/", 1)[-1]))

    @property
    def lower_is_better(self) -> bool:
        return "loss" in self.name or "error" in self.name

    @property
    def unit(self) -> str:
        return "%" if self.is_share else ""

    @property
    def title(self) -> str:
        return f"{self.name}{' (%)' if self.is_share else ''}"

    def scaled(self, value: float) -> float:
        return 100 * value if self.is_share else value

    def text(self, value: float | None, sign: bool = False) -> str:
        """A value or a difference, already scaled."""
        if value is None:
            return "–"
        digits = 2 if self.is_share else 4
        text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
        return text.replace("-", "−")

    def better(self, difference: Difference) -> str:
        """One of "better", "worse", "unclear" or "single"."""
        verdict = difference.verdict
        if verdict in ("unclear", "single"):
            return verdict
        return "better" if (verdict == "above") != self.lower_is_better else "worse"


@dataclass
class Row:
    """A group's numbers; figures are scaled (percent)."""

    group: Group
    value: Spread
    baseline: Row | None = None
    difference: Difference | None = None
    params: float | None = None
    madds: float | None = None
    images_per_second: Spread | None = None
    seconds_per_epoch: Spread | None = None
    cpu_seconds_per_epoch: Spread | None = None
    peak_memory_mb: Spread | None = None
    train: Spread | None = None
    train_difference: Difference | None = None
    best: Spread | None = None
    cautions: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.group.label

    def ratio(self, key: str) -> float | None:
        """What this group costs in times its baseline; None for the baseline itself or where either is missing.

        Over the seeds that both have, if there are any: seeds may have run on different machines.
        """
        if self.baseline is None:
            return None
        ours, other = _by_seed(self.group.runs, COSTS[key]), _by_seed(self.baseline.group.runs, COSTS[key])
        if common := ours.keys() & other.keys():
            ours, other = ({seed: values[seed] for seed in common} for values in (ours, other))
        if not ours or not any(other.values()):
            return None
        return statistics.fmean(ours.values()) / statistics.fmean(other.values())


@dataclass
class Comparison:
    """Everything the pages say about the counted runs, and the list of the others."""

    metric: Metric
    train_metric: Metric
    best_metric: Metric
    rows: list[Row]
    left_out: list[Run]
    following: list[str]
    baseline: str

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.group.runs]

    @property
    def not_started(self) -> list[Run]:
        """Those of the runs left out that a sweep has planned, and no more."""
        return [run for run in self.left_out if run.status == "not started"]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0].group.columns) if self.rows else []


def _mean(value: Spread | float | None) -> float | None:
    return value.mean if isinstance(value, Spread) else value


def choose_metric(runs: Sequence[Run], asked: str | None) -> Metric:
    """The figure that the report compares.

    Raises:
        ReportError: no finished run has the figure that was asked for.
    """
    known = {name for run in runs for name in run.figures}
    if asked is not None:
        if runs and asked not in known:
            raise ReportError(f"metric={asked}: no finished run has this figure; there are {', '.join(sorted(known))}.")
        return Metric(asked)
    counts = {name: sum(name in run.figures for run in runs) for name in METRICS_BY_PREFERENCE}
    most = max(counts.values(), default=0)
    found = [name for name, count in counts.items() if count == most and count]
    return Metric(found[0] if found else min(known, default="test/top1"))


def compare(runs: Sequence[Run], metric: str | None = None, baseline: str | None = None) -> Comparison:
    """Sort the runs into groups and compare each group with its static twin, or all with one group.

    Args:
        metric: name of the figure, such as "test/top1"; None chooses one.
        baseline: settings of the group that all others are compared with, `key=value,key=value`; None is the static
            twin of each: same everything but the experts.
    """
    for run in runs:
        run.reason = why_not(run)
    finished = [run for run in runs if not run.reason]
    chosen = choose_metric(finished, metric)
    for run in finished:
        value = run.figure(chosen.name)
        if value is None and chosen.name not in run.figure_names:
            run.reason = f"finished, but has no figure {chosen.name}"
        elif value is None or not math.isfinite(value):
            run.reason = f"finished, but its {chosen.name} is not a finite number"
    groups = make_groups([run for run in finished if not run.reason])
    following = name_groups(groups)
    leaf = chosen.name.rsplit("/", 1)[-1]
    train = Metric(f"train/{leaf}" if any(f"train/{leaf}" in run.figures for run in finished) else "train/loss")
    best = Metric(f"val/{leaf}")
    rows = [_row(group, chosen, train, best) for group in groups]
    said = _pair(rows, chosen, train, baseline)
    return Comparison(chosen, train, best, rows, [run for run in runs if run.reason], following, said)


def _row(group: Group, metric: Metric, train: Metric, best: Metric) -> Row:
    runs = group.runs
    value = _spread(runs, lambda run: value_of(run, metric))
    assert value is not None  # a group has a run
    costs = {key: _spread(runs, value) for key, value in COSTS.items()}
    return Row(
        group,
        value,
        params=_mean(costs["params"]),
        madds=_mean(costs["madds"]),
        images_per_second=costs["images_per_second"],
        seconds_per_epoch=costs["seconds_per_epoch"],
        cpu_seconds_per_epoch=costs["cpu_seconds_per_epoch"],
        peak_memory_mb=costs["peak_memory_mb"],
        train=_spread(runs, lambda run: _scaled(train, run.figure(train.name))),
        best=_spread(runs, lambda run: _scaled(best, run.best.get(best.name))),
        cautions=_cautions(runs),
    )


def value_of(run: Run, metric: Metric) -> float:
    """The compared figure, scaled, of a run that counts: it has one."""
    value = run.figure(metric.name)
    assert value is not None
    return metric.scaled(value)


def _scaled(metric: Metric, value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else metric.scaled(value)


def seconds_per_epoch(run: Run, key: str = "seconds") -> float | None:
    """Wall or CPU time of the training over its epochs, validation included."""
    seconds, epochs = run.number(key), run.number("epochs")
    return seconds / epochs if seconds is not None and epochs else None


COSTS: Mapping[str, Callable[[Run], float | None]] = {
    "params": lambda run: run.number("model.params"),
    "madds": lambda run: run.number("model.madds"),
    "images_per_second": lambda run: run.number("images_per_second"),
    "seconds_per_epoch": seconds_per_epoch,
    "cpu_seconds_per_epoch": lambda run: seconds_per_epoch(run, "cpu_seconds"),
    "peak_memory_mb": lambda run: run.number("peak_memory_mb"),
}


def _by_seed(runs: Sequence[Run], value: Callable[[Run], float | None]) -> dict[str, float]:
    return {show(run.seed): found for run in runs if (found := value(run)) is not None}


def _spread(runs: Sequence[Run], value: Callable[[Run], float | None]) -> Spread | None:
    return spread([found for run in runs if (found := value(run)) is not None])


def _cautions(runs: Sequence[Run]) -> list[str]:
    """What else differs between runs that are averaged."""
    names = {"commit": "commits", "device": "devices", "threads": "numbers of threads"}
    found = []
    for key, plural in names.items():
        values = sorted({str(run.result[key]) for run in runs if run.result.get(key) is not None})
        if len(values) > 1:
            found.append(f"runs of {len(values)} {plural} ({', '.join(values)})")
    return found


def _pair(rows: list[Row], metric: Metric, train: Metric, baseline: str | None) -> str:
    """Give each row its baseline and differences; returns the baseline in words."""
    twins: dict[str, Row | None] = {}
    for row in rows:
        for key in twin_identities(row.group.settings) if row.group.is_static else ():
            twins[key] = None if key in twins else row  # of two that start from different weights, neither
    fixed = _find_baseline(rows, baseline) if baseline else None
    for row in rows:
        found = [] if row.group.is_static else [twins.get(key) for key in twin_identities(row.group.settings)]
        other = fixed or next((twin for twin in found if twin is not None), None)
        if other is None or other is row:
            continue
        row.baseline = other
        row.difference = _difference(row, other, metric)
        row.train_difference = _difference(row, other, train)
    if fixed:
        return fixed.label
    return "the static twin"


def pairs_of(row: Row, other: Row, metric: Metric) -> dict[str, tuple[float, float]]:
    """Figures (a row's, another's), scaled, by the seeds that have both."""
    theirs = {show(run.seed): run.figure(metric.name) for run in other.group.runs}
    pairs = {}
    for run in row.group.runs:
        ours, twin = _scaled(metric, run.figure(metric.name)), _scaled(metric, theirs.get(show(run.seed)))
        if ours is not None and twin is not None:
            pairs[show(run.seed)] = (ours, twin)
    return pairs


def _difference(row: Row, other: Row, metric: Metric) -> Difference | None:
    return paired_difference(list(pairs_of(row, other, metric).values()))


def _find_baseline(rows: list[Row], baseline: str) -> Row:
    wanted = dict(part.split("=", 1) for part in baseline.split(",") if "=" in part)
    if not wanted:
        raise ReportError(f"baseline={baseline}: give settings, as in baseline=condconv.experts=0,model.width=0.25.")
    found = [row for row in rows if all(_matches(row.group, key, value) for key, value in wanted.items())]
    if len(found) != 1:
        labels = "; ".join(row.label for row in (found or rows)[:12])
        raise ReportError(
            f"baseline={baseline} fits {len(found)} groups of runs, and must fit one. "
            f"{'They are' if found else 'There are'}: {labels}."
        )
    return found[0]


def _matches(group: Group, key: str, value: str) -> bool:
    named = [name for name in group.settings if name == key or name.endswith(f".{key}")]
    return any(show(group.settings[name]) == value for name in named)
