"""Experiments beside the ImageNet table (test_imagenet_recipes.py): train.py itself runs two steps of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from configs.resolvers import register_resolvers
from train import build_network, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = CONFIGS / "experiment"
UPCYCLED = sorted(path.stem for path in (EXPERIMENTS / "upcycle").glob("[!_]*.yaml"))
COCO = sorted(path.stem for path in (EXPERIMENTS / "coco").glob("[!_]*.yaml"))
STEPS = ("trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.precision=32-true", "trainer=cpu")
CLASSES, BATCH, SIZE = 10, 4, 32


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten classes with an image each for training and evaluation."""
    for part in ("train", "val"):
        for label in range(CLASSES):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "0.jpg")
    return tmp_path / "images"


def composed(experiment: str, tmp_path: Path, *overrides: str) -> DictConfig:
    register_resolvers()
    quiet = ("callbacks.progress=null", "callbacks.summary=null", "logger=none", f"paths.run={tmp_path / 'run'}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"experiment={experiment}", *STEPS, *quiet, *overrides])


def check_run(cfg: DictConfig, figures: dict[str, float], metric: str) -> None:
    assert torch.isfinite(torch.tensor(figures[metric]))
    checkpoint = torch.load(Path(cfg.paths.run) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_every_experiment_runs_somewhere_in_the_suite() -> None:
    found = {str(path.relative_to(EXPERIMENTS).parent) for path in EXPERIMENTS.rglob("[!_]*.yaml")}
    assert found == {".", "imagenet", "upcycle", "coco", "cifar10"}
    assert {path.stem for path in (EXPERIMENTS / "cifar10").glob("*.yaml")} == {"reduced", "upcycled", "full"}
    assert [path.stem for path in EXPERIMENTS.glob("*.yaml")] == ["cifar10_authors_miniature"]


def test_the_protocols_of_cifar10(images: Path, tmp_path: Path) -> None:
    """Static by the full protocol and, from its weights, with experts; the recipes are the reduced protocol's."""
    small = (f"data.root={images}", "data.batch_size_per_device=4", "data.num_workers=0", "model.width=0.1")
    cfg = composed("cifar10/full", tmp_path, "condconv.experts=0", *small)
    check_run(cfg, train(cfg), "test/loss")
    checkpoint = Path(cfg.paths.run) / "checkpoints" / "last.ckpt"
    for experts in (2, 0):  # the static network goes on as it is, beside the one with experts
        again = (f"pretrained={checkpoint}", f"condconv.experts={experts}", f"paths.run={tmp_path / f'e{experts}'}")
        cfg = composed("cifar10/upcycled", tmp_path, *small, *again)
        check_run(cfg, train(cfg), "test/loss")
        assert (cfg.data.max_train_per_class, cfg.model.small_input) == (2000, True)
        assert cfg.optim.lr == pytest.approx(cfg.optim.base_lr * 4 / 256)


@pytest.mark.parametrize("experts", [0, 2])
def test_the_miniature_of_the_authors_recipe(experts: int, images: Path, tmp_path: Path) -> None:
    small = ("data.batch_size_per_device=4", "callbacks.batchnorm.examples=2", "data.eval_batch_size_per_device=10")
    cfg = composed(
        "cifar10_authors_miniature", tmp_path, f"data.root={images}", f"condconv.experts={experts}", *small,
        "data.num_workers=0", "trainer.check_val_every_n_epoch=1", "model.width=0.1",
    )  # fmt: skip
    figures = train(cfg)
    check_run(cfg, figures, "test/loss")
    assert torch.isfinite(torch.tensor(figures["test_ema/loss"]))


def test_the_miniature_has_all_parts_of_the_recipe_on(tmp_path: Path) -> None:
    """And its scaled numbers are what the arithmetic in its header says."""
    cfg = composed("cifar10_authors_miniature", tmp_path, "data.root=nowhere")
    assert (cfg.task.label_smoothing, cfg.model.drop_rate, cfg.model.drop_path_rate) == (0.1, 0.25, 0.2)
    assert cfg.task.batch_transform.mixup_alpha == 0.2 and cfg.task.batch_transform.keep_larger
    assert (cfg.data.augment, cfg.data.normalize) == ("autoaugment_cifar10", "authors")
    assert cfg.model.timm_options == {"pad_type": "same", "bn_momentum": 0.01, "bn_eps": 0.001}
    assert (cfg.optim.optimizer.name, cfg.optim.optimizer.l2) == ("rmsprop_tf", 1e-5)
    assert (cfg.callbacks.batchnorm.examples, cfg.callbacks.average.ramp) == (32, True)
    steps = 10 * (CLASSES * cfg.data.max_train_per_class // cfg.data.batch_size_per_device)
    assert steps == 1560
    assert 1 / (1 - cfg.callbacks.average.decay) / steps == pytest.approx(10_000 / (350 * 625), rel=0.02)
    assert cfg.trainer.max_epochs / cfg.optim.schedule.decay_epochs == pytest.approx(350 / 2.4)
    assert cfg.optim.lr == pytest.approx(0.016 * 64 / 256)


@pytest.mark.parametrize(
    ("recipe", "augment"),
    [
        ("efficientnet_b0_static", "none"),
        ("efficientnet_b0_static_autoaugment", "autoaugment_v0"),
        ("efficientnet_b0_condconv8_autoaugment", "autoaugment_v0"),
    ],
)
def test_the_flag_for_autoaugment_means_the_policy_of_the_authors_code(
    recipe: str, augment: str, tmp_path: Path
) -> None:
    """Not the AutoAugment paper's table, which torchvision calls IMAGENET."""
    assert composed(f"imagenet/{recipe}", tmp_path, "data.root=nowhere").data.augment == augment


@pytest.mark.parametrize("backbone", UPCYCLED)
def test_upcycling(backbone: str, images: Path, tmp_path: Path) -> None:
    reduced = ["model.width=0.25" if backbone == "resnext50_32x4d" else "model.width=0.1"]
    reduced += [] if backbone == "mnasnet_a1" else ["model.depth=0.3"]
    small = [f"data.root={images}", "data.num_workers=0", f"data.image_size={SIZE}", "data.num_classes=10"]
    small += [f"data.batch_size_per_device={BATCH}", "condconv.experts=2", *reduced]
    weights = tmp_path / "static.pth"
    cfg = composed(f"upcycle/{backbone}", tmp_path, f"pretrained={weights}", *small)
    static = OmegaConf.merge(cfg.condconv, {"experts": 0, "init": "network"})
    torch.save(build_network(cfg.model, static, CLASSES).state_dict(), weights)
    check_run(cfg, train(cfg), "test/loss")


@pytest.mark.parametrize("recipe", COCO)
def test_detection(recipe: str, tmp_path: Path) -> None:
    """On scenes of digits, as COCO itself is not here."""
    small = ["data=digit_scenes", "data.batch_size_per_device=2", "data.num_workers=0", "trainer.max_epochs=1"]
    small += ["trainer.limit_val_batches=1", "test=false", "model.width=0.1"]
    cfg = composed(f"coco/{recipe}", tmp_path, *small)
    cfg.condconv.experts = min(cfg.condconv.experts, 2)
    check_run(cfg, train(cfg), "train/loss")
