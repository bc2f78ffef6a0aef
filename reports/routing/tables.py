"""The numbers of a routing analysis as CSV files, one subject each; indices count from 0."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from condconv.similarity import Similarity
from reports.routing.figures import principal_components
from reports.routing.findings import Findings

Row = Sequence[Any]


def _layers(found: Findings) -> Iterator[Row]:
    yield (
        "depth", "layer", "experts", "images", "entropy", "mean_entropy", "between_class_share", "mean_std",
        "saturation", "dead_experts", "bimodality", "expert_bimodality",
    )  # fmt: skip
    for depth, router in enumerate(found.survey.routers):
        summary, classes = router.summary, router.classes
        yield (
            depth, router.name, router.num_experts, summary.num_examples, summary.entropy, summary.mean_entropy,
            classes.between_all if classes else math.nan, float(summary.std.mean()), summary.saturation,
            summary.num_dead, summary.bimodality, summary.expert_bimodality,
        )  # fmt: skip


def _experts(found: Findings) -> Iterator[Row]:
    yield "layer", "expert", "mean", "std", "minimum", "maximum", "dead", "between_class_share", "strongest_class"
    for router in found.survey.routers:
        summary, classes = router.summary, router.classes
        for expert in range(router.num_experts):
            strongest, share = "", math.nan
            if classes is not None:
                strongest = found.class_name(int(classes.mean[:, expert].nan_to_num(-1).argmax()))
                share = float(classes.between[expert])
            values = (float(x[expert]) for x in (summary.mean, summary.std, summary.minimum, summary.maximum))
            yield router.name, expert, *values, int(expert in summary.dead), share, strongest


def _classes(found: Findings) -> Iterator[Row]:
    yield "layer", "expert", "class", "images", "mean", "std"
    for router in found.survey.routers:
        if router.classes is None:
            continue
        counts, mean, std = router.classes.counts.tolist(), router.classes.mean.tolist(), router.classes.std.tolist()
        for label, count in enumerate(counts):
            for expert in range(router.num_experts) if count else ():
                yield router.name, expert, found.class_name(label), count, mean[label][expert], std[label][expert]


def _histograms(found: Findings) -> Iterator[Row]:
    bins = found.survey.routers[0].summary.histogram.shape[1]
    yield "layer", "expert", *(f"from_{position / bins:.3g}" for position in range(bins))
    for router in found.survey.routers:
        for expert, counts in enumerate(router.summary.histogram.tolist()):
            yield router.name, expert, *counts


def _top_images(found: Findings) -> Iterator[Row]:
    yield "layer", "expert", "rank", "image", "class", "weight"
    for router in found.survey.routers:
        for expert in range(router.num_experts):
            pairs = zip(router.top_indices[expert].tolist(), router.top_weights[expert].tolist(), strict=True)
            for rank, (index, weight) in enumerate(pairs, 1):
                if index >= 0:  # fewer images than places have been seen
                    yield router.name, expert, rank, index, found.class_name(found.survey.labels[index]), weight


def _pairs(kind: str, similarities: Iterable[Similarity]) -> Iterator[Row]:
    for each in similarities:
        cosine = each.cosine.tolist()
        for first in range(len(cosine)):
            for second in range(first + 1, len(cosine)):
                yield kind, each.name, first, second, cosine[first][second]


def _similarity(found: Findings) -> Iterator[Row]:
    yield "of", "layer", "first_expert", "second_expert", "cosine"
    yield from _pairs("kernels", found.kernels)
    yield from _pairs("router rows", found.routers)


def _depths(found: Findings) -> Iterator[Row]:
    names = [router.name for router in found.survey.routers]
    yield "layer", *names
    for name, row in zip(names, found.depths.tolist(), strict=True):
        yield name, *row


def _embedding(found: Findings) -> Iterator[Row]:
    yield "layer", "image", "class", "first", "second"
    labels = [found.class_name(label) for label in found.survey.sample_labels.tolist()]
    for layer in found.layers:
        points, _ = principal_components(found.survey.sample_of(layer))
        for index, (label, (first, second)) in enumerate(zip(labels, points.tolist(), strict=True)):
            yield layer, index, label, first, second


def _ablations(found: Findings) -> Iterator[Row]:
    yield (
        "change", "kind", "layer", "k", "expert", "sum_kept", "images", "top1", "difference", "interval_95", "loss",
        "same_prediction",
    )  # fmt: skip
    for result in found.ablations:
        what: Row = ("none", "", "", "", "")
        if result.ablation is not None:
            ablation = result.ablation
            expert = ablation.expert if ablation.expert >= 0 else ""
            what = (ablation.kind, ablation.layer or "all", ablation.k or "", expert, int(ablation.renormalized))
        yield (
            result.name, *what, result.num_examples, result.accuracy, result.difference, result.interval, result.loss,
            result.agreement,
        )  # fmt: skip


TABLES: dict[str, Callable[[Findings], Iterator[Row]]] = {
    "layers": _layers,
    "experts": _experts,
    "classes": _classes,
    "histograms": _histograms,
    "top_images": _top_images,
    "similarity": _similarity,
    "layer_similarity": _depths,
    "embedding": _embedding,
    "ablations": _ablations,
}


def write_tables(found: Findings, folder: Path) -> list[Path]:
    """Write `<folder>/<name>.csv` of every subject; undefined values are empty cells, floats have six digits."""
    written: list[Path] = []
    for name, rows in TABLES.items():
        if name == "ablations" and not found.ablations:
            continue
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_cell(value) for value in row] for row in rows(found))
        written.append(path)
    return written


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
