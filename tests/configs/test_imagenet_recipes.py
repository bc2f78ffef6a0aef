"""Every ImageNet recipe: its header, its numbers, and two steps of real training with all its parts at reduced size."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, TensorDataset

from configs.checks import check_batch
from configs.messages import UserError
from configs.resolvers import register_resolvers
from models.ema import CHECKPOINT_KEY
from models.optim import parameter_roles
from train import build_network

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "experiment" / "imagenet").glob("[!_]*.yaml"))
# Images per step.
STEPS = {
    "imagenet/efficientnet_b0_condconv8": 2048,
    "imagenet/mobilenet_v1_condconv8": 2048,
    "imagenet/resnet50_condconv8": 1024,
    "imagenet/modern_mobilenet_v1": 1024,
    "imagenet/modern_resnet18": 1024,
    "upcycle/resnet18": 1024,
}
CLASSES, BATCH, SIZE = 10, 4, 32


@cache
def composed(recipe: str, *overrides: str) -> DictConfig:
    register_resolvers()
    experiment = recipe if "/" in recipe else f"imagenet/{recipe}"
    given = [f"experiment={experiment}", "data.root=nowhere", "paths.run=nowhere", "logger=none", *overrides]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", given)


def test_the_rows_of_the_table_are_all_there() -> None:
    rows = {
        *("efficientnet_b0_static", "efficientnet_b0_condconv4", "efficientnet_b0_condconv8"),
        *("efficientnet_b0_depth_condconv8", "mobilenet_v2_condconv8_paper_cost"),
        *(f"{model}_static" for model in ("mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "resnet50")),
        *(f"{model}_condconv8" for model in ("mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "resnet50")),
        *(f"mobilenet_v1_w{width}_{kind}" for width in ("025", "050") for kind in ("static", "condconv8")),
    }
    models = {path.stem for path in (CONFIGS / "model").glob("[!s]*.yaml")} - {"timm"}
    assert rows | {f"modern_{model}" for model in models - {"as_trained"}} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_headers_say_what_to_expect(recipe: str) -> None:
    header = (CONFIGS / "experiment" / "imagenet" / f"{recipe}.yaml").read_text().split("defaults:")[0]
    assert f"# Command: python train.py experiment=imagenet/{recipe} data.root=" in header
    for word in ("# Published: ", "# Ours: ", "# Hyperparameters: ", "# Estimate, not measured: "):
        assert header.count(word) == 1, word


def test_the_authors_recipe_is_theirs() -> None:
    """The recipe of the authors' EfficientNet code, number by number, as it reaches the objects."""
    cfg = composed("efficientnet_b0_condconv8", "trainer=ddp", "trainer.devices=8")
    assert (cfg.batch_size, cfg.trainer.accumulate_grad_batches, cfg.optim.lr) == (2048, 2, pytest.approx(0.128))
    assert (cfg.trainer.max_epochs, cfg.task.label_smoothing, cfg.trainer.precision) == (350, 0.1, "bf16-mixed")
    assert (cfg.data.normalize, cfg.data.image_size, cfg.data.crop_fraction) == ("authors", 224, 0.875)
    assert (cfg.data.augment, cfg.task.batch_transform) == ("none", None)
    net = build_network(cfg.model, cfg.condconv, CLASSES)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 0.001)}
    assert type(net.conv_stem).__name__ == "Conv2dSame"
    assert net.drop_rate == 0.25
    assert net.blocks[-1][-1].drop_path.drop_prob == pytest.approx(0.2 * 15 / 16)
    optimizer = instantiate(cfg.optim.optimizer, _convert_="all")(net)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "norm": 0.0,
        **dict.fromkeys(("bias", "router", "expert", "weight"), 1e-5),
    }
    wanted = {"lr": 0.128, "alpha": 0.9, "momentum": 0.9, "eps": 0.001, "decoupled_decay": False}
    assert wanted.items() <= {key: optimizer.param_groups[0][key] for key in wanted}.items()
    schedule = instantiate(cfg.optim.schedule)(steps_per_epoch=625, total_epochs=350)
    assert [schedule(step) for step in (0, 1000, 3125, 4500)] == pytest.approx([0, 0.32, 0.97**2, 0.97**3])
    average = instantiate(cfg.callbacks.average)
    assert (average.decay, average.ramp) == (0.9999, True)
    assert cfg.callbacks.batchnorm.examples == 128


@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (1, 8), (4, 8)])
@pytest.mark.parametrize(("experiment", "step"), STEPS.items(), ids=[name.replace("/", "-") for name in STEPS])
def test_a_step_is_the_recipes_on_any_number_of_gpus(experiment: str, step: int, nodes: int, devices: int) -> None:
    """One experiment for each shared file that says how many images a step has."""
    cfg = copy.deepcopy(composed(experiment, "pretrained=static.pth"))
    OmegaConf.update(cfg, "trainer.devices", devices)
    OmegaConf.update(cfg, "trainer.num_nodes", nodes)
    check_batch(cfg)
    assert cfg.data.batch_size_per_device == min(128, step // (nodes * devices))
    assert cfg.batch_size == step and cfg.optim.optimizer.lr == pytest.approx(cfg.optim.base_lr * step / 256)


def test_accumulation_follows_the_users_batch() -> None:
    cfg = composed("efficientnet_b0_condconv8", "trainer.devices=8", "data.batch_size_per_device=32")
    assert (cfg.trainer.accumulate_grad_batches, cfg.batch_size) == (8, 2048)
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, "trainer.devices", 6)
    assert (cfg.trainer.accumulate_grad_batches, cfg.batch_size) == (10, 1920), "as many as fit"
    assert cfg.optim.lr == pytest.approx(0.016 * 1920 / 256)
    OmegaConf.update(cfg, "data.batch_size_per_device", 512)
    with pytest.raises(UserError, match=r"data\.batch_size_per_device=512 on 6 device\(s\) is 3072 images"):
        check_batch(cfg)


def reduced(recipe: str) -> DictConfig:
    """Fewer channels, blocks, classes and experts, small images; everything else as in the recipe."""
    cfg = copy.deepcopy(composed(recipe))
    OmegaConf.resolve(cfg.optim)
    cfg.model.width = 0.25 if cfg.model.name == "resnext50_32x4d" else 0.1  # a group needs a channel
    if cfg.model.name != "mnasnet_a1":
        cfg.model.depth = 0.3
    cfg.condconv.experts = min(cfg.condconv.experts, 2)
    cfg.data.batch_size_per_device = BATCH
    if cfg.callbacks.batchnorm.examples is not None:
        cfg.callbacks.batchnorm.examples = BATCH // 2
    return cfg


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe: str, tmp_path: Path) -> None:
    cfg = reduced(recipe)
    net = build_network(cfg.model, cfg.condconv, CLASSES)
    parts = {key: instantiate(cfg.optim[key], _convert_="all") for key in ("optimizer", "schedule")}
    module = instantiate(cfg.task, _partial_=True)(net, CLASSES, **parts)
    callbacks = [instantiate(cfg.callbacks[key]) for key in ("average", "batchnorm")]
    images = torch.randn(2 * BATCH, 3, SIZE, SIZE)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % CLASSES), batch_size=BATCH)
    start = {name: value.clone() for name, value in net.named_parameters()}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == 2
    # The first step has learning rate 0, the second moves every kernel and router. (Not every bias: BatchNorm after a
    # linear layer takes its effect away.)
    kernels = {name for name, role in parameter_roles(net).items() if role in ("expert", "router", "weight")}
    still = [name for name, value in net.named_parameters() if name in kernels and torch.equal(value, start[name])]
    assert not still, still
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint[CHECKPOINT_KEY]["num_updates"] == 2
