"""The recipes of the paper's COCO table: headers, numbers, and that user settings win."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from condconv import CondConv2d
from configs.resolvers import register_resolvers
from train import build_network

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROWS = {f"ssd300_mobilenet_v1_{width}{kind}" for width in ("w050_", "w075_", "") for kind in ("static", "condconv8")}


def composed(recipe: str, *overrides: str) -> DictConfig:
    register_resolvers()
    root = [] if "data=digit_scenes" in overrides else ["data.root=/coco"]
    given = [f"experiment=coco/{recipe}", *root, "paths.run=nowhere", *overrides]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", given)


def test_the_rows_of_the_table_are_all_there() -> None:
    assert {path.stem for path in (CONFIGS / "experiment" / "coco").glob("[!_]*.yaml")} == ROWS


@pytest.mark.parametrize("recipe", sorted(ROWS))
def test_headers_and_networks(recipe: str) -> None:
    header = (CONFIGS / "experiment" / "coco" / f"{recipe}.yaml").read_text().split("defaults:")[0]
    assert f"# Command: python train.py experiment=coco/{recipe} data.root=/coco" in header
    for word in ("# Published: ", "# Ours: not run", "# Hyperparameters: "):
        assert header.count(word) == 1, word
    cfg = composed(recipe)
    width = {"w050": 0.5, "w075": 0.75}.get(recipe.split("_")[3], 1.0)
    assert (cfg.model.width, cfg.condconv.experts) == (width, 8 if "condconv8" in recipe else 0)
    assert cfg.data._target_ == "data.coco.CocoDataModule" and cfg.model.image_size == 300
    net = build_network(cfg.model, cfg.condconv, 80)
    assert net.anchors.shape == (1917, 4)
    in_head = any(isinstance(module, CondConv2d) for module in net.head.modules())
    assert in_head == ("condconv8" in recipe)


@pytest.mark.parametrize("width", ["", "w050_", "w075_"])
def test_twins_differ_in_their_experts_alone(width: str) -> None:
    """So that a report pairs them; and routers start as in all rows of the paper's tables."""
    static, ours = (composed(f"ssd300_mobilenet_v1_{width}{kind}") for kind in ("static", "condconv8"))
    assert (ours.model.condconv_extras, ours.condconv.router_gain) == (True, 1.0)
    for cfg in (static, ours):
        cfg.condconv.experts = 0
    assert static == ours


def test_the_object_detection_apis_numbers() -> None:
    cfg = composed("ssd300_mobilenet_v1_static", "trainer=ddp", "trainer.devices=8")
    assert cfg.batch_size == 1024 and cfg.optim.optimizer.lr == pytest.approx(0.9)
    assert (cfg.optim.optimizer.momentum, cfg.optim.optimizer.nesterov, cfg.optim.optimizer.l2) == (0.9, False, 4e-5)
    assert cfg.trainer.max_epochs * 118_287 / 1024 == pytest.approx(20_000, rel=0.005)
    assert cfg.optim.schedule.warmup_epochs * 118_287 / 1024 == pytest.approx(1_000, rel=0.005)
    assert (cfg.task.alpha, cfg.task.gamma, cfg.model.loss, cfg.model.iou_threshold) == (0.75, 2.0, "focal", 0.6)
    assert dict(cfg.model.timm_options) == {"bn_eps": 0.001, "bn_momentum": 0.03}


def test_users_win_over_recipes() -> None:
    cfg = composed("ssd300_mobilenet_v1_condconv8", "model=ssd_resnet50", "data=digit_scenes", "optim=adamw")
    assert cfg.model.name == "ssd_resnet50" and cfg.data._target_ == "data.digit_scenes.DigitScenesDataModule"
    assert cfg.optim.optimizer.name == "adamw"


@pytest.mark.parametrize("recipe", ["ssd300_mobilenet_v1_static", "ssd300_mobilenet_v1_w050_condconv8"])
def test_recipes_run_on_the_scenes_too(recipe: str) -> None:
    """Nothing that only COCO's data has is set by a recipe."""
    cfg = composed(recipe, "data=digit_scenes")
    assert instantiate(cfg.data).image_size == cfg.model.image_size == 300
    assert cfg.data.batch_size_per_device == 128
