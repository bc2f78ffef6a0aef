"""Detection from the command line: train, evaluate, files of both, and mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from PIL import Image

import export as export_module
import predict as predict_module
from configs.messages import run_as_command
from models.weights import read_weights

TINY = (
    *("model=ssd_mobilenet_v1", "model.width=0.25", "model.depth=0.5", "condconv.experts=2", "data.image_size=64"),
    "logger=none",
    *("data.num_train=8", "data.num_val=6", "data.batch_size_per_device=4", "trainer.max_epochs=1"),
)


def call(main: Any, name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    run_as_command(main, name)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def only_run(folder: Path) -> Path:
    (config,) = folder.rglob("config.yaml")
    return config.parent


def test_train_then_eval(commands: Commands, tmp_path: Path) -> None:
    done = commands.train(*TINY, "data.normalize=half")
    assert done.code == 0, done.err
    run = only_run(tmp_path)
    trained = json.loads((run / "result.json").read_text())
    assert trained["status"] == "finished" and "val/AP" in json.dumps(trained)
    files = {path.name for path in (run / "detections").iterdir()}
    assert files == {"val-epoch-001.png", "pictures.png", "results.json", "per_class.csv"}
    again = commands.eval(f"ckpt={run}")
    assert again.code == 0, again.err
    for word in ("AP50", "ARl", "AP by class", "files", str(run / "evaluation")):
        assert word in again.out
    results: list[dict[str, Any]] = json.loads((run / "evaluation" / "results.json").read_text())
    assert results == json.loads((run / "detections" / "results.json").read_text())
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in results)
    with (run / "evaluation" / "per_class.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list("0123456789")
    (tmp_path / "taken").touch()
    refused = commands.eval(f"ckpt={run}", f"out={tmp_path / 'taken'}")
    assert refused.code == 1 and "taken: File exists" in refused.err and "Testing" not in refused.out
    larger = commands.eval(f"ckpt={run}", "data.image_size=96", f"out={tmp_path / 'elsewhere'}")
    assert larger.code == 0, larger.err
    assert (tmp_path / "elsewhere" / "pictures.png").is_file()


@pytest.mark.slow
def test_routing_of_a_detector(commands: Commands, tmp_path: Path) -> None:
    assert commands.train(*TINY, "callbacks.detections=null").code == 0
    run = only_run(tmp_path)
    done = commands.eval(f"ckpt={run}", "analysis=routing")
    assert done.code == 0, done.err
    page = (run / "analysis" / "index.md").read_text()
    assert "Ablations are measured for classifiers only" in page
    with (run / "analysis" / "classes.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= set("0123456789")


def test_export_and_predict(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.train(*TINY, "model.score_threshold=0", "callbacks.detections=null").code == 0
    run, images = only_run(tmp_path), tmp_path / "images"
    images.mkdir()
    Image.effect_noise((80, 50), 90).convert("RGB").save(images / "one.png")
    (images / "two.png").write_bytes(b"no image")
    call(export_module.main, "export", monkeypatch, f"ckpt={run}", f"out={tmp_path / 'net.pt2'}", "format=torch_export")
    for form in ("hub", "timm"):
        with pytest.raises(SystemExit):
            call(export_module.main, "export", monkeypatch, f"ckpt={run}", f"format={form}")
        assert f"format={form} is for classifiers alone" in capsys.readouterr().err
    out = f"out={tmp_path / 'found.json'}"
    drawn = f"pictures={tmp_path / 'drawn'}"
    call(predict_module.main, "predict", monkeypatch, f"ckpt={run}", f"images={images}", out, drawn, "min_score=0")
    one, two = json.loads((tmp_path / "found.json").read_text())
    assert "error" in two and len(one["boxes"]) > 0 and one["routing"]
    assert max(box["right"] for box in one["boxes"]) <= 80 and max(box["bottom"] for box in one["boxes"]) <= 50
    # The first box of the exported program, in the picture's own pixels, is that of predict.py.
    with Image.open(tmp_path / "drawn" / "0001-one.png") as picture:
        assert picture.width % 80 == 0
    reader = predict_module.Reader(read_weights(run / "checkpoints" / "last.ckpt").card)
    program = torch.export.load(str(tmp_path / "net.pt2")).module()
    boxes, scores, labels = program(reader.both(images / "one.png")[0][None])
    expected = one["boxes"][0]
    assert float(scores[0, 0]) == pytest.approx(expected["score"], abs=1e-4)
    assert str(int(labels[0, 0])) == expected["class"]
    assert float(boxes[0, 0, 2]) * 80 / 64 == pytest.approx(expected["right"], abs=0.05)


def test_one_batch_by_heart_is_for_detectors_too(commands: Commands, tmp_path: Path) -> None:
    done = commands.train(*TINY, "debug=overfit", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    assert "regularization: false" in (only_run(tmp_path) / "config.yaml").read_text()


def test_a_checkpoint_with_other_classes(commands: Commands, tmp_path: Path) -> None:
    assert commands.train(*TINY).code == 0
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(annotations))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    paths = [f"data.{part}_annotations={tmp_path / 'coco.json'}" for part in ("train", "val")]
    paths += [f"data.{part}_images={tmp_path}" for part in ("train", "val")]
    done = commands.eval(f"ckpt={only_run(tmp_path)}", "data=coco_json", *paths, "data.batch_size_per_device=1")
    assert done.code == 1 and "has 10 classes, the data 1" in done.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=digits",), "learns from boxes"),
        (("model=mobilenet_v1", "data=digit_scenes"), "take model=ssd_mobilenet_v1"),
        (("model.strides=[16,64]",), "maps of strides [2, 4, 8, 16, 32]"),
        (("model.loss=cross_entropy",), "unknown detection loss"),
        (("pretrained=nothing.pth",), "no weights at nothing.pth"),
    ],
)
def test_mistakes(commands: Commands, overrides: tuple[str, ...], message: str) -> None:
    keep = [each for each in TINY if not (overrides[0] == "data=digits" and each.startswith("data.num"))]
    if overrides[0] == "model=mobilenet_v1":
        keep = [each for each in keep if not each.startswith("model=")]
    done = commands.train(*keep, *overrides)
    assert done.code == 1 and message in done.err
