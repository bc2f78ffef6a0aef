"""Errors as one message: what is wrong, where, and what to do, instead of a traceback."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from configs import launch
from configs.arguments import accepted
from configs.memory import keep_freed_memory

CONFIGS = Path(__file__).parent
# What users cause and can repair; any other error is probably ours, so its place is printed too.
USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError, NotImplementedError, MisconfigurationException)
# Warnings of libraries about each other, or about what the config says on purpose.
NOISE = (
    ".*treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
)
TRACEBACK = "CONDCONV_TRACEBACK"
# train.py's exit code when a signal or trainer.max_time stopped it after saving: start it again with resume=. It is
# EX_TEMPFAIL of sysexits.h, "try again later"; 1 is a failure, 130 Ctrl-C.
EXIT_REQUEUE = 75


class UserError(ValueError):
    """Something in the config or on the command line that the user can repair; the message says how."""


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """The question whether the nearest of the choices was meant, or an empty string."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}? " if close else ""


def explain(error: BaseException, config_name: str = "train") -> str:
    """One message for an error, without a traceback."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__, config_name)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_missing(error.missing_cfg_file or "", error.options)
    if isinstance(error, ConfigCompositionException):
        return _explain_composition(error, config_name)
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(str(error.override), str(error))
    if isinstance(error, OmegaConfBaseException):
        return str(error).strip()
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, USER_ERRORS):
        return str(error).strip() or type(error).__name__
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(place.filename).name}:{place.lineno})" if place else ""
    return f"{type(error).__name__}: {error}{where}. This looks like a mistake in the code rather than in the command."


def _explain_missing(file: str, options: Iterable[str]) -> str:
    """No such choice of a group. Hydra's options are the files of the group itself, ours may lie in folders of it."""
    group, _, name = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
    names = {*_choices(group), *options} - {name, "as_trained"}  # Hydra's: of folders that --config-dir adds
    folder, leaf = name.rpartition("/")[0], name.rpartition("/")[2]
    same = sorted(other for other in names if other.rpartition("/")[2] == leaf)
    choices = {other for other in names if other.rpartition("/")[0] == folder}
    if not folder or not choices:
        choices = {other.partition("/")[0] + "/..." * ("/" in other) for other in names}
    hint = f"Did you mean {same[0]!r}? " if same else did_you_mean(name, sorted(names))
    return f"There is no {group}={name}. {hint}Choose one of: {', '.join(sorted(choices))}."


def _explain_unreadable(argument: str, error: str) -> str:
    key, _, value = argument.partition("=")
    if key and re.search(r"[=+(){}\[\]\s]", value):  # what Hydra's own language uses
        quoted = '["..."]' if value.startswith("[") else '"..."'
        how = f"what has = + ( ) {{ }} or spaces in it needs quotes that reach Hydra, as in '{key}={quoted}'."
    else:
        reason = [line for line in error.splitlines()[1:2] if not line.startswith("See ")]
        how = " ".join(["expected key=value without spaces.", *reason])
    return f"Cannot read the argument {argument!r}: {how}"


def _explain_composition(error: ConfigCompositionException, config_name: str) -> str:
    found = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", str(error))
    if found is None:
        return " ".join(str(part) for part in (error, error.__cause__) if part)
    key = found.group(1).lstrip("+~")
    known = known_keys(config_name)
    if key in known:
        return " ".join(str(part) for part in (error, error.__cause__) if part)
    if "not override" in str(error) and _takes(config_name, *key.rpartition(".")[::2]):
        return f"The config does not list {key}, so it takes a plus sign to add it: +{key}=..."
    owners = _owners(key, config_name)
    if owners:
        return f"There is no setting {key!r} with the chosen {key.partition('.')[0]}=, but with {', '.join(owners)}."
    # A key of another group's file is likelier a wrong prefix than a wrong spelling: experts -> condconv.experts.
    same_ending = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"Did you mean {same_ending[0]!r}? " if same_ending else did_you_mean(key, known)
    return f"There is no setting {key!r}. {hint}`--help` lists the most useful ones, `--cfg job` all of them."


def _takes(config_name: str, parent: str, name: str) -> bool:
    """What is built from the node `parent` takes an argument `name`."""
    node = OmegaConf.select(_composed(config_name), parent)
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return target is not None and name in (accepted(target) or ())


def _owners(key: str, config_name: str) -> list[str]:
    """The choices of its group that have a setting: data.root is one of data=imagenet, not of data=digits."""
    group, leaf = key.partition(".")[0], key.rpartition(".")[2]
    files = _choices(group)
    if "." not in key or not any(f"{leaf}:" in path.read_text(encoding="utf-8") for path in files.values()):
        return []  # a wrong spelling: no need to compose them all
    owners = []
    for choice in [f"{group}={name}" for name in files]:
        try:
            if key in known_keys(config_name, choice):
                owners.append(choice)
        except ConfigCompositionException:  # of a command that has no such group
            continue
    return owners


def _choices(group: str) -> dict[str, Path]:
    """What a group offers, with the files; those in its folders as `folder/name`."""
    folder = CONFIGS / group
    files = sorted(path for path in folder.rglob("[!_]*.yaml") if path.stem != "as_trained")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def known_keys(config_name: str, *overrides: str) -> list[str]:
    """All settings of the default config, dotted, and the names of the groups."""

    def walk(node: DictConfig, prefix: str) -> Iterable[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from walk(child, f"{prefix}{key}.")

    groups = [path.name for path in CONFIGS.iterdir() if path.is_dir() and not path.name.startswith("_")]
    groups.remove("wandb")  # sweeps in W&B's own form
    return [*walk(_composed(config_name, *overrides), ""), *groups]


def _composed(config_name: str, *overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config_name, list(overrides))


def report(error: BaseException, config_name: str = "train") -> None:
    """Print an error to stderr as one message, with the traceback only for who set HYDRA_FULL_ERROR=1."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    print(f"error: {explain(error, config_name)}", file=sys.stderr)


def run_job(task: Callable[[DictConfig], object], cfg: DictConfig, config_name: str) -> None:
    """The body of a `hydra.main` function: the task gets its run's folder, and its errors are reported once.

    In a sweep the error goes on to Hydra, which runs the other jobs first.
    """
    try:
        cfg.paths.run = str(Path(HydraConfig.get().runtime.output_dir).absolute())
        keep_freed_memory()
        task(cfg)
    except Exception as error:
        report(error, config_name)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            error.reported = True  # type: ignore[attr-defined]  # read below, after Hydra has carried it there
            raise
        sys.exit(1)


def run_as_command(main: Callable[[], None], config_name: str) -> None:
    """Call a `hydra.main` function; exit with 1 and one message if the config cannot be composed or a job failed."""
    # Hydra prints tracebacks of its own unless told to pass exceptions on; processes started from here inherit our
    # switch, not that one.
    before = dict(os.environ)
    launch.begin()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    os.environ.setdefault(TRACEBACK, before.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # not of a job: Hydra could not make the run's folder
            error = UserError(
                f"resume={error.filename} is a file: give the folder of the run, the one with config.yaml."
                if Path(error.filename).suffix == ".ckpt"
                else f"Cannot write to the output folder {error.filename}: {error.strerror}. Set paths.outputs="
            )
        if not getattr(error, "reported", False):
            report(error, config_name)
        sys.exit(1)
    finally:
        HydraConfig.instance().cfg = None  # who calls train(cfg) next, without Hydra, must not find this run's
        for name in (TRACEBACK, "HYDRA_FULL_ERROR"):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})
