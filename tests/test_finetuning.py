"""From a static run to a CondConv run: train.py pretrained=..., and eval.py pretrained=... on files of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from commands import TINY, Commands

from models.weights import read_weights


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def test_a_static_run_goes_on_with_experts(commands: Commands, tmp_path: Path) -> None:
    static_run = [argument for argument in TINY if "experts" not in argument]
    code, _, err = commands.train(*static_run, "condconv.experts=0", "data.normalize=half")
    assert code == 0, err
    (last,) = commands.outputs.rglob("last.ckpt")
    moved = last.rename(tmp_path / "static.ckpt")
    arguments = [*TINY, f"pretrained={moved}", "condconv.init=upcycle", "name=grown"]
    code, _, err = commands.train(
        *arguments, "optim.lr=1e-30", "optim.optimizer.weight_decay=0", "condconv.freeze=backbone"
    )
    assert code == 0, err
    (grown,) = commands.outputs.rglob("*grown/checkpoints/last.ckpt")
    before, after = read_weights(moved), read_weights(grown)
    assert after.card is not None and after.card.normalization == "half", "taken over from the static run"
    assert after.state["conv_stem.weight"].equal(before.state["conv_stem.weight"])
    share = after.state["classifier.weight"].mean(0)  # of 2 experts, no noise is possible: each is the static kernel
    assert torch.allclose(share, before.state["classifier.weight"], rtol=1e-4, atol=1e-6)
    moved.unlink()
    assert commands.eval(f"ckpt={grown}")[0] == 0, "a checkpoint stands alone"
    code, _, err = commands.train(*TINY, f"pretrained={grown}", "condconv.init=upcycle")
    assert code == 1 and "has experts already" in err
    code, _, err = commands.train(*TINY, "pretrained=nowhere.pth", "condconv.init=upcycle")
    assert code == 1 and "there are no weights at nowhere.pth" in err


def test_eval_of_a_file_of_timm(commands: Commands, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10).state_dict(), tmp_path / "cc.pth")
    arguments = ("data=digits", "data.eval_batch_size_per_device=360", f"pretrained={tmp_path / 'cc.pth'}")
    code, out, err = commands.eval(*arguments, "model=efficientnet_b0", "condconv.experts=4")
    assert code == 0 and "top1" in out and "12.05M" in out, err
    code, _, err = commands.eval(*arguments, "model=efficientnet_b0", "condconv.experts=8")
    assert code == 1 and "has 4 experts per layer, the network 8" in err
