"""What was found, in sentences made from the numbers; what went against CondConv stands first."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from reports.comparison import Comparison, Metric, value_of
from reports.groups import EXPERTS, experts_label, show
from reports.statistics import Difference

KINDS = ("summary", "worse", "unclear", "single", "better", "fact", "caution", "cost")
"""In the order in which they are told."""


MANY = 7
UNEVEN = 0.1


@dataclass(frozen=True)
class Finding:
    """One sentence and what kind of news it is (`KINDS`)."""

    kind: str
    text: str


def findings(comparison: Comparison) -> list[Finding]:
    """All sentences, bad news first."""
    if not comparison.rows:
        return [Finding("caution", "No run counts: nothing can be compared.")]
    found = [
        *_summary(comparison),
        *_differences(comparison),
        *_cautions(comparison),
        *_fit(comparison),
        *_costs(comparison),
        *_means(comparison),
    ]
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def interval_text(metric: Metric, found: Difference) -> str:
    """As in "+0.40 points (95 % interval −0.10 to +0.90, n = 3)"."""
    unit = " points" if metric.is_share else ""
    if found.low is None or found.high is None:
        return f"{metric.text(found.mean, True)}{unit} (one pair of runs: no interval)"
    interval = f"95 % interval {metric.text(found.low, True)} to {metric.text(found.high, True)}"
    return f"{metric.text(found.mean, True)}{unit} ({interval}, n = {found.n})"


def _summary(comparison: Comparison) -> list[Finding]:
    metric = comparison.metric
    kinds = [metric.better(row.difference) for row in comparison.rows if row.difference is not None]
    if not kinds:
        return []
    words = (
        ("worse", "worse"),
        ("unclear", "without a difference shown"),
        ("better", "better"),
        ("single", "one seed"),
    )
    counts = ", ".join(f"{kinds.count(kind)} {word}" for kind, word in words if kind in kinds or kind != "single")
    many = f"{len(kinds)} group{'s' if len(kinds) > 1 else ''}"
    return [Finding("summary", f"{many} compared with {comparison.baseline} by {metric.name}: {counts}.")]


def _differences(comparison: Comparison) -> list[Finding]:
    metric, found = comparison.metric, []
    endings = {
        "worse": "worse",
        "better": "better",
        "unclear": "no difference shown",
        "single": "one seed says nothing about noise",
    }
    unclear = [row for row in comparison.rows if row.difference and metric.better(row.difference) == "unclear"]
    if len(unclear) > MANY:  # one sentence, or the others drown in them
        each = [f"{row.label} {interval_text(metric, row.difference)}" for row in unclear if row.difference]
        text = f"No difference in {metric.name} to {comparison.baseline} shown for {len(unclear)} groups"
        found.append(Finding("unclear", f"{text}: {_list(each, 12)}."))
    for row in comparison.rows:
        if row.difference is None or (len(unclear) > MANY and row in unclear):
            continue
        kind = metric.better(row.difference)
        text = f"{row.label}: {metric.name} {interval_text(metric, row.difference)} to {comparison.baseline}: "
        found.append(Finding(kind, f"{text}{endings[kind]}."))
    return found


def _cautions(comparison: Comparison) -> list[Finding]:
    metric, rows, found = comparison.metric, comparison.rows, []
    without = [row.label for row in rows if row.baseline is None and not row.group.is_static]
    if comparison.baseline == "the static twin" and without:
        found.append(f"No static run with the same settings and seeds, so nothing is compared: {_list(without)}.")
    unpaired = [row.label for row in rows if row.baseline is not None and row.difference is None]
    if unpaired:
        found.append(f"The runs and those of {comparison.baseline} have no seed in common: {_list(unpaired)}.")
    partly = [row for row in rows if row.difference is not None and row.difference.n < row.value.n]
    if partly:
        pairs = _list([f"{row.label} ({row.difference.n} of {row.value.n})" for row in partly if row.difference])
        found.append(f"Not every run has a partner of its seed; only pairs are compared: {pairs}.")
    wider = [
        row for row in rows if row.baseline and row.difference is not None and row.difference.n < row.baseline.value.n
    ]
    if wider:
        text = "Means of what they are compared with are over more seeds, so they do not differ by the difference shown"
        found.append(f"{text}: {_list([row.label for row in wider])}.")
    if many := len(comparison.left_out) - len(comparison.not_started):
        found.append(f"{many} run{'s' if many > 1 else ''} left out, not averaged in; the reasons are listed below.")
    for row in rows:
        found += [f"{row.label}: {caution}." for caution in row.cautions]
    for key, words in (("commit", "commits"), ("device", "devices"), ("threads", "numbers of threads")):
        values = sorted({str(run.result[key]) for run in comparison.runs if run.result.get(key) is not None})
        if len(values) > 1 and not any(words in caution for row in rows for caution in row.cautions):
            found.append(f"The groups come from {len(values)} {words}: {_list(values)}.")
    if any(run.result.get("dirty") for run in comparison.runs):
        found.append("Some runs were made with uncommitted changes in the code.")
    uneven = [
        (t.sd / t.mean, row.label) for row in rows if (t := row.seconds_per_epoch) and t.sd is not None and t.mean
    ]
    if uneven and max(uneven)[0] > UNEVEN:
        share, label = max(uneven)
        text = f"Times vary by up to {100 * share:.0f} % (standard deviation) between runs of one group ({label}): "
        found.append(text + "the machine did other work too, and ratios of times say little.")
    equal = [row.label for row in rows if row.difference is not None and row.difference.half_width == 0]
    if equal:
        text = "All pairs differ by the same amount, so the interval has no width and says nothing about noise"
        found.append(f"{text}: {_list(equal)}.")
    judged = [row.difference for row in rows if row.difference is not None and row.difference.half_width is not None]
    if judged:
        half = statistics.median(d.half_width for d in judged if d.half_width is not None)
        unit = " points" if metric.is_share else ""
        text = f"With these seeds an interval reaches {metric.text(half)}{unit} to each side (median): "
        text += "smaller effects cannot be seen in this data."
        if len(judged) > 1:
            text += f" One in twenty such intervals misses the true value by chance; here are {len(judged)}."
        found.append(text)
    return [Finding("caution", text) for text in found]


def _fit(comparison: Comparison) -> list[Finding]:
    """Does the capacity go into the training images?"""
    train, metric, found = comparison.train_metric, comparison.metric, []
    if train.is_share != metric.is_share:
        return []
    for row in comparison.rows:
        ours, evaluated = row.train_difference, row.difference
        if ours is None or evaluated is None or ours.low is None or evaluated.low is None:
            continue
        if train.better(ours) == "better" and metric.better(evaluated) != "better":
            found.append(f"{row.label} {interval_text(train, ours)}")
    if not found:
        return []
    text = (
        f"The training images are fitted better ({train.name}) without a gain shown in {metric.name}: {_list(found)}."
    )
    return [Finding("unclear", text)]


def _costs(comparison: Comparison) -> list[Finding]:
    """One sentence for each kind of cost."""
    found = []
    words = (
        ("seconds_per_epoch", "Time per epoch"),
        ("cpu_seconds_per_epoch", "CPU time per epoch"),
        ("images_per_second", "Images per second in training"),
        ("peak_memory_mb", "Peak memory"),
        ("params", "Parameters"),
        ("madds", "MADDs"),
    )
    for key, name in words:
        ratios = [(row.label, row.ratio(key)) for row in comparison.rows]
        each = [f"{label} {ratio:.2f} ×" for label, ratio in ratios if ratio is not None]
        if each:
            found.append(Finding("cost", f"{name}, times {comparison.baseline}'s: {_list(each, 12)}."))
    return found


def _means(comparison: Comparison) -> list[Finding]:
    """The means over experts in order, over the seeds that all have, where experts alone vary."""
    metric, rows = comparison.metric, comparison.rows
    if comparison.columns != [EXPERTS] or len(rows) < 3:
        return []
    seeds = set.intersection(*({show(run.seed) for run in row.group.runs} for row in rows))
    if not seeds:
        return []
    values = [
        statistics.fmean(value_of(run, metric) for run in row.group.runs if show(run.seed) in seeds) for row in rows
    ]
    means = ", ".join(
        f"{experts_label(row.group.experts)} {metric.text(value)}" for row, value in zip(rows, values, strict=True)
    )
    rising = all(a <= b for a, b in itertools.pairwise(values))
    falling = all(a >= b for a, b in itertools.pairwise(values))
    shape = (
        "rise with every step" if rising else "fall with every step" if falling else "neither only rise nor only fall"
    )
    which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(sorted(seeds))}"
    return [Finding("fact", f"Means of {metric.title} by experts ({which}) {shape}: {means}.")]


def _list(words: Sequence[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more
