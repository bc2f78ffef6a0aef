"""Reading annotation files in COCO's format: checked, with a message for every mistake, and packed into few tensors."""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.folder import some

# Boxes of published sets stick out by rounding; what is cut off beyond so many pixels is counted.
ROUNDING = 1.0
SLOW_BYTES = 100 * 2**20
BAD_BOXES = ("error", "drop")


@dataclass
class CocoIndex:
    """All that training needs of an annotation file, in tensors that live in shared memory.

    A list of 118,000 Python objects would be copied into every loading process, page by page, as each access writes
    its reference count; tensors are not, and spawned processes get a handle instead of a copy. File names are one
    tensor of bytes.

    Attributes:
        image_ids: int64 `[I]`, in the order of the file.
        sizes: int32 `[I, 2]`, (height, width) as the file says.
        boxes: float32 `[B, 4]`, (left, top, right, bottom), clipped to the image; without crowds.
        labels: int64 `[B]`.
        starts: int64 `[I + 1]`: image i has the boxes starts[i] ... starts[i+1].
        category_ids, class_names: by label.
        counts: what was left out or changed, by reason.
        path: of the annotation file.
    """

    image_ids: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    starts: Tensor
    names: Tensor
    name_starts: Tensor
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    counts: dict[str, int]
    path: Path

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, position: int) -> str:
        """The file name of an image."""
        start, end = self.name_starts[position : position + 2].tolist()
        return bytes(self.names[start:end].numpy()).decode()

    def size(self, position: int) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.sizes[position].tolist()
        return height, width

    def truth(self, position: int) -> tuple[Tensor, Tensor]:
        """Boxes and labels of an image."""
        start, end = self.starts[position : position + 2].tolist()
        return self.boxes[start:end].clone(), self.labels[start:end].clone()

    def notes(self) -> str:
        """What was left out or changed, in words; empty where nothing was."""
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)


def read_json(path: Path) -> dict[str, Any]:
    """The content of an annotation file without masks, which are most of it.

    Raises:
        FileNotFoundError, ValueError: it is missing, incomplete, or not in COCO's format for objects.
    """
    if not path.is_file():
        around = path.parent
        there = some([entry.name for entry in sorted(around.iterdir())]) if around.is_dir() else None
        where = f"{around} does not exist" if there is None else f"{around} holds {there or 'nothing'}"
        raise FileNotFoundError(
            f"annotation file {path} does not exist ({where}): set data.root, or data.train_annotations and "
            f"data.val_annotations"
        )
    try:
        content = json.loads(_read_text(path), object_hook=_without_masks)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"annotation file {path} is not complete JSON: {error.msg} at character {error.pos} of {len(error.doc)} "
            f"(a download that was cut off?)"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"annotation file {path} is not text: expected JSON, perhaps it is still compressed") from None
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in wanted):
        found = f"a dict with {some(sorted(content)) or 'nothing'}" if isinstance(content, dict) else "a list"
        hint = " (results.json is what eval.py writes, not a truth)" if isinstance(content, list) else ""
        raise ValueError(
            f"annotation file {path} is not in COCO's format: expected a dict with the lists images, annotations and "
            f"categories, found {found}{hint}"
        )
    return content


def read_index(path: Path, *, bad_boxes: str = "error", limit: int | None = None) -> CocoIndex:
    """Reads and checks an annotation file.

    Crowds are left out, boxes are clipped to their image, and those without any area in it are dropped; all are
    counted. Images without boxes stay.

    Args:
        path: of the file.
        bad_boxes: "error" or "drop": what to do with boxes that have a NaN or a negative size.
        limit: only the first so many images.

    Raises:
        FileNotFoundError, ValueError: the file cannot be used; the message says why, and which entries.
    """
    content = read_json(path)
    category_ids, class_names = _categories(content["categories"], path)
    images = content["images"]
    if not images:
        raise ValueError(f"annotation file {path} lists no images: the data set is empty")
    ids = _column(images, "id", "image", path, int)
    _no_duplicates(ids, "image", path)
    sizes = np.array([_column(images, key, "image", path, _positive) for key in ("height", "width")], dtype=np.int64).T
    names = [name.encode() for name in _column(images, "file_name", "image", path, _text)]
    boxes, labels, owners, counts = _boxes(content["annotations"], ids, sizes, category_ids, path, bad_boxes)
    count = min(limit or len(ids), len(ids))
    order = np.argsort(owners, kind="stable")
    order = order[owners[order] < count]
    starts = np.searchsorted(owners[order], np.arange(count + 1))
    lengths = np.array([0, *(len(name) for name in names[:count])])
    tensors = {
        "image_ids": np.array(ids[:count], dtype=np.int64),
        "sizes": sizes[:count].astype(np.int32),
        "boxes": boxes[order].astype(np.float32),
        "labels": labels[order],
        "starts": starts.astype(np.int64),
        "names": np.frombuffer(b"".join(names[:count]), dtype=np.uint8).copy(),
        "name_starts": np.cumsum(lengths),
    }
    shared = {key: torch.from_numpy(array).share_memory_() for key, array in tensors.items()}
    return CocoIndex(**shared, category_ids=category_ids, class_names=class_names, counts=counts, path=path)


def read_truth(path: Path, image_ids: Iterable[int]) -> dict[str, Any]:
    """The truth about some images as the evaluator wants it: as in the file, with `area` and `iscrowd` filled in."""
    content, chosen = read_json(path), set(image_ids)
    annotations = [
        _with_numbers(annotation)
        for annotation in content["annotations"]
        if int(annotation["image_id"]) in chosen and _is_box(annotation["bbox"])
    ]
    images = [{**image, "id": int(image["id"])} for image in content["images"] if int(image["id"]) in chosen]
    categories = [{**category, "id": int(category["id"])} for category in content["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def _with_numbers(annotation: dict[str, Any]) -> dict[str, Any]:
    """Ids as numbers, as in the index, and what files leave out or have null."""
    area, box = annotation.get("area"), annotation["bbox"]
    return {
        **annotation,
        **{key: int(annotation[key]) for key in ("id", "image_id", "category_id") if key in annotation},
        "iscrowd": int(annotation.get("iscrowd") or 0),
        "area": box[2] * box[3] if area is None else area,
    }


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > SLOW_BYTES:  # half a minute for COCO's training part, which would look like a hang
        print(f"reading {path} ({size / 2**20:.0f} MiB) ...", file=sys.stderr, flush=True)
    return path.read_text(encoding="utf-8-sig")


def _without_masks(entry: dict[str, Any]) -> dict[str, Any]:
    """Called for every dict while the file is parsed, so that masks never pile up: they are 9/10 of it."""
    entry.pop("segmentation", None)
    return entry


def _categories(categories: list[dict[str, Any]], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and names in the order of the ids, which is the order of the labels."""
    if not categories:
        raise ValueError(f"annotation file {path} lists no categories: there is nothing to detect")
    ids = _column(categories, "id", "category", path, int)
    names = _column(categories, "name", "category", path, _text)
    _no_duplicates(ids, "category", path)
    pairs = sorted(zip(ids, names, strict=True))
    return tuple(number for number, _ in pairs), tuple(name for _, name in pairs)


def _boxes(
    annotations: list[dict[str, Any]],
    image_ids: list[int],
    sizes: np.ndarray,
    category_ids: tuple[int, ...],
    path: Path,
    bad_boxes: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Boxes float64 `[B, 4]`, labels, the position of each one's image, and what was left out."""
    ids = _column(annotations, "id", "annotation", path, int)
    _no_duplicates(ids, "annotation", path)
    position = {number: place for place, number in enumerate(image_ids)}
    label = {number: place for place, number in enumerate(category_ids)}
    owners = _lookup(annotations, "image_id", position, path)
    labels = _lookup(annotations, "category_id", label, path)
    crowd = np.array([bool(int(a.get("iscrowd") or 0)) for a in annotations], dtype=bool)
    raw = np.array(_column(annotations, "bbox", "annotation", path, _four), dtype=np.float64).reshape(-1, 4)
    bad = ~np.isfinite(raw).all(1) | (raw[:, 2:] < 0).any(1)
    if bad.any() and bad_boxes == "error":
        named = some([f"annotation {ids[i]}: {raw[i].tolist()}" for i in np.flatnonzero(bad)])
        raise ValueError(
            f"{int(bad.sum())} box(es) in {path} have a NaN or a negative size: {named}; repair the file (bbox is "
            f"left, top, width, height), or leave them out with data.bad_boxes=drop"
        )
    corners = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], 1)
    limits = np.concatenate([sizes[owners][:, ::-1]] * 2, 1) if len(raw) else np.zeros((0, 4))
    clipped = np.clip(np.nan_to_num(corners), 0, limits)
    flat = (raw[:, 2:] <= 0).any(1)
    outside = (clipped[:, 2:] <= clipped[:, :2]).any(1) & ~flat
    kept = ~(bad | crowd | flat | outside)
    counts = {
        "crowds ignored": int(crowd.sum()),
        "boxes without area dropped": int((flat & ~bad & ~crowd).sum()),
        "boxes outside their image dropped": int((outside & ~bad & ~crowd).sum()),
        "boxes with NaN or negative size dropped": int(bad.sum()),
        "boxes clipped to their image": int((np.abs(clipped - corners).max(1) > ROUNDING)[kept].sum()),
    }
    return clipped[kept], labels[kept], owners[kept], counts


def _lookup(annotations: list[dict[str, Any]], key: str, known: dict[int, int], path: Path) -> np.ndarray:
    values = _column(annotations, key, "annotation", path, int)
    unknown = [f"annotation {a['id']}: {v}" for a, v in zip(annotations, values, strict=True) if v not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} annotation(s) in {path} have a {key} that the file does not list: {some(unknown)}"
        )
    return np.array([known[value] for value in values], dtype=np.int64)


def _column(entries: list[Any], key: str, what: str, path: Path, check: Callable[[Any], Any]) -> list[Any]:
    """One value of every entry, checked; the message names the first entry that lacks it or has another type."""
    try:
        return [check(entry[key]) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError):
        for place, entry in enumerate(entries):
            try:
                check(entry[key])
            except (KeyError, TypeError, ValueError, AttributeError):
                shown = json.dumps(entry, default=str)[:200]
                raise ValueError(
                    f"annotation file {path} is not in COCO's format for objects: {what} {place} has no usable "
                    f"{key!r}: {shown}"
                ) from None
        raise


def _positive(value: Any) -> int:
    if int(value) != value or value < 1:
        raise ValueError(value)
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


def _four(value: Any) -> list[float]:
    left, top, width, height = value
    # null is how some tools write a number that is none.
    return [math.nan if number is None else float(number) for number in (left, top, width, height)]


def _is_box(value: Any) -> bool:
    box = _four(value)
    return all(math.isfinite(number) for number in box) and box[2] >= 0 and box[3] >= 0


def _no_duplicates(ids: list[int], what: str, path: Path) -> None:
    if len(set(ids)) == len(ids):
        return
    twice = [str(number) for number, count in Counter(ids).items() if count > 1]
    raise ValueError(f"{len(twice)} {what} id(s) occur more than once in {path}: {some(twice)}; each must be its own")
