"""What a detector found, as files: pictures with boxes, results.json in COCO's format, AP of each class."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer

from models.boxes import Detection
from models.callbacks.display import print_results
from models.coco_evaluation import UNDEFINED, write_results
from models.detection import DetectionModule
from models.drawing import draw_detections, sheet, to_image

RAW, AVERAGED = "", "-ema"


class DetectionFiles(Callback):
    """Writes into a folder, on the first process.

    After each validation `val-epoch-<number>.png`, the same first images with their boxes, which also go to loggers
    that take pictures (W&B, with boxes that can be switched on and off there). After a test `pictures.png`,
    `results.json` and `per_class.csv`, with `-ema` in their names for averaged weights.

    Args:
        folder: made when training or evaluation starts.
        pictures: how many images are drawn; 0 for none.
        min_score: boxes with lower scores are not drawn.
        print_per_class: also print AP of each class.
    """

    def __init__(
        self, folder: str | Path, pictures: int = 16, min_score: float = 0.3, print_per_class: bool = False
    ) -> None:
        if pictures < 0 or not 0 <= min_score <= 1:
            raise ValueError(f"pictures must be at least 0 and min_score in [0, 1], got {pictures} and {min_score}")
        self.folder = Path(folder)
        self.pictures = pictures
        self.min_score = min_score
        self.print_per_class = print_per_class
        self.suffixes = [RAW, AVERAGED]
        self._tests = 0
        self._drawn: list[Image.Image] = []
        self._shown: list[tuple[Image.Image, dict[str, Any]]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn, self._shown = [], []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn, self._shown = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._draw(trainer, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._draw(trainer, outputs, batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before an evaluation of hours: the folder can be written to."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._drawn or trainer.sanity_checking:
            return
        self._write_pictures(f"val-epoch-{trainer.current_epoch + 1:03d}.png")
        images, boxes = [image for image, _ in self._shown], [each for _, each in self._shown]
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                step = max(trainer.global_step - 1, 0)  # where Lightning puts this validation's metrics
                logger.log_image("val/detections", images, step=step, boxes=boxes)
        self._drawn, self._shown = [], []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # A module that keeps an average measures both in one test; eval.py loads one after the other.
        both: Any = pl_module.results
        found = {RAW: "test", AVERAGED: "test_ema"} if "test_ema" in both else {self.suffixes[self._tests % 2]: "test"}
        for suffix, stage in found.items():
            write_results(self.folder / f"results{suffix}.json", both[stage])
            self._write_per_class(suffix, pl_module.figures[stage].per_class)  # type: ignore[index, union-attr]
        if self._drawn:
            self._write_pictures(f"pictures{list(found)[-1]}.png")
        self._tests += 1

    def _draw(self, trainer: Trainer, found: list[Detection], batch: Any) -> None:
        missing = self.pictures - len(self._drawn)
        if missing <= 0 or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        normalize = data.normalize.to(batch[0].device)
        pixels = batch[0][:missing] * normalize.std + normalize.mean
        for image, detection, target in zip(map(to_image, pixels), found, batch[1], strict=False):
            options = {"truth": target, "min_score": self.min_score}
            self._drawn.append(draw_detections(image, detection, data.class_names, **options))
            self._shown.append((image, _wandb_boxes(detection, target, data.class_names, self.min_score)))

    def _write_pictures(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet(self._drawn).save(self.folder / name)

    def _write_per_class(self, suffix: str, per_class: dict[str, float]) -> None:
        with (self.folder / f"per_class{suffix}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["class", "AP"])
            table.writerows((name, "" if ap == UNDEFINED else f"{ap:.6f}") for name, ap in per_class.items())
        if self.print_per_class:
            shown = {name: "no objects" if ap == UNDEFINED else ap for name, ap in per_class.items()}
            print_results(f"AP by class{' (averaged weights)' if suffix else ''}", shown)


def evaluation_files(module: LightningModule, out: str | None, ckpt: str | None) -> list[DetectionFiles]:
    """What eval.py writes of a detector; nothing of other networks.

    Args:
        module: of the task.
        out: folder to write to; None: `evaluation` in the run's folder, or here where there is no checkpoint.
        ckpt: a checkpoint, or a run's folder.
    """
    if not isinstance(module, DetectionModule):
        return []
    place = Path(ckpt or ".").expanduser()
    run = place if place.is_dir() else place.parent.parent if place.parent.name == "checkpoints" else place.parent
    return [DetectionFiles(out or run / "evaluation", print_per_class=True)]


def _wandb_boxes(
    found: Detection, truth: dict[str, Any], class_names: tuple[str, ...], min_score: float
) -> dict[str, Any]:
    """Predicted and true boxes as `wandb.Image(boxes=...)` takes them."""
    labels = dict(enumerate(class_names))
    shown = found["scores"] >= min_score
    predicted = [
        {**_wandb_box(box, label), "box_caption": f"{labels[label]} {score:.2f}", "scores": {"score": score}}
        for box, label, score in zip(
            *(found[key][shown].tolist() for key in ("boxes", "labels", "scores")), strict=True
        )
    ]
    true = [
        _wandb_box(box, label) for box, label in zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True)
    ]
    return {
        "predictions": {"box_data": predicted, "class_labels": labels},
        "ground_truth": {"box_data": true, "class_labels": labels},
    }


def _wandb_box(box: list[float], label: int) -> dict[str, Any]:
    position = dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True))
    return {"position": position, "class_id": int(label), "domain": "pixel"}
