"""Checks of a composed config before anything is built: each mistake gets one sentence that says what to do.

What only the builders can know (a missing folder, a placement that matches nothing) they say themselves.
"""

from __future__ import annotations

import math
import os
import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import condconv
from condconv.routing import ROUTINGS
from condconv.upcycle import UPCYCLES
from configs.arguments import accepted
from configs.messages import UserError, did_you_mean

MOST_EXPERTS = 1024
REGULARIZERS = ("task.label_smoothing", "model.drop_rate", "model.drop_path_rate", "condconv.dropout")
REGULARIZERS += ("condconv.expert_dropout", "optim.optimizer.weight_decay", "optim.optimizer.l2")
SECRET = re.compile(r"api_?key|token|password|passwd|secret|credential", re.IGNORECASE)


def check_train(cfg: DictConfig) -> None:
    """Check the config of train.py, and set regularisers to 0 where it asks for that.

    Raises:
        UserError: the first mistake found.
    """
    if cfg.data.get("_target_") is None:
        raise UserError("data=as_trained is for eval.py; choose a data set: data=digits, data=imagenet data.root=...")
    check_batch(cfg)
    check_complete(cfg)
    without_regularization(cfg)
    check_no_secrets(cfg)
    check_arguments(cfg)
    check_condconv(cfg.condconv)
    check_pretrained(cfg)
    for key in ("task.label_smoothing", "model.drop_rate", "model.drop_path_rate"):
        _number(cfg, key, "at least 0 and below 1", lambda x: 0 <= x < 1)
    for key in ("optim.lr", "optim.base_lr"):
        _number(cfg, key, "a number above 0", lambda x: 0 < x < math.inf)
    check_seed(cfg)
    check_trainer(cfg.trainer)
    check_precision(cfg.trainer.precision, "weights of 16 bits lose the small steps of an optimiser")
    if cfg.trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on: use eval.py to evaluate alone.")
    check_writable(Path(cfg.paths.run))


def check_eval(cfg: DictConfig) -> None:
    """Check the config of eval.py, the checkpoint itself aside.

    Raises:
        UserError: the first mistake found.
    """
    if cfg.pretrained is not None:
        if not OmegaConf.is_missing(cfg, "ckpt"):
            raise UserError("ckpt= and pretrained= exclude each other: a checkpoint of train.py, or a file of weights.")
        cfg.ckpt = None
        if cfg.data.get("_target_") is None:
            raise UserError("pretrained= needs a data set: data=digits, data=imagenet data.root=...")
    else:
        given = [key for key, value in cfg.condconv.items() if value is not None and key != "backend"]
        if given or cfg.model.name is not None:
            key = f"condconv.{given[0]}" if given else "model"
            raise UserError(f"{key}= does not go with ckpt=: the network comes from the checkpoint's own config.")
    check_complete(cfg)
    check_seed(cfg)
    check_trainer(cfg.trainer)
    check_precision(cfg.trainer.precision, "the mean loss and a detector's anchors would be rounded to 16 bits too")
    check_analysis(cfg)


def check_analysis(cfg: DictConfig) -> None:
    """A closer look at a network is taken by one process, at a network that is not compiled."""
    if cfg.analysis.get("_target_") is None:
        if "wandb" in cfg.logger:
            raise UserError("logger=wandb is for analysis=routing: an evaluation alone prints its figures.")
        return
    if cfg.trainer.devices * cfg.trainer.num_nodes > 1:
        raise UserError("analysis= runs in one process: add trainer.devices=1 trainer.num_nodes=1.")
    if cfg.compile:
        raise UserError("analysis= changes routing inside the network, which compile=true would not see: leave it out.")


def check_export(cfg: DictConfig, is_detector: bool, has_data: bool) -> None:
    """What export.py is asked for goes together, and with the network.

    Args:
        cfg: the config.
        is_detector: of the network.
        has_data: the checkpoint says which data it was trained on.
    """
    if cfg.int8 and (cfg.format != "onnx" or is_detector):
        raise UserError("int8=true goes with format=onnx, and with classifiers alone.")
    if cfg.int8 and cfg.data.get("_target_") is None and not has_data:
        raise UserError("int8=true needs images to calibrate with, and a file of weights names none: add data=...")
    if cfg.dynamic_size and cfg.format != "onnx":
        raise UserError("dynamic_size=true goes with format=onnx.")
    if cfg.format in ("hub", "timm") and is_detector:
        raise UserError(f"format={cfg.format} is for classifiers alone: take safetensors, onnx or torch_export.")


def check_predict(cfg: DictConfig, is_detector: bool) -> None:
    """What predict.py is asked for goes with the network."""
    for key in ("batch_size", "top"):
        check_whole(cfg, key, 1)
    if cfg.pictures and not is_detector:
        raise UserError("pictures= is of detectors: a classifier has no boxes to draw.")


def check_classes(cfg: DictConfig, saved: DictConfig, data: Any) -> int:
    """The number of classes of the evaluated network, which the data must have too, under the same names.

    Names that are missing, or mere numbers as of shards without classes.txt, say nothing. Other names than the
    network's are a warning: the same classes may be named in several ways, but not a detector's categories.

    Args:
        cfg: of eval.py.
        saved: `model.num_classes` (None: the data's) and `class_names` of the network.
        data: the data module.
    """
    network, count = f"The network of {cfg.ckpt or cfg.pretrained}", data.num_classes
    instead = "evaluate it on the data it was trained for, or on a set with the same classes."
    if saved.model.num_classes not in (None, 0, count):
        raise UserError(f"{network} has {saved.model.num_classes} classes, the data {count}: {instead}")
    known, found = list(saved.class_names), list(data.class_names)
    if known == found or len(known) != count or any(all(n.isdecimal() for n in names) for names in (known, found)):
        return int(count)
    which = next(i for i, pair in enumerate(zip(known, found, strict=True)) if pair[0] != pair[1])
    example = f"class {which} is {known[which]!r} to it and {found[which]!r} in the data"
    if sorted(known) == sorted(found):
        raise UserError(f"{network} has its classes in another order than the data ({example}): {instead}")
    if hasattr(data, "category_ids"):
        raise UserError(f"{network} has other categories than the data ({example}): {instead}")
    warnings.warn(
        f"{network} names its classes otherwise ({example}): the figures hold if they are the same.", stacklevel=2
    )
    return int(count)


def classes_of(data: Any, cfg: DictConfig) -> int:
    """The number of classes of a network to be trained: the data's.

    Raises:
        UserError: the config has another one.
    """
    asked, count = cfg.model.num_classes, int(data.num_classes)
    if asked not in (None, count):
        instead = (
            "leave it out: the network has as many as the data." if cfg.resume is None else "resume it on its own."
        )
        raise UserError(f"model.num_classes={asked}, but the data has {count} classes; {instead}")
    return count


def check_complete(cfg: DictConfig) -> None:
    """Every required value (`???`) is given, and every interpolation resolves."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given: add {' '.join(f'{key}=...' for key in missing)}")
    OmegaConf.to_container(cfg, resolve=True)


def check_no_secrets(cfg: DictConfig) -> None:
    """No key holds a password: the config is saved beside the checkpoints, inside them and in W&B."""

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if SECRET.search(str(key)) and isinstance(value, str) and value:
                    raise UserError(
                        f"{path}{key} looks like a secret, and configs are saved in the clear. Remove it; for W&B use "
                        f"`wandb login` or the environment variable WANDB_API_KEY."
                    )
                walk(value, f"{path}{key}.")
        elif isinstance(node, list):
            for value in node:
                walk(value, path)

    walk(OmegaConf.to_container(cfg, resolve=True), "")


def check_arguments(cfg: DictConfig) -> None:
    """What a config builds takes all that is set for it.

    An experiment sets values of the data it was written for; Hydra puts them into any other data just as well.
    """
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() and cfg.resume is None else {}

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            return
        if isinstance(node.get("_target_"), str) and (known := accepted(node["_target_"])) is not None:
            unknown = [f"{path}.{key}" for key in node if not key.startswith("_") and key not in known]
            if unknown:
                group = path.partition(".")[0]
                name = f"{group}={chosen[group]}" if chosen.get(group) else node["_target_"]
                setter = f"experiment={chosen['experiment']}" if chosen.get("experiment") else "a file"
                names = [f"{path}.{key}" for key in sorted(known)]
                hint = did_you_mean(unknown[0], names) if len(unknown) == 1 else ""
                raise UserError(
                    f"{name} has no {', '.join(unknown)}, which {setter} or the command line sets. {hint}Choose "
                    f"another {group}=, or leave out what does not go with it: {' '.join(f'~{key}' for key in unknown)}"
                )
        for key, value in node.items():
            walk(value, f"{path}.{key}" if path else str(key))

    walk(OmegaConf.to_container(cfg), "")


def check_condconv(cfg: DictConfig) -> None:
    """Experts, routing, backend and the rates of the `condconv` group."""
    experts = cfg.experts
    if isinstance(experts, bool) or not isinstance(experts, int) or not 0 <= experts <= MOST_EXPERTS:
        raise UserError(
            f"condconv.experts={experts}: expected a whole number from 0 (the static network) to {MOST_EXPERTS}."
        )
    check_choice("condconv.routing", cfg.routing, list(ROUTINGS))
    check_choice("condconv.backend", cfg.backend, list(condconv.list_backends()))
    for key in ("dropout", "expert_dropout"):
        _number(cfg, key, "at least 0 and below 1", lambda x: 0 <= x < 1, prefix="condconv.")
    _number(cfg, "temperature", "a number above 0", lambda x: 0 < x < math.inf, prefix="condconv.")
    _number(cfg, "router_gain", "a number of at least 0", lambda x: 0 <= x < math.inf, prefix="condconv.")


def check_pretrained(cfg: DictConfig) -> None:
    """What starts from trained weights has some; a resumed run has its own, in its checkpoint."""
    if cfg.resume is not None or cfg.pretrained is not None:
        return
    if cfg.condconv.experts and cfg.condconv.init in UPCYCLES:
        raise UserError(
            f"condconv.init={cfg.condconv.init} makes experts of a trained static network: add pretrained=... "
            "(docs/weights.md), or leave it out to start from random weights."
        )
    if cfg.new_classifier:
        raise UserError("new_classifier=true is for pretrained=...: without it all weights are random.")


def check_seed(cfg: DictConfig) -> None:
    """Seeds are what numpy takes: 0 to 2^32 - 1."""
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: expected a whole number from 0 to {2**32 - 1}.")


def check_trainer(cfg: DictConfig) -> None:
    """Lengths, devices and the accelerator that this machine must have."""
    for key in ("accumulate_grad_batches", "num_nodes", "check_val_every_n_epoch", "log_every_n_steps"):
        check_whole(cfg, key, 1, "trainer.")
    if cfg.max_steps == -1:
        check_whole(cfg, "max_epochs", 1, "trainer.")
    else:
        check_whole(cfg, "max_steps", 1, "trainer.")
    check_choice("trainer.accelerator", cfg.accelerator, ["auto", "cpu", "gpu", "cuda", "mps", "tpu"])
    check_whole(cfg, "devices", 1, "trainer.")
    gpus = torch.cuda.device_count()
    if cfg.accelerator in ("gpu", "cuda") and gpus == 0:
        raise UserError(f"trainer.accelerator={cfg.accelerator}, but torch sees no GPU here: use trainer=cpu.")
    if cfg.accelerator in ("auto", "gpu", "cuda") and cfg.devices > max(gpus, 1):
        found = f"{gpus} GPU{'s' if gpus != 1 else ''}"
        raise UserError(
            f"trainer.devices={cfg.devices}, but this machine has {found}: use trainer.devices={max(gpus, 1)}. "
            f"(Several processes on a CPU, for tests: trainer=ddp trainer.accelerator=cpu trainer.precision=32-true.)"
        )


def check_precision(precision: str, reason: str) -> None:
    """Not the whole module in 16 bits: Lightning rounds its buffers too, those of figures and anchors included."""
    if precision in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={precision}: {reason}. Use trainer.precision={precision.removesuffix('true')}mixed, "
            "which computes in 16 bits all the same."
        )


def check_batch(cfg: DictConfig) -> None:
    """Images of each device and of a step; before the learning rates, which follow from them."""
    for key in ("devices", "num_nodes"):
        check_whole(cfg.trainer, key, 1, "trainer.")
    check_whole(cfg, "data.batch_size_per_device", 1)
    batch, devices = cfg.data.batch_size_per_device, cfg.trainer.devices * cfg.trainer.num_nodes
    if OmegaConf.is_interpolation(cfg.trainer, "accumulate_grad_batches") and cfg.trainer.accumulate_grad_batches == 0:
        raise UserError(
            f"data.batch_size_per_device={batch} on {devices} device(s) is {batch * devices} images at once, more than "
            f"a step of this recipe has. Leave it to the recipe or set it lower; or, with "
            f"trainer.accumulate_grad_batches=1, take larger steps, at a higher rate."
        )
    check_whole(cfg, "trainer.accumulate_grad_batches", 1)
    check_whole(cfg, "batch_size", 1)


def check_writable(folder: Path) -> None:
    """The run's folder can be made and written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"  # several processes may look at once
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"Cannot write to the output folder {folder}: {reason}. Set paths.outputs=...") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write to the output folder {folder}. Set paths.outputs=...")


def check_choice(key: str, value: Any, choices: list[str]) -> None:
    """A value that must be one of a few names."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UserError(f"{key}={value}: there is no such choice. {hint}Choose one of: {', '.join(choices)}.")


def without_regularization(cfg: DictConfig) -> None:
    """Set every regulariser that the config has to 0, where it asks for that; and leave out mixup and cutmix."""
    if cfg.regularization:
        return
    for key in REGULARIZERS:
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, 0.0)
    if OmegaConf.select(cfg, "optim.optimizer.decay_by_role") is not None:  # it would win over weight_decay and l2
        cfg.optim.optimizer.decay_by_role = {}
    if OmegaConf.select(cfg, "task.batch_transform") is not None:  # of mixed images there is no train/top1 either
        cfg.task.batch_transform = None


def check_whole(cfg: DictConfig, key: str, smallest: int, prefix: str = "") -> None:
    """A whole number that is not too small."""
    value = OmegaConf.select(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise UserError(f"{prefix}{key}={value}: expected a whole number of at least {smallest}.")


def _number(cfg: DictConfig, key: str, expected: str, holds: Callable[[float], bool], prefix: str = "") -> None:
    value = OmegaConf.select(cfg, key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not holds(value)):
        raise UserError(f"{prefix}{key}={value}: expected {expected}.")
