"""eval.py: the same figures as the training's end, from nothing but the checkpoint."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import TINY, Commands

from condconv import complexity
from configs.runs import load_checkpoint
from eval import evaluate
from models import create_model


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def figure(out: str, name: str) -> str:
    """A figure of a table of results."""
    found = re.search(rf"^│ {re.escape(name)} +│ +(\S+)", out, re.MULTILINE)
    assert found, f"no {name} in {out}"
    return found.group(1)


def test_eval_repeats_the_figures_of_training(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = commands.train(
        *TINY,
        "trainer.limit_train_batches=8",
        "condconv.routing=softmax",
        "model.classifier_std=null",
        "data.normalize=half",
    )
    assert trained.code == 0, trained.err
    (last,) = commands.outputs.rglob("last.ckpt")
    code, out, err = commands.eval(f"ckpt={last}")
    assert code == 0, err
    for name in ("top1", "top5", "loss"):
        assert figure(out, name) == figure(trained.out, f"test/{name}")
    counted = complexity(create_model("mobilenet_v1", 10, 2, width=0.25, routing="softmax"), 32)
    assert figure(out, "params") == f"{counted.params / 1e3:.1f}k" and counted.params < 1e6
    assert figure(out, "madds") == f"{counted.madds / 1e6:.2f}M"
    assert float(figure(out, "images_per_second")) > 0
    # Nothing is left behind where eval.py was called, and the run is untouched.
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    assert list(tmp_path.glob("outputs/*/*")) == [last.parent.parent]

    # A moved file needs nothing beside it; a folder stands for its last checkpoint.
    moved = tmp_path / "elsewhere.ckpt"
    shutil.copy(last, moved)
    measured: list[dict[str, float]] = []  # as it is, not as it is printed
    monkeypatch.setattr("eval.evaluate", lambda cfg: measured.append(evaluate(cfg)))
    for ckpt in (moved, last.parent.parent):
        assert figure(commands.eval(f"ckpt={ckpt}").out, "top1") == figure(out, "top1")

    # Compressed experts: the same network, counted alike, of nearly the same values.
    small = commands.eval(f"ckpt={moved}", "expert_dtype=int8")
    assert small.code == 0 and all(figure(small.out, name) == figure(out, name) for name in ("params", "madds"))
    whole, compressed = (each["loss"] for each in measured[-2:])
    assert compressed != whole and compressed == pytest.approx(whole, rel=0.02)
    wrong = commands.eval(f"ckpt={moved}", "expert_dtype=int4")
    assert wrong.code != 0 and "expert_dtype must be one of bf16, int8" in wrong.err

    # A config that lost its place in the file is read from the run's folder.
    checkpoint = torch.load(last, weights_only=True)
    config = checkpoint.pop("config")
    torch.save(checkpoint, last)
    assert load_checkpoint(last)["config"] == config

    # Other sizes and other data, without retyping the network.
    bigger = commands.eval(f"ckpt={moved}", "data.image_size=64", "data.batch_size_per_device=200")
    assert bigger.code == 0 and figure(bigger.out, "madds") != figure(out, "madds")
    synthetic = ("data=synthetic", "data.image_size=32", "data.num_batches=1")
    other = commands.eval(f"ckpt={moved}", *synthetic, "data.num_classes=10")
    assert other.code == 0, other.err

    # Another data set is prepared as the network knows it, unless the command line says otherwise.
    half = commands.eval(f"ckpt={moved}", "data=digits")
    assert half.code == 0 and figure(half.out, "top1") == figure(out, "top1"), half.err
    assert "as trained: data.normalize=half (the data set's default is imagenet)" in half.out
    imagenet = commands.eval(f"ckpt={moved}", "data=digits", "data.normalize=imagenet")
    assert imagenet.code == 0 and "as trained" not in imagenet.out
    assert abs(measured[-1]["loss"] - measured[-2]["loss"]) > 1e-5, measured[-2:]

    # Data that cannot be meant.
    wrong = commands.eval(f"ckpt={moved}", *synthetic)
    assert wrong.code == 1 and "has 10 classes, the data 1000" in wrong.err
    rootless = commands.eval(f"ckpt={moved}", "data.root=/somewhere")
    assert rootless.code == 1 and "data.root" in rootless.err and "no such setting" in rootless.err


def test_averaged_weights_are_evaluated_too(commands: Commands) -> None:
    average = "+callbacks.average={_target_: models.ema.WeightAverageCallback, decay: 0.9}"
    trained = commands.train(*TINY, average, "model.classifier_std=null")
    assert trained.code == 0, trained.err
    (last,) = commands.outputs.rglob("last.ckpt")
    code, out, err = commands.eval(f"ckpt={last}")
    assert code == 0, err
    for name in ("top1", "loss"):
        assert figure(out, name) == figure(trained.out, f"test/{name}")
        assert figure(out, f"ema/{name}") == figure(trained.out, f"test_ema/{name}")
    assert figure(out, "loss") != figure(out, "ema/loss")
