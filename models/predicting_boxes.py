"""What a detector says about image files: boxes with class and score, drawn into copies, and routing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condconv.recording import record_layers
from models.drawing import draw_detections
from models.prediction_file import write_csv, write_json
from models.ssd_network import SSD

ReadBoth = Callable[[Path], tuple[Tensor, Image.Image]]
"""A file -> its normalised image `[3, S, S]`, and the picture; ValueError with the reason if it is unreadable."""
BOX = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class BoxPrediction:
    """Of one file: boxes, the best first, as (class, score, (left, top, right, bottom) in pixels), or an error."""

    file: str
    boxes: tuple[tuple[str, float, tuple[float, ...]], ...] = ()
    routing: dict[str, tuple[float, ...]] = field(default_factory=dict)
    error: str = ""
    picture: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        if self.error:
            return {"file": self.file, "error": self.error}
        boxes = [{"class": n, "score": s, **dict(zip(BOX, box, strict=True))} for n, s, box in self.boxes]
        routing = {layer: list(weights) for layer, weights in self.routing.items()}
        return {"file": self.file, "boxes": boxes, "picture": self.picture, "routing": routing}

    def __str__(self) -> str:
        if self.error:
            return f"{self.file}: not read: {self.error}"
        found = "  ".join(f"{name} {score:.3f}" for name, score, _ in self.boxes[:10])
        more = f"  and {len(self.boxes) - 10} more" if len(self.boxes) > 10 else ""
        return f"{self.file}: {found or 'nothing found'}{more}"


def predict_boxes(
    network: SSD,
    files: Sequence[Path],
    read: ReadBoth,
    class_names: Sequence[str],
    *,
    min_score: float = 0.3,
    pictures: str | Path | None = None,
    batch_size: int = 32,
) -> Iterator[BoxPrediction]:
    """Predict file by file, in order; what cannot be read gets an error and the rest is done.

    Args:
        network: run in eval mode.
        files: of images.
        read: reads one.
        class_names: by label; where there is none, the label's number.
        min_score: of the boxes that are given and drawn.
        pictures: folder for copies with boxes, `<number>-<name>.png`; None draws nothing.
        batch_size: images per forward pass.
    """
    network.eval()
    folder = Path(pictures).expanduser() if pictures else None
    for start in range(0, len(files), batch_size):
        found = [_read(file, read) for file in files[start : start + batch_size]]
        images = [each[0] for each in found if not isinstance(each, str)]
        results = _detect(network, torch.stack(images)) if images else iter(())
        for number, (file, each) in enumerate(zip(files[start : start + batch_size], found, strict=True), start + 1):
            if isinstance(each, str):
                yield BoxPrediction(str(file), error=each)
                continue
            detection, routing = next(results)
            scale = torch.tensor([each[1].width, each[1].height] * 2) / network.image_size
            detection["boxes"] = detection["boxes"] * scale
            picture = ""
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                drawn = draw_detections(each[1], detection, class_names, min_score=min_score)
                picture = str(folder / f"{number:04d}-{file.stem}.png")
                drawn.save(picture)
            yield BoxPrediction(str(file), _boxes(detection, class_names, min_score), routing, picture=picture)


def _read(file: Path, read: ReadBoth) -> tuple[Tensor, Image.Image] | str:
    try:
        return read(file)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def _detect(network: SSD, images: Tensor) -> Iterator[tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]]:
    routing: dict[str, Tensor] = {}
    with record_layers(network, lambda name, weights: routing.update({name: weights})):
        outputs = network(images)
    for row, detection in enumerate(network.detect(outputs)):
        yield detection, {name: tuple(weights[row].tolist()) for name, weights in routing.items()}


def _boxes(
    detection: dict[str, Tensor], class_names: Sequence[str], min_score: float
) -> tuple[tuple[str, float, tuple[float, ...]], ...]:
    found = zip(*(detection[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return tuple(
        (class_names[label] if label < len(class_names) else str(label), score, tuple(round(side, 2) for side in box))
        for label, score, box in found
        if score >= min_score
    )


def write_boxes(predictions: Iterable[BoxPrediction], path: Path) -> None:
    """Write a .json file (a list, with routing weights) or a .csv file (a line per box, or one without any).

    Raises:
        OSError: see `models.prediction_file`.
    """
    rows = list(predictions)
    if path.suffix == ".json":
        write_json(path, (row.to_dict() for row in rows))
    else:
        write_csv(path, ["file", "class", "score", *BOX, "error"], (line for row in rows for line in _lines(row)))


def _lines(row: BoxPrediction) -> list[list[Any]]:
    lines = [[row.file, name, f"{score:.6f}", *box, ""] for name, score, box in row.boxes]
    return lines or [[row.file, *[""] * 6, row.error]]
