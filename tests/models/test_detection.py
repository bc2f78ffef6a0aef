"""The detection module: what it learns on a few scenes, what it logs and writes, the moving average, mistakes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tiny_scenes import Scenes
from torch import nn

from models import create_detector
from models.callbacks import DetectionFiles
from models.callbacks.detections import _wandb_boxes
from models.detection import DetectionModule
from models.ema import WeightAverageCallback


def module(experts: int = 0, loss: str = "focal", lr: float = 2e-3, **options: Any) -> DetectionModule:
    torch.manual_seed(0)
    net = create_detector(num_classes=3, experts=experts, image_size=64, width=0.25, loss=loss, router_gain=1.0)
    optimizer = partial(_adam, lr=lr)
    return DetectionModule(net, 3, optimizer=optimizer, **options)


def _adam(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "max_epochs": 1,
        **options,
    }
    return pl.Trainer(**settings)


def rounded(boxes: list[dict[str, Any]]) -> set[tuple[float, ...]]:
    return {(b["image_id"], b["category_id"], *(round(side, 2) for side in b["bbox"])) for b in boxes}


@pytest.mark.parametrize(("experts", "loss"), [(0, "focal"), (4, "focal"), (0, "hard_negative")])
def test_a_few_scenes_are_learned_by_heart(tmp_path: Path, experts: int, loss: str) -> None:
    found = module(experts, loss)
    fit = trainer(tmp_path, max_epochs=70, limit_val_batches=0)
    fit.fit(found, datamodule=Scenes(8, 8))
    figures = fit.test(found, datamodule=Scenes(8, 8), verbose=False)[0]
    assert figures["test/AP50"] >= 0.85, figures
    assert {"test/AP", "test/AR100", "test/loss", "test/loss_class", "test/loss_box"} <= figures.keys()


def test_the_truth_as_detections_has_ap_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes go to the images' own pixels, and labels to category ids: any slip would show."""
    found, data = module(), Scenes(8, 4)
    batches = iter([data.scenes[:4], data.scenes[4:]])

    def detect(outputs: Any) -> list[dict[str, Any]]:
        return [
            {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
            for _, t in next(batches)
        ]

    monkeypatch.setattr(found.net, "detect", detect)
    run = trainer(tmp_path, callbacks=[DetectionFiles(tmp_path / "detections", pictures=6)])
    figures = run.test(found, datamodule=data, verbose=False)[0]
    assert figures["test/AP"] == pytest.approx(1.0) and figures["test/AR100"] == pytest.approx(1.0)
    results = json.loads((tmp_path / "detections" / "results.json").read_text())
    assert rounded(results) == rounded(data.ground_truth()["annotations"])
    lines = (tmp_path / "detections" / "per_class.csv").read_text().splitlines()
    assert lines == ["class,AP", "red,1.000000", "green,1.000000", "blue,1.000000"]
    with Image.open(tmp_path / "detections" / "pictures.png") as picture:
        assert picture.width > 4 * 240 and picture.height > 2 * 240


def test_one_step_is_logged_in_parts(tmp_path: Path) -> None:
    found = module(class_weight=2.0, box_weight=0.5)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(found, datamodule=Scenes(4, 4))
    logged = {key: float(value) for key, value in fit.logged_metrics.items()}
    expected = 2 * logged["train/loss_class"] + 0.5 * logged["train/loss_box"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["train/matched"] > 0


def test_the_loss_of_an_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    found = module()
    losses = [
        trainer(tmp_path).test(found, datamodule=Scenes(8, batch), verbose=False)[0]["test/loss"] for batch in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_moving_average_is_evaluated_beside_the_raw_weights(tmp_path: Path) -> None:
    found = module(2, lr=0.05)
    files = DetectionFiles(tmp_path / "detections", pictures=2)
    fit = trainer(tmp_path, max_epochs=2, callbacks=[WeightAverageCallback(0.9), files])
    fit.fit(found, datamodule=Scenes(4, 4))
    assert {"val/AP", "val_ema/AP", "val_ema/loss"} <= fit.callback_metrics.keys()
    assert float(fit.callback_metrics["val/loss"]) != float(fit.callback_metrics["val_ema/loss"])
    assert sorted(path.name for path in files.folder.iterdir()) == ["val-epoch-001.png", "val-epoch-002.png"]
    fit.test(found, datamodule=Scenes(4, 4), verbose=False)
    assert (files.folder / "results.json").is_file() and (files.folder / "results-ema.json").is_file()


FOUND = {
    "boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0]]),
    "labels": torch.tensor([2, 0]),
    "scores": torch.tensor([0.75, 0.25]),
}


def test_boxes_for_wandb() -> None:
    wandb = pytest.importorskip("wandb")
    truth = {"boxes": torch.tensor([[3.0, 4.0, 20.0, 50.0]]), "labels": torch.tensor([1])}
    boxes = _wandb_boxes(FOUND, truth, ("red", "green", "blue"), min_score=0.5)
    labels = {0: "red", 1: "green", 2: "blue"}
    seen = {
        "position": {"minX": 1.0, "minY": 2.0, "maxX": 30.0, "maxY": 40.0},
        "domain": "pixel",
        "class_id": 2,
        "box_caption": "blue 0.75",
        "scores": {"score": 0.75},
    }
    true = {"position": {"minX": 3.0, "minY": 4.0, "maxX": 20.0, "maxY": 50.0}, "domain": "pixel", "class_id": 1}
    assert boxes == {
        "predictions": {"box_data": [seen], "class_labels": labels},
        "ground_truth": {"box_data": [true], "class_labels": labels},
    }
    wandb.Image(Image.new("RGB", (64, 64)), boxes=boxes)  # it checks them
    both = _wandb_boxes(FOUND, truth, ("red", "green", "blue"), min_score=0.25)["predictions"]["box_data"]
    assert [box["class_id"] for box in both] == [2, 0], "a score of min_score is shown"


class PictureRecorder:
    """A logger that takes pictures, as Lightning's of W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, list[Image.Image], int, list[dict[str, Any]]]] = []

    def log_image(self, key: str, images: list[Image.Image], step: int, boxes: list[dict[str, Any]]) -> None:
        self.logged.append((key, images, step, boxes))


def test_as_many_pictures_as_asked_for_go_to_loggers_that_take_them(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    recorder, data, files = PictureRecorder(), Scenes(8, 4), DetectionFiles(tmp_path, pictures=6, min_score=0.5)
    options = {"is_global_zero": True, "current_epoch": 0, "global_step": 8, "datamodule": data}
    run: Any = SimpleNamespace(loggers=[object(), recorder], **options)
    found: Any = None
    for run.sanity_checking in (True, False):
        files.on_validation_start(run, found)
        for index, batch in enumerate(data.val_dataloader()):
            files.on_validation_batch_end(run, found, [FOUND] * 4, data.on_after_batch_transfer(batch, 0), index)
        files.on_validation_end(run, found)
    ((key, images, step, boxes),) = recorder.logged
    assert (key, step, len(images), len(boxes)) == ("val/detections", 7, 6, 6)
    for image, each, (_, target) in zip(images, boxes, data.scenes[:6], strict=True):
        wandb.Image(image, boxes=each)
        assert image.size == (64, 64) and len(each["predictions"]["box_data"]) == 1
        true = each["ground_truth"]["box_data"]
        assert [list(box["position"].values()) for box in true] == target["boxes"].tolist()
        assert [box["class_id"] for box in true] == target["labels"].tolist()


def test_bfloat16_autocast(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    fit.fit(module(2), datamodule=Scenes(4, 4))
    assert torch.isfinite(fit.callback_metrics["train/loss"])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="needs a detector"):
        DetectionModule(nn.Conv2d(3, 3, 1), 3)
    with pytest.raises(ValueError, match="min_score"):
        DetectionFiles("nowhere", min_score=2)
