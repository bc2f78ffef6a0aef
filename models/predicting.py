"""What a network says about image files: the likeliest classes, and the routing weights of each CondConv layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv.recording import record_layers
from models.prediction_file import write_csv, write_json

Read = Callable[[Path], Tensor]
"""A file -> its normalised image `[3, H, W]`; raises ValueError with the reason where it cannot be read."""


@dataclass(frozen=True)
class Prediction:
    """Of one file: classes with probabilities, the likeliest first, and routing weights `[E]` by layer, or an error."""

    file: str
    top: tuple[tuple[str, float], ...] = ()
    routing: dict[str, tuple[float, ...]] | None = None
    error: str = ""

    def __str__(self) -> str:
        classes = "  ".join(f"{name} {probability:.3f}" for name, probability in self.top)
        return f"{self.file}: {f'not read: {self.error}' if self.error else classes}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        if self.error:
            return {"file": self.file, "error": self.error}
        top = [{"class": name, "probability": probability} for name, probability in self.top]
        return {"file": self.file, "top": top, "routing": {k: list(v) for k, v in (self.routing or {}).items()}}


def find_files(sources: Sequence[str], extensions: Sequence[str]) -> list[Path]:
    """Files as given, and all images in the folders given, sorted.

    Raises:
        FileNotFoundError: a source does not exist, or there is no image at all.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in extensions and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no image and no folder {source}")
    if not files:
        raise FileNotFoundError(f"no images in {', '.join(map(str, sources))}: looked for {' '.join(extensions)}")
    return files


def predict(
    network: nn.Module,
    files: Sequence[Path],
    read: Read,
    class_names: Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Predict file by file, in order; what cannot be read gets an error and the rest is done.

    Args:
        network: normalised images `[N, 3, H, W]` -> logits; run in eval mode.
        files: of images.
        read: reads one.
        class_names: of the outputs; where there are none, the outputs' numbers.
        top: how many classes.
        batch_size: images per forward pass.
    """
    network.eval()
    for start in range(0, len(files), batch_size):
        found: list[Tensor | str] = [_read(file, read) for file in files[start : start + batch_size]]
        images = [image for image in found if isinstance(image, Tensor)]
        results = _predict_batch(network, torch.stack(images), class_names, top) if images else iter(())
        for file, image in zip(files[start : start + batch_size], found, strict=True):
            if isinstance(image, str):
                yield Prediction(str(file), error=image)
            else:
                classes, routing = next(results)
                yield Prediction(str(file), classes, routing)


def _read(file: Path, read: Read) -> Tensor | str:
    try:
        return read(file)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def _predict_batch(
    network: nn.Module, images: Tensor, class_names: Sequence[str], top: int
) -> Iterator[tuple[tuple[tuple[str, float], ...], dict[str, tuple[float, ...]]]]:
    routing: dict[str, Tensor] = {}
    with record_layers(network, lambda name, weights: routing.update({name: weights})):
        probabilities = network(images).softmax(1)
    values, indices = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    for row in range(len(images)):
        names = [class_names[i] if i < len(class_names) else str(i) for i in indices[row].tolist()]
        classes = tuple(zip(names, values[row].tolist(), strict=True))
        yield classes, {name: tuple(weights[row].tolist()) for name, weights in routing.items()}


def write(predictions: Iterable[Prediction], path: Path) -> None:
    """Write a .json file (a list) or a .csv file (a line per image; routing weights of a layer in one cell each).

    Raises:
        OSError: see `models.prediction_file`.
    """
    rows = list(predictions)
    if path.suffix == ".json":
        write_json(path, (row.to_dict() for row in rows))
        return
    best = max(rows, key=lambda row: len(row.top))
    layers = list(best.routing or {})
    classes = [f"{what}{k}" for k in range(1, len(best.top) + 1) for what in ("class", "probability")]
    head = ["file", *classes, *(f"routing {layer}" for layer in layers), "error"]
    write_csv(path, head, (_line(row, len(classes), layers) for row in rows))


def _line(row: Prediction, class_cells: int, layers: Sequence[str]) -> list[str]:
    classes = [cell for name, probability in row.top for cell in (name, f"{probability:.6f}")]
    classes += [""] * (class_cells - len(classes))
    weights = [" ".join(f"{w:.4f}" for w in (row.routing or {}).get(layer, ())) for layer in layers]
    return [row.file, *classes, *weights, row.error]
