"""COCO's figures for boxes: detections in COCO's results format, gathered over the processes, measured once.

The figures are those of pycocotools to the sixth digit and beyond, computed by faster-coco-eval, which does the same
in C++ in a fifth of the time. A figure without any ground truth to measure it on is -1, as there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

# In the order of pycocotools' `stats`.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
UNDEFINED = -1.0

Result = dict[str, Any]


@dataclass(frozen=True)
class CocoFigures:
    """What COCO reports of a set of detections.

    Attributes:
        figures: the twelve of `FIGURES`, 0..1, or -1 where there is nothing to measure.
        per_class: AP of each class by name, in the order of the categories; -1 for a class without ground truth.
        num_images: images that were measured.
    """

    figures: dict[str, float]
    per_class: dict[str, float]
    num_images: int

    def __getitem__(self, name: str) -> float:
        return self.figures[name]


def coco_results(
    image_id: int,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    original_size: tuple[int, int],
    input_size: tuple[int, int],
    category_ids: Sequence[int],
) -> list[Result]:
    """The detections of one image as COCO results, in plain Python numbers.

    Args:
        image_id: COCO's id of the image.
        boxes: `[M, 4]`, (left, top, right, bottom) in pixels of the network's input.
        scores: `[M]`, 0..1.
        labels: `[M]`, 0..num_classes-1.
        original_size: (height, width) of the image file; boxes are scaled to it and clipped.
        input_size: (height, width) of the network's input.
        category_ids: COCO's category id of each label.
    """
    (height, width), (input_height, input_width) = original_size, input_size
    scale = torch.tensor([width / input_width, height / input_height] * 2, dtype=torch.float64)
    limit = torch.tensor([width, height] * 2, dtype=torch.float64)
    corners = torch.minimum((boxes.detach().cpu().double() * scale).clamp(min=0), limit)
    corners[:, 2:] -= corners[:, :2]
    # A thousandth of a pixel, and all that float32 holds of a score: shorter files, and the figures printed are the
    # figures of the file.
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[label]),
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 8),
        }
        for box, score, label in zip(
            corners.tolist(), scores.detach().cpu().double().tolist(), labels.tolist(), strict=True
        )
    ]


def evaluate_detections(
    ground_truth: Mapping[str, Any], results: Sequence[Result], image_ids: Iterable[int]
) -> CocoFigures:
    """The figures of `results` on the images `image_ids`; neither argument is changed.

    Args:
        ground_truth: in COCO's format: `images`, `annotations` (with `area` and `iscrowd`), `categories`.
        results: dicts with `image_id`, `category_id`, `bbox` (left, top, width, height in pixels of the image file)
            and `score`; any number per image, the 100 best of each class count.
        image_ids: the images that were looked at, also those without any detection.

    Raises:
        ValueError: a result is of an unknown image or category, or of an image that is not in `image_ids`, or has a
            number that is not finite.
    """
    ids = sorted(set(image_ids))
    names = category_names(ground_truth["categories"])
    _check(results, {image["id"] for image in ground_truth["images"]}, set(ids), set(names))
    if not ids:
        return CocoFigures(dict.fromkeys(FIGURES, UNDEFINED), dict.fromkeys(names.values(), UNDEFINED), 0)
    chosen = set(ids)
    truth = COCO(
        {
            "info": {},
            "images": [dict(image) for image in ground_truth["images"] if image["id"] in chosen],
            # Numbered anew from 1: with id 0 a box counts as never found (pycocotools marks matches by the id).
            "annotations": [
                {**annotation, "id": number}
                for number, annotation in enumerate(
                    (a for a in ground_truth["annotations"] if a["image_id"] in chosen), start=1
                )
            ],
            "categories": [dict(category) for category in ground_truth["categories"]],
        }
    )
    found = truth.loadRes([dict(result) for result in results])
    evaluator = COCOeval_faster(truth, found, "bbox", print_function=_silent)
    evaluator.params.imgIds = ids
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    # [IoU threshold, recall, class, area range, detections per image]: all areas, 100 detections
    precision = torch.as_tensor(evaluator.eval["precision"])[:, :, :, 0, -1]
    per_class = {
        names[category]: _mean(precision[:, :, position]) for position, category in enumerate(evaluator.params.catIds)
    }
    in_order = {name: per_class[name] for name in names.values()}
    stats = [float(value) for value in evaluator.stats[: len(FIGURES)]]
    return CocoFigures(dict(zip(FIGURES, stats, strict=True)), in_order, len(ids))


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Category id -> name; names that occur twice carry their id, so that each class keeps its own figure."""
    listed = [(int(category["id"]), str(category["name"])) for category in categories]
    count: dict[str, int] = {}
    for _, name in listed:
        count[name] = count.get(name, 0) + 1
    return {number: name if count[name] == 1 else f"{name} ({number})" for number, name in listed}


def gather_results(results: Mapping[int, Sequence[Result]]) -> dict[int, list[Result]]:
    """The results of all processes by image id, sorted by it: on rank 0; an empty dict on the others.

    Goes over the CPU whatever the backend. An image that two processes looked at (samplers pad) counts once, with the
    lowest rank's results.

    Args:
        results: of this process: image id -> its results; an empty list where nothing was found.
    """
    mine = {int(image_id): list(found) for image_id, found in results.items()}
    if not _distributed():
        return dict(sorted(mine.items()))
    with _CpuGroup() as group:
        return _gather(mine, group)


def evaluate_over_ranks(
    ground_truth: Callable[[], Mapping[str, Any]], results: Mapping[int, Sequence[Result]]
) -> tuple[CocoFigures, list[Result]]:
    """The figures over the images of all processes, computed on rank 0 and the same on every process.

    Must be called by all processes together. An error on rank 0 is raised on all of them, so that none waits for ever.

    Args:
        ground_truth: gives what `evaluate_detections` wants; only rank 0 asks for it, as it may be a large file.
        results: of this process, as in `gather_results`; its keys are the images that were looked at.

    Returns:
        The figures, and on rank 0 all results in the order of their image ids (elsewhere an empty list).
    """
    if not _distributed():
        gathered = gather_results(results)
        flat = [result for found in gathered.values() for result in found]
        return evaluate_detections(ground_truth(), flat, gathered), flat
    flat = []
    answer: list[Any] = [None]
    with _CpuGroup() as group:
        gathered = _gather({int(key): list(found) for key, found in results.items()}, group)
        if dist.get_rank() == 0:
            flat = [result for found in gathered.values() for result in found]
            try:
                answer = [evaluate_detections(ground_truth(), flat, gathered)]
            except Exception as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0], flat


def write_results(path: str | os.PathLike[str], results: Sequence[Result]) -> Path:
    """Writes results.json as pycocotools' `loadRes` and COCO's server take it; complete or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w") as file:
        json.dump(list(results), file, allow_nan=False, separators=(",", ":"))
    partial.replace(target)
    return target


def _check(results: Sequence[Result], known: set[int], seen: set[int], categories: set[int]) -> None:
    for result in results:
        image_id, category = result["image_id"], result["category_id"]
        if image_id not in known:
            raise ValueError(f"a detection is of image {image_id}, which the ground truth does not hold")
        if image_id not in seen:
            raise ValueError(f"a detection is of image {image_id}, which is not among the images to be measured")
        if category not in categories:
            raise ValueError(f"a detection in image {image_id} has category {category}, which the data does not hold")
        if not all(math.isfinite(value) for value in (*result["bbox"], result["score"])):
            raise ValueError(
                f"a detection in image {image_id} has the box {result['bbox']} and score {result['score']}: "
                f"not finite, as from a training that diverged"
            )


def _mean(precision: Tensor) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.numel() else UNDEFINED


def _silent(*_: object) -> None:
    """For the evaluator, which prints its progress."""


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _CpuGroup:
    """All processes, over gloo: the default group where it is one, else (NCCL) a group for the moment."""

    def __enter__(self) -> Any:
        self.made = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return self.made

    def __exit__(self, *_: object) -> None:
        if self.made is not None:
            dist.destroy_process_group(self.made)


def _gather(mine: dict[int, list[Result]], group: Any) -> dict[int, list[Result]]:
    first = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine, parts, dst=0, group=group)
    merged: dict[int, list[Result]] = {}
    for part in parts or []:
        for image_id, found in part.items():
            merged.setdefault(image_id, found)
    return dict(sorted(merged.items()))
