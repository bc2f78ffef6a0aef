"""Ours beside the published figures: only whole networks on the whole of the same data, at the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from run_folders import write_run

from reports.comparison import compare
from reports.published import NOT_RUN, published
from reports.runs import read_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def ours(root: Path, data: str, metric: str = "top1", **changes: Any) -> list[str]:
    """What stands beside the published figures after one run, static, width 1, with a config of `configs/data`."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        settings = OmegaConf.to_container(compose("train", [f"data={data}"]).data, resolve=False)
    model = {"top1": "mobilenet_v1", "AP": "ssd_mobilenet_v1"}[metric]
    changes = {"data": settings, "model.name": model, "model.width": 1.0, **changes}
    figures = {f"{part}/{metric}": 0.7123 for part in ("test", "val", "train")}
    folder = write_run(root, 0, overrides=changes, folder="run", figures=figures)
    return [entry.ours for entry in published(compare([read_run(folder)])) if entry.ours != NOT_RUN]


def test_whole_runs_on_the_same_data_stand_beside(tmp_path: Path) -> None:
    assert ours(tmp_path / "a", "imagenet") == ["71.23 (n = 1)"]
    assert ours(tmp_path / "b", "coco", "AP") == ["71.23 (n = 1)"]
    assert ours(tmp_path / "c", "imagenet", **{"data.holdout": 0}) == ["71.23 (n = 1)"]


@pytest.mark.parametrize(
    ("data", "metric", "changes"),
    [
        ("imagefolder", "top1", {}),
        ("cifar100", "top1", {}),
        ("digits", "top1", {}),
        ("coco_json", "AP", {}),
        ("coco", "AP", {"data.max_train": 100}),
        ("imagenet", "top1", {"data.holdout": 50}),
        ("imagenet", "top1", {"data.max_val_per_class": 5}),
        ("imagenet", "top1", {"trainer.limit_test_batches": 0.5}),
        ("imagenet", "top1", {"trainer.limit_test_batches": 1}),
        ("imagenet", "top1", {"model.width": 0.75}),
        ("imagenet", "top1", {"data.image_size": 64}),
        ("coco", "AP", {"data.image_size": 512}),
    ],
)
def test_other_data_parts_and_sizes_do_not(tmp_path: Path, data: str, metric: str, changes: dict[str, Any]) -> None:
    assert ours(tmp_path, data, metric, **changes) == []
