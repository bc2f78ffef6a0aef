"""Detectors: the same training on one process and on two, and after a kill; see test_ranks.py and test_survival.py."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from survival import TINY, assert_same_run, at_call, compose_train, kill, read_metrics, run

from models.coco_evaluation import FIGURES
from models.detection import DetectionModule
from train import build_network

pytestmark = pytest.mark.forks

# 13 scenes of evaluation: two processes do not divide them.
SCENES = (
    *(each for each in TINY if not each.startswith(("model", "trainer.limit_val", "trainer.limit_test", "data."))),
    *("model=ssd_mobilenet_v1", "model.score_threshold=0", "data.image_size=64", "data.num_train=48"),
    *("data.num_val=13", "callbacks.detections.pictures=2"),
)
ALONE = "data.batch_size_per_device=8"
OFTEN = "callbacks.last.every_n_minutes=0"
# As in test_ranks.py: no random numbers of a process's own, no Adam, float64, a small rate, statistics of all.
SAME = (
    *(each for each in SCENES if "dropout" not in each and "max_epochs" not in each),
    *("optim=sgd", "optim.lr=0.0001", "trainer.precision=64-true", "callbacks.batchnorm.examples=all"),
    "trainer.max_epochs=1",
)


def said(folder: Path, ranks: int = 1) -> str:
    return "".join((folder / f"log.{rank}.log").read_text() for rank in range(ranks))


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run([*SCENES, ALONE, f"paths.run={folder}"], folder / "log") == [0], said(folder)
    return folder


# In the middle of an epoch, and in an evaluation, of which the detections so far are lost.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "call"), [("training_step", 7), ("validation_step", 3)])
def test_killed_and_resumed(method: str, call: int, undisturbed: Path, tmp_path: Path) -> None:
    before = at_call(method, call, kill, module=DetectionModule)
    assert run([*SCENES, ALONE, OFTEN, f"paths.run={tmp_path}"], tmp_path / "log", before=before) == [-signal.SIGKILL]
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for ranks in (1, 2):
        folder = folders[ranks] = tmp_path_factory.mktemp(f"detectors{ranks}")
        overrides = [*SAME, f"data.batch_size_per_device={8 // ranks}", f"paths.run={folder}"]
        assert run(overrides, folder / "log", ranks) == [0] * ranks, said(folder, ranks)
    return folders


def test_two_processes_give_the_weights_of_one(trained: dict[int, Path]) -> None:
    """Boxes are unevenly spread over the processes: the losses must be divided by the matched anchors of all."""
    one, two = (saved(trained[ranks]) for ranks in (1, 2))
    assert one["global_step"] == two["global_step"] == 4
    cfg = compose_train(*SAME)
    torch.manual_seed(cfg.seed)
    start = build_network(cfg.model, cfg.condconv, 10).state_dict()
    for name, value in one["state_dict"].items():
        if value.is_floating_point() and name.startswith("net."):
            moved = (value - start[name.removeprefix("net.")]).norm()
            assert (two["state_dict"][name] - value).norm() <= 1e-4 * moved + 1e-10 * value.norm(), name


def test_two_processes_measure_what_one_measures(trained: dict[int, Path]) -> None:
    """Every scene once; and nothing is said about figures that every process has."""
    one, two = ([row for row in read_metrics(trained[ranks]) if row.get("val/AP")] for ranks in (1, 2))
    assert len(one) == len(two) == 1
    for stage in ("val", "val_ema"):
        for key in FIGURES:
            assert float(two[0][f"{stage}/{key}"]) == pytest.approx(float(one[0][f"{stage}/{key}"]), abs=1e-6)
    assert float(one[0]["val/AR100"]) > 0  # with boxes found, equal figures mean something
    assert "sync_dist" not in said(trained[2], ranks=2)
