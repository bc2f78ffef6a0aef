"""A run's folder: the resolved config as a plain file, and how a checkpoint finds its config again."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from condconv.files import LAST, newest_good, seal_holds, versions
from configs.messages import UserError

CONFIG_FILE = "config.yaml"
CONFIG_KEY = "config"
# Of the data: how images become what the network sees.
PREPARATION = ("image_size", "normalize", "crop_fraction", "interpolation")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain Python types, every value filled in."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def typed() -> list[str]:
    """The overrides on the command line; none where a config was composed without one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def save_config(config: dict[str, Any], folder: Path) -> Path:
    """Write the resolved config into a run's folder; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    unfinished = path.with_suffix(".yaml.tmp")
    unfinished.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of train.py on the CPU; a run's folder stands for its last.ckpt.

    The result always has the run's config under `CONFIG_KEY`: the one inside the checkpoint, which cannot be of another
    run, or else the file of its folder.

    Raises:
        UserError: there is no such file, it is no checkpoint, not one of ours, or it has lost its config.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        candidates = [path / LAST, path / LAST.name]
        found = next((good for candidate in candidates if (good := newest_good(candidate))), None)
        if found is None and (damaged := [each.name for candidate in candidates for each in versions(candidate)]):
            raise UserError(f"{path}: {', '.join(damaged)} are damaged or truncated, and there is no other checkpoint.")
        if found is None:
            raise UserError(f"There is no checkpoint in the folder {path}: looked for {candidates[0]}.")
        path = found
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}. {_nearby(path)}")
    try:
        if seal_holds(path) is False:
            raise UserError(f"{path} is damaged: its checksum does not match its contents. {_nearby(path, but=path)}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a checkpoint of train.py, or it is truncated: torch.load(weights_only=True) fails."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} is not a checkpoint of train.py: it has no 'state_dict'. A file with bare weights is loaded in "
            f"Python: models.create_model(...).load_state_dict(...)."
        )
    if CONFIG_KEY not in checkpoint:
        checkpoint[CONFIG_KEY] = _config_beside(path)
    return checkpoint


def analysis_folder(cfg: DictConfig) -> Path:
    """Where an analysis of `cfg.ckpt` goes: `analysis/` in the folder of its run, or beside a checkpoint of no run.

    For `cfg.pretrained`, and for what is no path, the working directory is taken.
    """
    path = Path(str(cfg.ckpt)).expanduser()
    if cfg.ckpt is None or not path.exists():
        return Path.cwd() / "analysis"
    folder = path if path.is_dir() else path.parent
    return (folder.parent if folder.name == "checkpoints" else folder).absolute() / "analysis"


def adopt_normalization(cfg: DictConfig, normalization: str | None) -> None:
    """Normalise images as the pretrained weights need it, unless `data.normalize=` was given on the command line."""
    if normalization is not None and not any(override.startswith("data.normalize=") for override in typed()):
        cfg.data.normalize = normalization


def choose_data(given: DictConfig, saved: DictConfig) -> DictConfig:
    """The data of the run, with the values given on the command line, or another data set altogether.

    Images of another data set are prepared as the network knows them, unless the command line says otherwise.
    """
    if given.get("_target_") is not None:
        typed_keys = {override.lstrip("+").partition("=")[0] for override in typed()}
        for key in PREPARATION:
            if key in given and saved.get(key) not in (None, given[key]) and f"data.{key}" not in typed_keys:
                print(f"as trained: data.{key}={saved[key]} (the data set's default is {given[key]})", flush=True)
                given[key] = saved[key]
        return given
    changes = {key: value for key, value in given.items() if value is not None}
    unknown = [key for key in changes if key not in saved]
    if unknown:
        raise UserError(f"data.{unknown[0]}: the run's data set has no such setting; it has {', '.join(saved)}.")
    return OmegaConf.merge(saved, changes)


def _config_beside(path: Path) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            assert isinstance(config, dict)
            return config
    raise UserError(f"{path} holds no config, and there is no {CONFIG_FILE} beside it: was it written by train.py?")


def _nearby(path: Path, but: Path | None = None) -> str:
    """What there is instead: the checkpoints of the nearest existing folder."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    files = [each for each in [*folder.glob("*.ckpt"), *folder.glob("*/*.ckpt")] if each != but]
    found = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:3]
    if found:
        return f"Newest in {folder}: {', '.join(str(file) for file in found)}."
    return f"There are none in {folder} either."
