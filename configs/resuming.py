"""`resume=<folder>`: the saved config of a run that goes on, and what may be changed in it on the way."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condconv.files import LAST, newest_good, versions
from configs.checks import without_regularization
from configs.messages import UserError
from configs.results import read_result
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
# The command's own.
NOT_COMPARED = ("resume", "resume_force")
# Filled in when the run began: by the data, or by pretrained weights. A config that is composed anew does not have it.
FROM_DATA = ("model.num_classes",)
FROM_WEIGHTS = ("data.normalize", "model.timm_options*")
# What cannot be changed by force either, and why.
NO_USE_FOR_STATE = "it could not go on from the state of the run's optimiser"
NEVER = {
    "optim.optimizer._target_": NO_USE_FOR_STATE,
    "optim.optimizer.name": NO_USE_FOR_STATE,
    "condconv.temperature": "the checkpoint holds the temperature beside the routers' weights, and would put it back",
}


def resumed_config(folder: str | Path, overrides: Sequence[str] = (), composed: DictConfig | None = None) -> DictConfig:
    """The saved config of a run, with the command line's changes, which are printed.

    Single values (`trainer.max_epochs=30`, `callbacks.routing=null`) are changed in the saved config, and with them
    what follows from them (`compile=true` also changes `task.compile`); `logger=` exchanges the loggers. If another
    group is chosen (`model=`, `experiment=`), the whole config that the command line composes is compared with the
    saved one.

    Raises:
        UserError: the folder is no run's folder; an override is of no value that the config has, or of one from which
            another follows that cannot be computed anew; or a change would make another training of it, and
            `resume_force=true` was not given.
    """
    folder = Path(folder).expanduser()
    saved = _saved_config(folder)
    chosen = [
        each for each in OverridesParser.create().parse_overrides(list(overrides)) if each.key_or_group != "resume"
    ]
    loggers = [each for each in chosen if each.key_or_group == "logger"]
    chosen = [each for each in chosen if each.key_or_group != "logger"] if composed is not None else chosen
    groups = [
        each
        for each in chosen
        if isinstance(OmegaConf.select(OmegaConf.create(saved), each.key_or_group), DictConfig)
        and each.value() is not None
    ]
    # Presets (experiment=, debug=) leave nothing under their own name.
    presets = [each for each in chosen if each.key_or_group in ("experiment", "debug", "sweep")]
    if (groups or presets) and composed is not None:
        cfg = _recomposed(saved, composed, chosen)
    else:
        cfg = _changed(saved, chosen, _expressions(_own_composition(folder) or composed), folder)
        if loggers and composed is not None:
            OmegaConf.update(cfg, "logger", plain(composed)["logger"], merge=False)
    _follow(cfg, saved["paths"]["run"], str(folder.absolute()))
    recomposed = [each.key_or_group for each in (*groups, *presets)] if composed is not None else []
    check_changes(saved, plain(cfg), bool(cfg.resume_force), folder, recomposed)
    cfg.resume = cfg.paths.run = str(folder.absolute())
    return cfg


def _saved_config(folder: Path) -> dict[str, Any]:
    saved_file = folder / CONFIG_FILE
    if not saved_file.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # Hydra has just made it
        raise UserError(f"resume={folder}: not the folder of a run (it has no {CONFIG_FILE}).")
    cfg = OmegaConf.create(yaml.safe_load(saved_file.read_text(encoding="utf-8")))
    for key, value in (("resume_force", False), ("regularization", cfg.get("regularization", True))):
        OmegaConf.update(cfg, key, value, force_add=True)  # runs of earlier versions have no such key
    return plain(cfg)


def _recomposed(saved: dict[str, Any], composed: DictConfig, chosen: Sequence[Override]) -> DictConfig:
    """The config of the whole command line; what was filled in when the run began is the run's, unless it is typed."""
    cfg = OmegaConf.create(plain(composed))
    without_regularization(cfg)  # as in the config that was saved
    typed = {key for each in chosen for key in _flat(each.value(), each.key_or_group)}
    for key in _matching(saved, FROM_DATA if saved.get("pretrained") is None else FROM_DATA + FROM_WEIGHTS):
        if key not in typed:
            OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.create(saved), key), force_add=True)
    return cfg


def _changed(
    saved: dict[str, Any], chosen: Sequence[Override], expressions: dict[str, str], folder: Path
) -> DictConfig:
    """The saved config with single values changed, and with them what follows from them by the expressions."""
    cfg, before = OmegaConf.create(saved), _flat(saved)
    OmegaConf.set_struct(cfg, True)
    for each in chosen:
        key = each.key_or_group
        if key not in before and not isinstance(OmegaConf.select(cfg, key), DictConfig):
            raise UserError(f"resume={folder}: the run's config has no value {key}.")
    typed = {each.key_or_group for each in chosen}
    expressions = {key: each for key, each in expressions.items() if key in before and key not in typed}
    links = {key: each for key, each in expressions.items() if _computed(saved, key, each) == before[key]}
    for key, expression in links.items():
        OmegaConf.update(cfg, key, expression)
    for each in chosen:
        OmegaConf.update(cfg, each.key_or_group, each.value(), merge=False)
    changed = plain(cfg)
    after = _flat(changed)
    left = [
        key
        for key, each in expressions.items()
        if key in after
        and key not in links
        and _computed(changed, key, each) not in (_computed(saved, key, each), after[key])
    ]
    if left:
        raise UserError(
            f"resume={folder}: {', '.join(f'{key} (now {before[key]})' for key in left)} would follow from what is "
            "changed, but the run has another value there than the configs give, so it cannot be computed anew. "
            f"Say what it shall be: {' '.join(f'{key}=...' for key in left)}"
        )
    return OmegaConf.create(changed)


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


def _own_composition(folder: Path) -> DictConfig | None:
    """What the run's first command line composes today; None if it is not known, or no longer possible."""
    words = (read_result(folder) or {}).get("overrides")
    if not words or not GlobalHydra().is_initialized():
        return None
    try:
        return compose("train", overrides=[str(word) for word in words])
    except HydraException:  # an experiment of that time, a group by its former name
        return None


def _expressions(composed: DictConfig | None) -> dict[str, str]:
    """Keys whose value follows from others, with the expression: `task.compile` is `${compile}`.

    A saved config has values only, so expressions are taken from a config of today: of the run's own groups, or, if
    these are not known, of the default ones, which may have others (`_changed` uses those that give the saved value).
    """
    return {
        key: value
        for key, value in _flat({} if composed is None else OmegaConf.to_container(composed, resolve=False)).items()
        if isinstance(value, str) and "${" in value and not _is_in(key, ("name", "paths.*", "hydra.*", "logger.*"))
    }


def _computed(config: dict[str, Any], key: str, expression: str) -> Any:
    """What an expression gives for a key; itself if it refers to what the config does not have."""
    probe = OmegaConf.create(config)
    try:
        OmegaConf.update(probe, key, expression)
        return OmegaConf.select(probe, key)
    except OmegaConfBaseException:
        return expression


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
        UserError: if a difference is more than harmless, unless forced; if it is one of `NEVER`, forced or not.
    """
    before, after = _flat(saved), _flat(wanted)
    keys = [key for key in {**before, **after} if before.get(key, "") != after.get(key, "") and key not in NOT_COMPARED]
    lines = {key: f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}" for key in keys}
    serious = [key for key in keys if not _is_in(key, HARMLESS)]
    # Named for the first time, or no more, biases of routers change their group in the optimiser.
    reasons = NEVER | {
        key: NO_USE_FOR_STATE
        for key in keys
        if key.endswith("_by_role.router_bias") and (key in before) != (key in after)
    }
    never = [key for key in keys if key in reasons]
    if force and never:
        advice = "Leave it out, or start a new run."
        if reasons[never[0]] == NO_USE_FOR_STATE:
            advice = f"Start a new run; pretrained={folder / LAST} lets it begin with the weights of this one."
        raise UserError(f"resume={folder}: {lines[never[0]]}: {reasons[never[0]]}. {advice}")
    if serious and not force:
        found = f"not the same training any more: {'; '.join(lines[key] for key in serious)}."
        if groups:  # perhaps these were not typed at all: they are what the command has without the run's other words
            chosen = "= and ".join(groups)
            raise UserError(
                f"resume={folder}: because of {chosen}= (a whole group) all of the command line is compared with the "
                "run's: repeat it whole, or change single values (trainer.accelerator=gpu). Now it is "
                f"{found} Start a new run"
                + ("." if never else ", or add resume_force=true, which makes all of these changes.")
            )
        forced = " or start a new run." if never else ", start a new run, or add resume_force=true."
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
