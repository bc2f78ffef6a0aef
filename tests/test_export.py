"""export.py and predict.py as a user calls them, on one small checkpoint."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import export as export_module
import predict as predict_module
from configs.messages import run_as_command
from models import create_model
from models.hub import HubNetwork
from models.prediction_file import usable_path
from models.pretrained import timm_name
from models.weights import read_weights

MODEL = {"_target_": "models.create_model", "name": "efficientnet_b0", "num_classes": 3, "width": 1.0}
CONDCONV = {"experts": 2, "routing": "fc", "init": "network"}
DATA = {"normalize": "half", "image_size": 32, "crop_fraction": 0.875}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    net = create_model("efficientnet_b0", 3, 2).train()
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
            "config": {"model": MODEL, "condconv": CONDCONV, "data": DATA},
            "class_names": ["cat", "dog", "owl"],
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def averaged(checkpoint: Path) -> Path:
    """The same run with a moving average, whose classifier has its classes in reverse order."""
    content = torch.load(checkpoint, weights_only=True)
    raw = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    reverse = {name: raw[name].flip(0) for name in ("classifier.weight", "classifier.bias")}
    content["weight_average"] = {"state_dict": {**raw, **reverse}, "num_updates": 1, "decay": 0.9}
    path = checkpoint.with_name("averaged.ckpt")
    torch.save(content, path)
    return path


def probabilities(path: Path) -> dict[str, float]:
    """Of the one image in a file of predictions."""
    (row,) = json.loads(path.read_text())
    return {each["class"]: each["probability"] for each in row["top"]}


class Commands:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: str) -> tuple[int, str, str]:
        main = {"export": export_module.main, "predict": predict_module.main}[name]
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        self.capsys.readouterr()
        code = 0
        try:
            run_as_command(main, name)
        except SystemExit as done:
            code = int(done.code or 0)
        return code, *self.capsys.readouterr()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capsys)


def test_our_own_formats_and_none_that_timm_lacks(checkpoint: Path, command: Commands, tmp_path: Path) -> None:
    code, out, err = command("export", f"ckpt={checkpoint}", "format=safetensors", f"out={tmp_path / 'a.safetensors'}")
    assert code == 0 and "written" in out, err
    weights = read_weights(tmp_path / "a.safetensors")
    assert weights.card is not None and weights.card.class_names == ("cat", "dog", "owl")
    assert weights.card.normalization == "half" and "_target_" not in weights.card.model
    assert command("export", f"ckpt={tmp_path / 'a.safetensors'}", "format=hub", f"out={tmp_path / 'hub'}")[0] == 0
    assert torch.equal(
        HubNetwork.from_pretrained(tmp_path / "hub").net.classifier.weight, weights.state["classifier.weight"]
    )
    code, _, err = command("export", f"ckpt={tmp_path / 'hub'}", "format=timm", f"out={tmp_path / 'new' / 't.pth'}")
    assert code == 1 and "timm has no efficientnet_cc_b0_2e" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("average", [True, False])
def test_the_moving_average_is_taken_if_it_is_wanted(
    average: bool, checkpoint: Path, averaged: Path, command: Commands, tmp_path: Path
) -> None:
    content = torch.load(averaged, weights_only=True)
    raw = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    expected = content["weight_average"]["state_dict"] if average else raw
    read = read_weights(averaged, averaged=average)
    out = tmp_path / "a.safetensors"
    code, _, err = command("export", f"ckpt={averaged}", "format=safetensors", f"out={out}", f"average={average}")
    assert code == 0, err
    for weights in (read, read_weights(out)):
        assert weights.card is not None and weights.card.averaged is average
        assert weights.state.keys() == expected.keys()
        assert all(torch.equal(weights.state[name], value) for name, value in expected.items())

    image = tmp_path / "image.png"
    Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()).save(image)
    for path, name in ((averaged, "found"), (checkpoint, "of_raw")):
        options = (f"images={image}", "top=3", f"out={tmp_path / name}.json", f"average={average}")
        assert command("predict", f"ckpt={path}", *options)[0] == 0
    found, of_raw = probabilities(tmp_path / "found.json"), probabilities(tmp_path / "of_raw.json")
    assert of_raw["cat"] != pytest.approx(of_raw["owl"], rel=1e-3)
    classes = ("owl", "dog", "cat") if average else ("cat", "dog", "owl")
    assert [found[name] for name in ("cat", "dog", "owl")] == pytest.approx([of_raw[name] for name in classes])


def test_the_moving_average_is_taken_without_being_asked_for(
    checkpoint: Path, averaged: Path, command: Commands, tmp_path: Path
) -> None:
    expected = torch.load(averaged, weights_only=True)["weight_average"]["state_dict"]["classifier.weight"]
    assert not torch.equal(expected, read_weights(checkpoint).state["classifier.weight"])
    assert torch.equal(read_weights(averaged).state["classifier.weight"], expected)
    assert torch.equal(create_model("efficientnet_b0", 3, 2, pretrained=averaged).classifier.weight, expected)
    out = tmp_path / "a.safetensors"
    assert command("export", f"ckpt={averaged}", "format=safetensors", f"out={out}")[0] == 0
    assert torch.equal(read_weights(out).state["classifier.weight"], expected)
    raw = read_weights(checkpoint, averaged=True)
    assert raw.card is not None and not raw.card.averaged, "this run kept no average"


def test_folders_with_dots_in_their_names_keep_their_exports_apart(
    checkpoint: Path, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("width-0.25", "width-0.5"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, tmp_path / name / "checkpoints" / "last.ckpt")
        assert command("export", f"ckpt={tmp_path / name}", "format=safetensors")[0] == 0
        assert (tmp_path / f"{name}.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "width-0.5")
    code, out, err = command("export", "ckpt=.", "format=safetensors")
    assert code == 0 and "width-0.5.safetensors" in out, err


def test_files_of_weights_know_how_their_images_are_prepared(
    checkpoint: Path, command: Commands, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    assert command("export", f"ckpt={checkpoint}", "format=safetensors", f"out={path}")[0] == 0
    _, prepared = export_module.open_ckpt(str(path), average=True)
    assert prepared == {"normalize": "half", "image_size": 32, "crop_fraction": 0.875, "interpolation": "bicubic"}
    code, _, err = command("export", f"ckpt={path}", "format=onnx", "int8=true")
    assert code == 1 and "int8=true needs images" in err and not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, "efficientnet_cc_b0_8e"),
        ({"timm_options": {"pad_type": "same", "bn_eps": 1e-3}}, "tf_efficientnet_cc_b0_8e"),
        ({"name": "efficientnet_b0_depth"}, "efficientnet_cc_b1_8e"),
        ({"experts": 4}, "efficientnet_cc_b0_4e"),
        ({"experts": 2}, None),
        ({"name": "efficientnet_b0_depth", "experts": 4}, None),
        ({"timm_options": {"pad_type": "same"}}, None),
        ({"small_input": True}, None),
        ({"width": 0.5}, None),
        ({"name": "mobilenet_v1"}, None),
    ],
)
def test_the_network_of_timm_that_computes_the_same(model: dict[str, Any], expected: str | None) -> None:
    model = {"name": "efficientnet_b0", "experts": 8, "width": 1.0, "depth": 1.0, **model}
    if expected is None:
        with pytest.raises(ValueError, match="format=timm"):
            timm_name(model)
    else:
        assert timm_name(model) == expected


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("format=torch_export dynamic_size=true", "dynamic_size=true goes with format=onnx"),
        ("format=onxx", "Did you mean 'onnx'"),
        ("form=grouped", "Choose one of: mixture, matmul"),
        ("format=timm int8=true", "int8=true goes with format=onnx"),
        ("ckpt=nowhere.ckpt", "There is no checkpoint nowhere.ckpt"),
    ],
)
def test_mistakes_in_exporting(arguments: str, fragment: str, checkpoint: Path, command: Commands) -> None:
    given = arguments.split()
    code, _, err = command("export", *([] if "ckpt=" in arguments else [f"ckpt={checkpoint}"]), *given)
    assert code == 1 and fragment in err and "Traceback" not in err


def test_predictions_of_files_and_folders(checkpoint: Path, command: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    one = folder / "1.png"
    code, out, err = command(
        "predict",
        f"ckpt={checkpoint}",
        f"images=[{folder},{one}]",
        f"out={tmp_path / 'p.json'}",
        "top=2",
        "batch_size=2",
    )
    assert code == 0, err
    assert "bad.jpg: not read: UnidentifiedImageError" in out and "1 of 5 images could not be read" in out
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "bad.jpg", "1.png"]
    assert "error" in rows[3]
    # The same file in another batch: this processor may round differently there.
    for first, again in zip(rows[1]["top"], rows[4]["top"], strict=True):
        assert again["class"] == first["class"] and again["probability"] == pytest.approx(first["probability"])
    assert {**rows[4], "top": 0, "routing": 0} == {**rows[1], "top": 0, "routing": 0}
    assert rows[4]["routing"].keys() == rows[1]["routing"].keys()
    for layer, weights in rows[1]["routing"].items():
        assert rows[4]["routing"][layer] == pytest.approx(weights)
    probabilities = [entry["probability"] for entry in rows[0]["top"]]
    assert len(probabilities) == 2 and probabilities == sorted(probabilities, reverse=True)
    assert {entry["class"] for entry in rows[0]["top"]} <= {"cat", "dog", "owl"}
    assert len(rows[0]["routing"]) == 24 and all(0 < w < 1 for w in rows[0]["routing"]["blocks.6.0.conv_pwl"])
    net = create_model("efficientnet_b0", 3, 2, pretrained=checkpoint).eval()
    image = predict_module.Reader(read_weights(checkpoint).card).image(one)
    with torch.no_grad():
        expected = net(image[None]).softmax(1).max()
    assert abs(rows[1]["top"][0]["probability"] - float(expected)) < 1e-5
    code, out, _ = command("predict", f"ckpt={checkpoint}", f"images={folder}", f"out={tmp_path / 'p.csv'}")
    with (tmp_path / "p.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (
        code == 0 and len(table) == 4 and table[3]["error"] and len(table[0]["routing blocks.6.0.conv_pw"].split()) == 2
    )


def test_nothing_to_predict(checkpoint: Path, command: Commands, tmp_path: Path) -> None:
    code, _, err = command("predict", f"ckpt={checkpoint}", f"images={tmp_path}")
    assert code == 1 and "no images in" in err
    (tmp_path / "bad.png").touch()
    code, _, err = command("predict", f"ckpt={checkpoint}", f"images={tmp_path / 'bad.png'}")
    assert code == 1 and "none of the 1 images could be read" in err
    assert command("predict", f"ckpt={checkpoint}", f"images={tmp_path / 'none.png'}")[0] == 1
    code, _, err = command("predict", f"ckpt={checkpoint}", f"images={tmp_path}", "batch_size=0")
    for wrong, said in (("top=-1", "top=-1: expected a whole number"), ("pictures=drawn", "pictures= is of detectors")):
        assert said in command("predict", f"ckpt={checkpoint}", f"images={tmp_path}", wrong)[2]
    assert code == 1 and "batch_size=0: expected a whole number of at least 1" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("p.txt", "written as .csv or .json"),
        ("taken/p.csv", "taken/p.csv: File exists. Set out="),
        ("folder.csv", "folder.csv: Is a directory. Set out="),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(
    command: Commands, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "folder.csv").mkdir()
    code, _, err = command("predict", f"ckpt={tmp_path / 'none.ckpt'}", f"images={tmp_path}", f"out={tmp_path / name}")
    assert code == 1 and said in err and "none.ckpt" not in err, err


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    usable_path(tmp_path / "new" / "p.csv")
    (tmp_path / "old.json").write_text("[]")
    assert usable_path(str(tmp_path / "old.json")) == tmp_path / "old.json" and usable_path(None) is None
    assert not list((tmp_path / "new").iterdir()) and (tmp_path / "old.json").read_text() == "[]"
