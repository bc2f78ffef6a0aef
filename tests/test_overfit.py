"""`debug=overfit` for every backbone: one that cannot learn a single batch by heart is broken somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from models import list_backbones
from train import register_resolvers, train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FAST = ("mobilenet_v1", 8)
CASES = [
    pytest.param(backbone, experts, marks=() if (backbone, experts) == FAST else pytest.mark.slow)
    for backbone in list_backbones()
    for experts in (0, 8)
]


@pytest.mark.parametrize(("backbone", "experts"), CASES)
def test_one_batch_is_learned_by_heart(backbone: str, experts: int, tmp_path: Path) -> None:
    """Fewer channels and blocks, 16 digits; the preset itself as users have it."""
    register_resolvers()
    reduced = ["model.width=0.25", *(() if backbone == "mnasnet_a1" else ("model.depth=0.5",))]
    run = [f"paths.run={tmp_path}", "callbacks=none", "trainer=cpu", "data.batch_size_per_device=16"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [f"model={backbone}", f"condconv.experts={experts}", *reduced, "debug=overfit", *run])
    figures = train(cfg)
    assert figures["train/top1"] > 0.99, figures
