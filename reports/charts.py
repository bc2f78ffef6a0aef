"""The charts of a report: differences with intervals, the figure against cost, learning curves, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from reports.comparison import Comparison, Metric, Row, value_of
from reports.curves import learning_curves
from reports.groups import EXPERTS, experts_label, show, sort_key
from reports.svg import BOTTOM, RIGHT, TOP, WIDTH, Axis, Chart, Picture, axes, padded, tick_label

LABEL = 31
"""Characters that fit beside a picture."""


def charts_of(comparison: Comparison) -> list[Chart]:
    """All charts for which there are numbers."""
    rows = comparison.rows
    makers: tuple[Callable[[Comparison], Chart | None], ...] = (effects, against_experts, against_madds, against_params)
    found = [make(comparison) for make in makers] if rows else []
    if rows and found[0] is None:
        found[0] = means(comparison)
    return [chart for chart in (*found, *learning_curves(comparison), *costs(comparison)) if chart is not None]


def value_text(metric: Metric, row: Row) -> str:
    """As in "61.20 ± 0.35 % (n = 3)"."""
    sd = f" ± {metric.text(row.value.sd)}" if row.value.sd is not None else ""
    return f"{metric.text(row.value.mean)}{sd}{' ' + metric.unit if metric.unit else ''} (n = {row.value.n})"


def difference_text(metric: Metric, row: Row) -> str:
    """As in "+0.40 [−0.10, +0.90], n = 3"; empty without a baseline."""
    found = row.difference
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{metric.text(found.low, True)}, {metric.text(found.high, True)}]"
    return f"{metric.text(found.mean, True)}{interval}, n = {found.n}"


def effects(comparison: Comparison) -> Chart | None:
    """Paired differences to the baseline, one line for each group."""
    metric = comparison.metric
    shown = [(i, row) for i, row in enumerate(comparison.rows) if row.difference is not None]
    if not shown:
        return None
    ends = [0.0]
    for _, row in shown:
        found = row.difference
        assert found is not None
        ends += [found.mean] + [end for end in (found.low, found.high) if end is not None]
    names = _beside([row.label for _, row in shown])
    line, left = 26, _room(names)
    height = TOP + line * len(shown) + BOTTOM
    unit = "points" if metric.is_share else metric.name
    x = Axis(f"difference in {metric.name} ({unit})", *padded(ends), left, WIDTH - RIGHT)
    y = Axis("", -0.5, len(shown) - 0.5, height - BOTTOM, TOP, labels=[" "] * len(shown))
    picture = Picture(f"Paired differences in {metric.name} to {comparison.baseline}", x, y, height=height)
    picture.frame(grid_x=True)
    picture.bar(0, -0.5, 0, len(shown) - 0.5, -1, "zero")
    for place, (i, row) in enumerate(reversed(shown)):
        found = row.difference
        assert found is not None
        picture.text(left - 10, y(place) + 4, names[row.label], "name end")
        if found.low is not None and found.high is not None:
            picture.bar(found.low, place, found.high, place, i, "interval")
        picture.dot(found.mean, place, i, f"{row.label}: {difference_text(metric, row)}", "dot", 5)
    caption = (
        f"Difference in {metric.name} to {comparison.baseline}, paired by seed: mean and 95 % t interval. "
        f"{'Left' if not metric.lower_is_better else 'Right'} of the line is worse. A dot alone is one pair."
    )
    numbers = [[row.label, difference_text(metric, row)] for _, row in shown]
    return Chart("effects", "Difference to the baseline", caption, picture.svg(), ["group", "difference"], numbers)


def means(comparison: Comparison) -> Chart | None:
    """Mean and deviation of each group, for groups that have nothing to be compared with."""
    metric, rows = comparison.metric, comparison.rows
    names = _beside([row.label for row in rows])
    line, left = 26, _room(names)
    height = TOP + line * len(rows) + BOTTOM
    x = Axis(metric.title, *_spans(metric, rows), left, WIDTH - RIGHT)
    y = Axis("", -0.5, len(rows) - 0.5, height - BOTTOM, TOP, labels=[" "] * len(rows))
    picture = Picture(f"{metric.title} by group", x, y, height=height)
    picture.frame(grid_x=True)
    for place, (i, row) in enumerate(reversed(list(enumerate(rows)))):
        picture.text(left - 10, y(place) + 4, names[row.label], "name end")
        if row.value.sd is not None:
            picture.bar(row.value.mean - row.value.sd, place, row.value.mean + row.value.sd, place, i, "interval")
        picture.dot(row.value.mean, place, i, f"{row.label}: {value_text(metric, row)}", "dot", 5)
    caption = f"{metric.title}: mean and standard deviation over seeds."
    numbers = [[row.label, value_text(metric, row)] for row in rows]
    return Chart("means", "Means", caption, picture.svg(), ["group", metric.title], numbers)


def _beside(labels: Sequence[str]) -> dict[str, str]:
    """Labels that fit beside a picture, by the whole labels.

    Where one is too long, all go without the parts that they share; one that is still too long keeps its first part and
    as much of its end as fits.
    """
    parts = {label: label.split(", ") for label in labels}
    if len(parts) > 1 and max(map(len, labels)) > LABEL:
        shared = set.intersection(*map(set, parts.values()))
        parts = {label: [part for part in each if part not in shared] or each for label, each in parts.items()}
    return {label: _cut(each) for label, each in parts.items()}


def _cut(parts: list[str]) -> str:
    whole, first = ", ".join(parts), parts[0]
    if len(whole) <= LABEL:
        return whole
    for begin in range(2, len(parts)):
        kept = f"{first} … {', '.join(parts[begin:])}"
        if len(kept) <= LABEL:
            return kept
    start = first if len(first) < LABEL // 2 else first[: LABEL // 3]
    return f"{start}…{whole[len(start) + 1 - LABEL :]}"


def _room(names: dict[str, str]) -> float:
    """Pixels left of a picture for its labels."""
    return min(40 + 6.4 * max(map(len, names.values())), 236)


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Rows that differ in experts alone, under what they share."""
    found: dict[str, list[tuple[int, Row]]] = {}
    for i, row in enumerate(rows):
        others = {key: value for key, value in row.group.columns.items() if key != EXPERTS}
        own = {k: v for k, v in others.items() if not k.startswith("condconv.")} if row.group.is_static else others
        found.setdefault(show([f"{key}={show(value)}" for key, value in own.items()]), []).append((i, row))
    return found


def _points(picture: Picture, metric: Metric, placed: Iterable[tuple[float, int, Row]]) -> None:
    """Mean, deviation and every run of each group; a faint line joins the groups of a series."""
    placed = list(placed)
    if len(placed) > 1:
        picture.line([(x, row.value.mean) for x, _, row in placed], placed[0][1], "", "thread")
    for x, i, row in placed:
        if row.value.sd is not None:
            picture.bar(x, row.value.mean - row.value.sd, x, row.value.mean + row.value.sd, i)
        for run in row.group.runs:
            value = value_of(run, metric)
            picture.dot(x, value, i, f"{row.label}, seed {show(run.seed)}: {metric.text(value)}", "run", 2.2)
        picture.dot(x, row.value.mean, i, f"{row.label}: {value_text(metric, row)}")


def _spans(metric: Metric, rows: Sequence[Row]) -> tuple[float, float]:
    values = [value_of(run, metric) for row in rows for run in row.group.runs]
    values += [row.value.mean + sign * (row.value.sd or 0) for row in rows for sign in (-1, 1)]
    return padded(values)


def against_experts(comparison: Comparison) -> Chart | None:
    """The figure over the number of experts, evenly spaced, one series for each of the other settings."""
    metric, rows = comparison.metric, comparison.rows
    levels = sorted({row.group.experts for row in rows if isinstance(row.group.experts, int | float)}, key=sort_key)
    if len(levels) < 2:
        return None
    rows = [row for row in rows if row.group.experts in levels]
    x, y = axes(("experts", -0.5, len(levels) - 0.5), (metric.title, *_spans(metric, rows)))
    x.labels = ["static" if level == 0 else show(level) for level in levels]
    picture = Picture(f"{metric.title} against the number of experts", x, y)
    picture.frame()
    picture.text(6, 14, metric.title, "title")
    series = _series(comparison.rows)
    for k, members in enumerate(series.values()):
        aside = min(0.6 / len(series), 0.12) * (k - (len(series) - 1) / 2)  # series stand side by side
        placed = [(levels.index(row.group.experts) + aside, i, row) for i, row in members if row in rows]
        _points(picture, metric, placed)
    caption = f"{metric.title} against experts: mean and standard deviation over seeds; small dots are single runs."
    numbers = [[row.label, experts_label(row.group.experts), value_text(metric, row)] for row in rows]
    legend = list(range(len(comparison.rows))) if len(series) > 1 else []
    header = ["group", "experts", metric.title]
    return Chart("experts", "Against experts", caption, picture.svg(), header, numbers, legend)


def against_madds(comparison: Comparison) -> Chart | None:
    """The figure over multiply-adds per image."""
    return _against(comparison, "madds", "MADDs", "multiply-adds per image")


def against_params(comparison: Comparison) -> Chart | None:
    """The figure over parameters."""
    return _against(comparison, "params", "Parameters", "parameters")


def _against(comparison: Comparison, key: str, title: str, words: str) -> Chart | None:
    metric = comparison.metric
    values = {i: getattr(row, key) for i, row in enumerate(comparison.rows) if getattr(row, key)}
    if len(set(values.values())) < 2:
        return None
    low, high = min(values.values()), max(values.values())
    log = high / low > 8
    ends = (low / 1.15, high * 1.15) if log else padded([low, high])
    rows = [comparison.rows[i] for i in values]
    x, y = axes((words + (" (logarithmic)" if log else ""), *ends), (metric.title, *_spans(metric, rows)), log_x=log)
    picture = Picture(f"{metric.title} against {words}", x, y)
    picture.frame()
    picture.text(6, 14, metric.title, "title")
    for members in _series(comparison.rows).values():
        placed = sorted(((values[i], i, row) for i, row in members if i in values), key=lambda each: each[0])
        _points(picture, metric, placed)
    caption = f"{metric.title} against {words}: mean and standard deviation over seeds; small dots are single runs."
    numbers = [[row.label, count(getattr(row, key)), value_text(metric, row)] for row in rows]
    legend = list(values)
    return Chart(key, f"Against {title}", caption, picture.svg(), ["group", words, metric.title], numbers, legend)


def count(value: float | None) -> str:
    """419126 -> 419.1k."""
    if value is None:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def costs(comparison: Comparison) -> list[Chart]:
    """Time of an epoch and peak memory, beside the baseline's."""
    kinds = (
        ("seconds_per_epoch", "Time of an epoch", "seconds per epoch, validation included"),
        ("peak_memory_mb", "Peak memory", "peak memory in MB"),
    )
    return [chart for kind in kinds if (chart := _cost(comparison, *kind)) is not None]


def _cost(comparison: Comparison, key: str, title: str, words: str) -> Chart | None:
    shown = [(i, row, value) for i, row in enumerate(comparison.rows) if (value := getattr(row, key)) is not None]
    if len(shown) < 2:
        return None
    names = _beside([row.label for _, row, _ in shown])
    line, left = 24, _room(names)
    height = TOP + line * len(shown) + BOTTOM
    x = Axis(words, 0, 1.4 * max(value.mean for _, _, value in shown), left, WIDTH - RIGHT)
    y = Axis("", -0.5, len(shown) - 0.5, height - BOTTOM, TOP, labels=[" "] * len(shown))
    picture = Picture(f"{title} by group", x, y, height=height)
    picture.frame(grid_x=True)
    numbers = []
    for place, (i, row, value) in enumerate(reversed(shown)):
        ratio = row.ratio(key)
        beside = f" ({ratio:.2f} ×)" if ratio is not None else ""
        text = f"{tick_label(float(f'{value.mean:.3g}'), [])}{beside}"
        picture.text(left - 10, y(place) + 4, names[row.label], "name end")
        tip = f"{row.label}: {text}"
        width, top = x(value.mean) - left, y(place) - 7
        rectangle = '<rect class="amount c{}" data-g="{}" data-tip="{}" x="{}" y="{}" width="{}" height="14"/>'
        picture.add(rectangle, i, i, tip, left, top, round(width, 1))
        picture.text(x(value.mean) + 5, y(place) + 4, text, "tick")
        numbers.append([row.label, text])
    caption = f"{title}: {words}, mean over seeds; in brackets times {comparison.baseline}, over the seeds of both."
    return Chart(key.replace("_", "-"), title, caption, picture.svg(), ["group", words], numbers[::-1])
