"""`resume=<folder>`: the saved config of a run that goes on, and what may be changed in it on the way."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from condconv.files import versions
from configs.messages import UserError
from configs.runs import CONFIG_FILE, LAST, newest_good, plain

# What does not change what is learned, or only how long: everything else needs resume_force=true. Numerics (backend,
# compile, memory format) may differ in the last bits.
HARMLESS = (
    "name",
    "test",
    "compile",
    "channels_last",
    "task.compile",
    "task.channels_last",
    "condconv.backend",
    "condconv.autotune",
    "data.root",
    "data.num_workers",
    "data.prefetch*",
    "data.eval_batch_size_per_device",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.plugins*",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "trainer.check_val_every_n_epoch",
    "trainer.log_every_n_steps",
    "trainer.profiler*",
    "trainer.benchmark",
    "trainer.deterministic",
    "callbacks.[!ab]*",  # all but the weight average and BatchNorm
    "callbacks.autotune*",
    "trainer.default_root_dir",
    "logger*",
    "paths.*",
    "sweep*",
)
# Filled in by the data or by pretrained weights when the run began, or by the command itself.
NOT_COMPARED = ("resume", "resume_force", "model.num_classes")
FROM_WEIGHTS = ("data.normalize", "model.timm_options*")


def resumed_config(folder: str | Path, overrides: Sequence[str] = (), composed: DictConfig | None = None) -> DictConfig:
    """The saved config of a run, with the command line's changes, which are printed.

    Single values (`trainer.max_epochs=30`) are changed in the saved config. If a group is chosen (`model=`,
    `experiment=`), the whole config that the command line composes is compared with the saved one.

    Raises:
        UserError: the folder is no run's folder; an override is of no value that the config has; or a change would
            make another training of it, and `resume_force=true` was not given.
    """
    folder = Path(folder).expanduser()
    saved_file = folder / CONFIG_FILE
    if not saved_file.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # Hydra has just made it
        raise UserError(f"resume={folder}: not the folder of a run (it has no {CONFIG_FILE}).")
    cfg = OmegaConf.create(yaml.safe_load(saved_file.read_text(encoding="utf-8")))
    OmegaConf.update(cfg, "resume_force", False, force_add=True)  # runs of earlier versions have no such key
    saved = plain(cfg)
    OmegaConf.set_struct(cfg, True)
    chosen = [
        each for each in OverridesParser.create().parse_overrides(list(overrides)) if each.key_or_group != "resume"
    ]
    groups = [each for each in chosen if isinstance(OmegaConf.select(cfg, each.key_or_group), DictConfig)]
    # Presets (experiment=, debug=) leave nothing under their own name.
    presets = [each for each in chosen if each.key_or_group in ("experiment", "debug", "sweep")]
    if (groups or presets) and composed is not None:
        cfg = OmegaConf.create(plain(composed))
        for key in _matching(saved, NOT_COMPARED if saved.get("pretrained") is None else NOT_COMPARED + FROM_WEIGHTS):
            OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.create(saved), key), force_add=True)
    else:
        for each in chosen:
            if each.key_or_group not in _flat(saved):
                raise UserError(f"resume={folder}: the run's config has no value {each.key_or_group}.")
            OmegaConf.update(cfg, each.key_or_group, each.value())
    _follow(cfg, saved["paths"]["run"], str(folder.absolute()))
    check_changes(saved, plain(cfg), bool(cfg.resume_force), folder)
    cfg.resume = cfg.paths.run = str(folder.absolute())
    return cfg


def checkpoint_to_resume(folder: str | Path | None) -> Path | None:
    """The checkpoint that a resumed run goes on from; None for a new run, and for one that was stopped too early.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    if folder is None:
        return None
    found = newest_good(Path(folder) / LAST)
    if found is None and (damaged := versions(Path(folder) / LAST)):
        raise UserError(
            f"resume={folder}: {', '.join(each.name for each in damaged)} are damaged or truncated. "
            "Restore one of them, or remove them to start this run from the beginning."
        )
    if found is None:
        print(f"resume: {folder} has no checkpoint yet, so training starts from the beginning")
        (Path(folder) / "metrics.csv").unlink(missing_ok=True)
    return found


def _follow(cfg: DictConfig, old: str, new: str) -> None:
    """Paths below the run's folder follow it to where it is now."""
    for key, value in _flat(plain(cfg)).items():
        if isinstance(value, str) and (value == old or value.startswith(old.rstrip("/") + "/")):
            OmegaConf.update(cfg, key, new + value[len(old.rstrip("/")) :])


def check_changes(saved: dict[str, Any], wanted: dict[str, Any], force: bool, folder: Path) -> None:
    """Print how two configs differ.

    Raises:
        UserError: if a difference is more than harmless, unless forced.
    """
    before, after = _flat(saved), _flat(wanted)
    ignored = NOT_COMPARED if saved.get("pretrained") is None else NOT_COMPARED + FROM_WEIGHTS
    keys = [
        key for key in {**before, **after} if before.get(key, "") != after.get(key, "") and not _is_in(key, ignored)
    ]
    lines = {key: f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}" for key in keys}
    serious = [key for key in keys if not _is_in(key, HARMLESS)]
    if serious and not force:
        raise UserError(
            f"resume={folder}: not the same training any more: {'; '.join(lines[key] for key in serious)}. "
            "Leave them out, start a new run, or add resume_force=true."
        )
    for key in keys:
        print(f"resume: {lines[key]}" + ("  (forced)" if key in serious else ""))


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the values in nested dictionaries; lists and empty dictionaries are values."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _is_in(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _matching(config: dict[str, Any], patterns: Sequence[str]) -> list[str]:
    return [key for key in _flat(config) if _is_in(key, patterns)]
