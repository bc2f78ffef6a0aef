"""Every config of every group composes, resolves and builds on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.checks import check_arguments
from configs.resolvers import calc
from models import list_backbones
from train import register_resolvers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# configs/wandb/ holds sweeps in W&B's own form: tests/sweeps/test_wandb.py
GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and not p.name.startswith("_") and p.name != "wandb")
# What a user has to give, and what eval.py alone uses.
REQUIRED = {
    "ckpt": "last.ckpt",
    "data.root": "/images",
    "model.arch": "resnet18",
    "pretrained": "static.pth",
    **{f"data.{part}_{what}": "there" for part in ("train", "val") for what in ("images", "annotations")},
}
FOR_EVAL = {"data/as_trained", "model/as_trained", "condconv/as_trained"}

register_resolvers()


def choices(group: str) -> list[str]:
    """Names of the configs of a group, those in subfolders included."""
    return sorted(str(path.relative_to(CONFIGS / group).with_suffix("")) for path in (CONFIGS / group).rglob("*.yaml"))


ALL = [f"{group}/{name}" for group in GROUPS for name in choices(group)]


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=True)


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if isinstance(node.get("_target_"), str) else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


def dotted(node: object, prefix: str = "") -> list[str]:
    """The keys of nested dictionaries, of groups too."""
    found = [(f"{prefix}{key}", value) for key, value in node.items()] if isinstance(node, dict) else []
    return [name for key, value in found for name in (key, *dotted(value, f"{key}."))]


@pytest.mark.parametrize("config", [name for name in ALL if name not in FOR_EVAL and not name.startswith("hydra/")])
def test_every_config_composes_and_resolves(config: str) -> None:
    group, _, name = config.partition("/")
    cfg = compose_config(f"{group}={name}", name="eval" if group == "analysis" else "train")
    del cfg.hydra
    for key in OmegaConf.missing_keys(cfg):
        assert key in REQUIRED, f"{config} leaves {key} open"
        OmegaConf.update(cfg, key, REQUIRED[key])
    plain = OmegaConf.to_container(cfg, resolve=True)
    check_arguments(cfg)
    for target in targets(plain):
        get_method(target) if target.rpartition(".")[2].islower() else get_class(target)


def test_eval_config_composes_and_needs_only_a_checkpoint() -> None:
    cfg = compose_config(name="eval")
    del cfg.hydra
    assert OmegaConf.missing_keys(cfg) == {"ckpt"}


@pytest.mark.parametrize("name", ["eval", "predict", "export"])
def test_each_command_has_its_own_help(name: str) -> None:
    """Every key that it names is one of the command, and every key of the command is named."""
    cfg = compose_config(name=name)
    text = cfg.hydra.help.template
    named = re.findall(r"(?<![\w.])([a-z][\w.]*)=([\w|]*)", text)
    del cfg.hydra
    known = set(dotted(OmegaConf.to_container(cfg, resolve=False)))
    for key, value in named:
        assert key in known, f"there is no {key}="
        if key in GROUPS and "|" in value:
            assert set(value.split("|")) <= set(choices(key))
    internal = {"paths", "name", "resume"}
    assert {str(key) for key in cfg} - internal <= {key.partition(".")[0] for key, _ in named}
    assert f"python {name}.py" in text and "train.py model=" not in text and "optim=" not in text


def test_every_backbone_has_a_config() -> None:
    networks = {*list_backbones(), "timm"}
    assert set(choices("model")) == {*networks, *(f"ssd_{name}" for name in networks), "as_trained"}


def test_the_command_of_the_readme() -> None:
    cfg = compose_config("model=efficientnet_b0", "condconv.experts=8")
    assert cfg.model.name == "efficientnet_b0" and cfg.condconv.experts == 8
    assert cfg.data._target_ == "data.digits.DigitsDataModule" and cfg.data.image_size == 32


@pytest.mark.parametrize("model", ["ssd_mobilenet_v1", "ssd_resnet18"])
def test_a_detector_brings_its_data_and_task(model: str) -> None:
    cfg = compose_config(f"model={model}", "condconv.experts=8")
    assert cfg.model.name == model and cfg.data._target_ == "data.digit_scenes.DigitScenesDataModule"
    assert cfg.task._target_ == "models.detection.DetectionModule" and cfg.callbacks.checkpoint.monitor == "val/AP"
    assert cfg.model.image_size == cfg.data.image_size
    assert compose_config("data=coco", f"model={model}", "data.root=/coco").data._target_ == "data.coco.CocoDataModule"
    assert compose_config(f"model={model}", "optim=sgd", "data.image_size=96").model.image_size == 96
    assert compose_config("model=resnet18").callbacks.checkpoint.monitor == "val/top1"


@pytest.mark.parametrize("typo", ["condconv.expert=4", "trainer.max_epoch=3", "data.batchsize=3", "sed=1"])
def test_a_typo_is_an_error(typo: str) -> None:
    with pytest.raises(Exception, match="Could not override"):
        compose_config(typo)


def test_only_paths_and_data_hold_paths() -> None:
    """Elsewhere a path is an interpolation of them."""
    pathlike = re.compile(r"(^|[\s\"'=])(\.{0,2}/\w|~/|[A-Za-z]:\\)")
    for config in ALL:
        if config.split("/")[0] in ("paths", "data", "hydra", "experiment"):
            continue
        for line in (CONFIGS / f"{config}.yaml").read_text().splitlines():
            code = line.split(" #")[0]
            if code.lstrip().startswith(("#", "- override /")):
                continue
            assert not pathlike.search(code), f"{config}: {line}"


def values(node: object) -> list[object]:
    """What the keys of a config file are set to; a list of defaults names configs, not values."""
    if isinstance(node, dict):
        return [each for key, value in node.items() if key != "defaults" for each in values(value)]
    return [each for value in node for each in values(value)] if isinstance(node, list) else [node]


MACHINE_PATH = re.compile(r"(^|,)\s*(/|~|[A-Za-z]:[\\/])")
"""At the start, or as what an interpolation falls back on."""


@pytest.mark.parametrize("value", ["/data/images", "~/runs", "C:\\data", "d:/data", "${oc.env:DATA,/data}"])
def test_paths_of_a_machine_are_recognised(value: str) -> None:
    assert MACHINE_PATH.search(value)
    assert not any(MACHINE_PATH.search(fine) for fine in ("???", "${paths.data}/coco", "${oc.env:DATA,.data}", "a/b"))


def test_no_value_is_a_path_of_a_machine() -> None:
    seen = set()
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS))
        for value in values(yaml.safe_load(path.read_text())):
            assert not (isinstance(value, str) and MACHINE_PATH.search(value)), f"{name}: {value}"
            seen.add(name.split("/")[0])
    assert {"paths", "data", "experiment", "train.yaml"} <= seen


@pytest.mark.parametrize("group", ["callbacks", "logger", "trainer", "model", "data"])
def test_no_secret_in_a_config(group: str) -> None:
    for name in choices(group):
        text = (CONFIGS / group / f"{name}.yaml").read_text()
        assert yaml.safe_load(text) is not None
        assert not re.search(r"(api_?key|token|password):", text)


def test_learning_rates_are_scaled_by_the_global_batch() -> None:
    plain = compose_config("optim=rmsprop", "data.batch_size_per_device=256")
    assert plain.batch_size == 256 and plain.optim.optimizer.lr == pytest.approx(0.016)
    scaled = compose_config(
        "optim=rmsprop", "data.batch_size_per_device=128", "trainer.devices=8", "trainer.accumulate_grad_batches=2"
    )
    assert scaled.batch_size == 2048 and scaled.optim.optimizer.lr == pytest.approx(0.016 * 2048 / 256)
    assert compose_config("optim.lr=0.5").optim.optimizer.lr == 0.5


def test_the_rate_of_a_detector_follows_its_base_and_the_width() -> None:
    for given, lr in ((), 0.003 / 0.25), (("model.width=1.0",), 0.003), (("optim.base_lr=0.001",), 0.001 / 0.25):
        assert compose_config("model=ssd_mobilenet_v1", "data.batch_size_per_device=8", *given).optim.optimizer.lr == lr


def test_calc_is_arithmetic_and_nothing_else() -> None:
    assert calc("0.016 * 2048 / 256") == pytest.approx(0.128)
    assert calc("-(2 + 3) // 2") == -3 and isinstance(calc("64 * 2"), int)
    assert calc("min(128, 2048 // 32)") == 64 and isinstance(calc("min(128, 64)"), int)
    more = ("max(1, 2)", "min(1)", "min(*(1, 2))", "min(1, 2, key=3)")
    for evil in (*more, "__import__('os')", "2 ** 9", "a + 1", "1 if 2 else 3", "'a' * 3", "True + 1", "1 +", "1 / 0"):
        with pytest.raises(ValueError, match="calc"):
            calc(evil)


def test_an_unresolvable_reference_is_an_error() -> None:
    cfg = compose_config()
    OmegaConf.update(cfg, "optim.lr", "${no.such.key}")
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.to_container(cfg.optim, resolve=True)
