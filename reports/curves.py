"""Learning curves: training and evaluation over epochs, mean and range over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from reports.comparison import Comparison, Metric
from reports.statistics import spread
from reports.svg import Chart, Picture, axes, padded

MAX_POINTS = 150
MAX_CURVES = 16


def learning_curves(comparison: Comparison) -> list[Chart]:
    """Training and evaluation, the compared figure and the loss: mean over seeds, with the range of the runs."""
    metric, found = comparison.metric, []
    leaf = metric.name.rsplit("/", 1)[-1]
    stage = metric.name.split("/", 1)[0].replace("test", "val")
    names = dict.fromkeys([f"train/{leaf}", f"{stage}/{leaf}", f"val/{leaf}", "train/loss", "val/loss"])
    for name in names:
        chart = _curves(comparison, Metric(name))
        if chart is not None:
            found.append(chart)
    return found


def _curves(comparison: Comparison, metric: Metric) -> Chart | None:
    lines = []
    for i, row in enumerate(comparison.rows):
        points = mean_curve([run.curves.get(metric.name, []) for run in row.group.runs], metric)
        if len(points) > 1:
            lines.append((i, row, points))
    if not lines:
        return None
    hidden = len(lines) - MAX_CURVES
    if hidden > 0:  # the ends of the order and evenly between: neither the best nor the first alone
        lines = [lines[round(k * (len(lines) - 1) / (MAX_CURVES - 1))] for k in range(MAX_CURVES)]
    xs = [x for _, _, points in lines for x, *_ in points]
    ys = [value for _, _, points in lines for _, low, _, high in points for value in (low, high)]
    x, y = axes(("epochs", min(xs), max(xs)), (metric.title, *padded(ys, 0.04)))
    x.whole = True
    picture = Picture(f"{metric.title} over epochs", x, y)
    picture.frame()
    picture.text(6, 14, metric.title, "title")
    for i, _, points in lines:
        picture.band([(at, low, high) for at, low, _, high in points], i)
    for i, row, points in lines:
        kind = "line static" if row.group.is_static else "line"
        end = metric.text(points[-1][2])
        picture.line([(at, mean) for at, _, mean, _ in points], i, f"{row.label}: {end} at the end", kind)
    caption = f"{metric.title} over epochs: mean of the seeds, shaded from the lowest to the highest run."
    if metric.name.startswith("train/"):
        caption += " Measured while training, on augmented images where the recipe augments."
    if hidden > 0:
        caption += f" {hidden} of the groups are left out of this picture."
    marks = [f"{at:g}" for at in _marks(lines[0][2])]
    numbers = [
        [row.label, *(next((metric.text(m) for at, _, m, _ in points if f"{at:g}" == mark), "–") for mark in marks)]
        for _, row, points in lines
    ]
    slug = "curve-" + metric.name.replace("/", "-").replace("_", "-")
    title = f"{'Training' if metric.name.startswith('train/') else 'Evaluation'}: {metric.name}"
    header = ["group", *(f"epoch {mark}" for mark in marks)]
    return Chart(slug, title, caption, picture.svg(), header, numbers, [i for i, _, _ in lines])


def _marks(points: Sequence[tuple[float, float, float, float]]) -> list[float]:
    """Where a curve is quoted: five places from the first to the last."""
    return list(dict.fromkeys(points[round(k * (len(points) - 1) / 4)][0] for k in range(5)))


def mean_curve(
    curves: Sequence[Sequence[tuple[float, float]]], metric: Metric
) -> list[tuple[float, float, float, float]]:
    """(x, lowest, mean, highest) where every run with the curve has a point, the last among at most `MAX_POINTS`."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    by_x: dict[float, list[float]] = {}
    for curve in curves:
        for x, value in curve:
            by_x.setdefault(x, []).append(metric.scaled(value))
    points = []
    for x, values in sorted(by_x.items()):
        found = spread(values)
        if found is not None and found.n == len(curves):
            points.append((x, min(values), found.mean, max(values)))
    stride = -(-(len(points) - 1) // (MAX_POINTS - 1))
    return [*points[:-1:stride], points[-1]] if stride > 1 else points
