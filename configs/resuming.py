"""`resume=<folder>`: the saved config of a run that goes on, and what may be changed in it on the way."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condconv.files import LAST, newest_good, versions
from configs.checks import without_regularization
from configs.messages import UserError
from configs.runs import CONFIG_FILE, plain

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
    "data.decoder",  # the same pixels
    "data.prefetch*",
    "data.eval_batch_size_per_device",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.plugins*",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time*",  # in words, or a mapping
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
# Which optimiser it is: another one has no use for the state of this one.
OPTIMIZER = ("optim.optimizer._target_", "optim.optimizer.name")


def resumed_config(folder: str | Path, overrides: Sequence[str] = (), composed: DictConfig | None = None) -> DictConfig:
    """The saved config of a run, with the command line's changes, which are printed.

    Single values (`trainer.max_epochs=30`, `callbacks.routing=null`) are changed in the saved config, and with them
    what follows from them (`compile=true` also changes `task.compile`); `logger=` exchanges the loggers. If another
    group is chosen (`model=`, `experiment=`), the whole config that the command line composes is compared with the
    saved one.

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
    for key, value in (("resume_force", False), ("regularization", cfg.get("regularization", True))):
        OmegaConf.update(cfg, key, value, force_add=True)  # runs of earlier versions have no such key
    saved = plain(cfg)
    OmegaConf.set_struct(cfg, True)
    chosen = [
        each for each in OverridesParser.create().parse_overrides(list(overrides)) if each.key_or_group != "resume"
    ]
    loggers = [each for each in chosen if each.key_or_group == "logger"]
    chosen = [each for each in chosen if each.key_or_group != "logger"] if composed is not None else chosen
    groups = [
        each
        for each in chosen
        if isinstance(OmegaConf.select(cfg, each.key_or_group), DictConfig) and each.value() is not None
    ]
    # Presets (experiment=, debug=) leave nothing under their own name.
    presets = [each for each in chosen if each.key_or_group in ("experiment", "debug", "sweep")]
    if (groups or presets) and composed is not None:
        cfg = OmegaConf.create(plain(composed))
        without_regularization(cfg)  # as in the config that was saved
        for key in _matching(saved, _not_compared(saved)):
            if key == "resume_force":
                continue
            OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.create(saved), key), force_add=True)
    else:
        links = _links(saved, composed)
        for each in chosen:
            key = each.key_or_group
            if key not in _flat(saved) and not isinstance(OmegaConf.select(cfg, key), DictConfig):
                raise UserError(f"resume={folder}: the run's config has no value {key}.")
            links.pop(key, None)
        for key, expression in links.items():
            OmegaConf.update(cfg, key, expression)
        for each in chosen:
            OmegaConf.update(cfg, each.key_or_group, each.value(), merge=False)
        cfg = OmegaConf.create(plain(cfg))
        if loggers and composed is not None:
            OmegaConf.update(cfg, "logger", plain(composed)["logger"], merge=False)
    _follow(cfg, saved["paths"]["run"], str(folder.absolute()))
    recomposed = [each.key_or_group for each in (*groups, *presets)] if composed is not None else []
    check_changes(saved, plain(cfg), bool(cfg.resume_force), folder, recomposed)
    cfg.resume = cfg.paths.run = str(folder.absolute())
    return cfg


def _not_compared(saved: dict[str, Any]) -> tuple[str, ...]:
    return NOT_COMPARED if saved.get("pretrained") is None else NOT_COMPARED + FROM_WEIGHTS


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


def _links(saved: dict[str, Any], composed: DictConfig | None) -> dict[str, str]:
    """Keys of a saved config whose value follows from others, with the expression: `task.compile` is `${compile}`.

    A saved config has values only. Expressions are taken from a config of today, where they give the saved value.
    """
    if composed is None:
        return {}
    expressions = {
        key: value
        for key, value in _flat(OmegaConf.to_container(composed, resolve=False)).items()
        if isinstance(value, str) and "${" in value and not _is_in(key, ("name", "paths.*", "hydra.*", "logger.*"))
    }
    flat, links = _flat(saved), dict[str, str]()
    for key, expression in expressions.items():
        probe = OmegaConf.create(saved)
        try:
            OmegaConf.update(probe, key, expression)
            if key in flat and OmegaConf.select(probe, key) == flat[key]:
                links[key] = expression
        except OmegaConfBaseException:  # it refers to what the saved config does not have
            continue
    return links


def _follow(cfg: DictConfig, old: str, new: str) -> None:
    """Paths below the run's folder follow it to where it is now."""
    for key, value in _flat(plain(cfg)).items():
        if isinstance(value, str) and (value == old or value.startswith(old.rstrip("/") + "/")):
            OmegaConf.update(cfg, key, new + value[len(old.rstrip("/")) :])


def check_changes(
    saved: dict[str, Any], wanted: dict[str, Any], force: bool, folder: Path, groups: Sequence[str] = ()
) -> None:
    """Print how two configs differ; `groups` are those chosen on the command line, if all of it was composed for that.

    Raises:
        UserError: if a difference is more than harmless, unless forced; if it is another optimiser, forced or not.
    """
    before, after = _flat(saved), _flat(wanted)
    ignored = _not_compared(saved)
    keys = [
        key for key in {**before, **after} if before.get(key, "") != after.get(key, "") and not _is_in(key, ignored)
    ]
    lines = {key: f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}" for key in keys}
    serious = [key for key in keys if not _is_in(key, HARMLESS)]
    other_optimizer = [lines[key] for key in keys if key in OPTIMIZER]
    if force and other_optimizer:
        raise UserError(
            f"resume={folder}: {'; '.join(other_optimizer)}: it could not go on from the state of the run's optimiser. "
            f"Start a new run; pretrained={folder / LAST} lets it begin with the weights of this one."
        )
    if serious and not force:
        found = f"not the same training any more: {'; '.join(lines[key] for key in serious)}."
        if groups:  # perhaps these were not typed at all: they are what the command has without the run's other words
            chosen = "= and ".join(groups)
            raise UserError(
                f"resume={folder}: because of {chosen}= (a whole group) all of the command line is compared with the "
                "run's: repeat it whole, or change single values (trainer.accelerator=gpu). Now it is "
                f"{found} Start a new run"
                + ("." if other_optimizer else ", or add resume_force=true, which makes all of these changes.")
            )
        forced = " or start a new run." if other_optimizer else ", start a new run, or add resume_force=true."
        raise UserError(f"resume={folder}: {found} Leave them out{forced}")
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
