"""Which jobs a sweep has: every combination of the values, crossed with variants, each with its static twin."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from configs.messages import UserError
from sweeps.names import unique_names

EXPERTS = "condconv.experts"
# Of the sweep itself, not of its jobs.
OWN_KEYS = ("sweep", "sweep_dir", "retry_failed", "hparams_search", "launcher")
# What the same sweep may be given when it is started again, but for the callbacks that change what is trained.
HARMLESS = ("logger", "callbacks", "paths", "name")
TRAINING_CALLBACKS = ("average", "batchnorm")


@dataclass(frozen=True)
class Job:
    """One training: what it is called, and what distinguishes it from the others."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The jobs, and the overrides that all of them share."""

    fixed: tuple[str, ...]
    jobs: tuple[Job, ...]

    def command_line(self, job: Job) -> list[str]:
        """All overrides of a job; its own come last and replace shared ones of the same key."""
        own = {key_of(override) for override in job.overrides}
        return [*(o for o in self.fixed if key_of(o) not in own), *job.overrides]


def key_of(override: str) -> str:
    """`model.width` of `model.width=0.25` and of `+model.width=0.25`."""
    return override.lstrip("+~").partition("=")[0]


def is_harmless(key: str) -> bool:
    """Whether jobs of one sweep may differ in this key from one start to the next."""
    group, name = (*key.split("."), "")[:2]
    return group in HARMLESS and not (group == "callbacks" and name in TRAINING_CALLBACKS)


def belongs_to_sweep(key: str) -> bool:
    """Whether a key of the command line is about the sweep and its launcher rather than about its jobs."""
    return key in OWN_KEYS or key.startswith(("hydra.", "hydra/", "launcher."))


def make_plan(
    arguments: Sequence[str],
    *,
    params: Mapping[str, Any] | None = None,
    unless_given: Mapping[str, Any] | None = None,
    variants: Sequence[Sequence[str]] | None = None,
    keep_variants: bool = False,
    static_twin: bool = False,
) -> Plan:
    """Plan a sweep.

    Args:
        arguments: of the command line; `key=a,b` and the like are varied, and replace `params` of the same key.
        params: what is varied, by key: a list, or text as on the command line (`"1,2,3"`, `"range(1,4)"`).
        unless_given: settings that hold unless the command line has the key, the key's group, or an experiment.
        variants: lists of overrides that are alternatives to each other, where a product of values would not do. Given
            on the command line, any of their keys replaces all of them, unless they are to be kept.
        keep_variants: a key on the command line leaves the variants as they are, and holds for those that lack it.
        static_twin: for every combination of the rest, add the job with condconv.experts=0, unless it is there.

    Raises:
        UserError: a kind of sweep that has no list of values, one of what kept variants set, or nothing to do.
    """
    given = [o for o in _parse(arguments) if not belongs_to_sweep(o.key_or_group)]
    given_keys = {override.key_or_group for override in given}
    rows = [list(map(str, row)) for row in variants or [[]]]
    in_variants = {key_of(override) for row in rows for override in row}
    if not keep_variants and given_keys & in_variants:
        rows = [[]]
    fixed = _default_overrides(unless_given or {}, given_keys)
    axes: dict[str, list[str]] = {}
    in_params = {f"{key}={_varied(value)}": key for key, value in (params or {}).items() if key not in given_keys}
    replacing = {override.key_or_group: override for override in (*given, *_parse(list(in_params)))}
    # A key of the command line keeps its place among the params, so that names and order of the jobs stay the same.
    ordered = [replacing[key] for key in params or {}] + [o for o in given if o.key_or_group not in (params or {})]
    for override in ordered:
        values = _values(override)
        if keep_variants and override.is_sweep_override() and override.key_or_group in in_variants:
            raise UserError(
                f"{override.input_line}: this sweep varies {override.key_or_group} itself, in combinations: give one "
                "value, which holds where they have none."
            )
        if override.is_sweep_override() or override.key_or_group in (params or {}):
            axes[override.key_or_group] = values
        else:
            fixed += values
    combinations = [(*row, *combination) for combination in itertools.product(*axes.values()) for row in rows]
    if static_twin:
        combinations = _with_twins(combinations, fixed)
    jobs = list(dict.fromkeys(combinations))
    if not jobs:
        raise UserError("The sweep has no jobs: one of the settings has an empty list of values.")
    return Plan(tuple(fixed), tuple(Job(n, job) for n, job in zip(unique_names(jobs), jobs, strict=True)))


def varied(plan: Plan) -> set[str]:
    """The keys that have more than one value among the jobs."""
    values: dict[str, set[str]] = {}
    for override in (override for job in plan.jobs for override in job.overrides):
        values.setdefault(key_of(override), set()).add(override)
    return {key for key, found in values.items() if len(found) > 1}


def select(plan: Plan, patterns: str | Sequence[str] | None) -> Plan:
    """The plan with only the jobs whose name matches one of the patterns (`*` for any letters); all of them with None.

    Raises:
        UserError: a pattern that no job has.
    """
    if patterns is None:
        return plan
    patterns = [patterns] if isinstance(patterns, str) else list(map(str, patterns))
    names = [job.name for job in plan.jobs]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"hydra.sweeper.only={pattern}: no job has such a name. There are: {shown}")
    chosen = (job for job in plan.jobs if any(fnmatch.fnmatchcase(job.name, pattern) for pattern in patterns))
    return replace(plan, jobs=tuple(chosen))


def _parse(arguments: Sequence[str]) -> list[Override]:
    return list(OverridesParser.create().parse_overrides(list(arguments)))


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [override.input_line or f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: an interval has no list of values. Give them, as in {key}=0.1,0.2, or search it "
            f"with hparams_search=optuna."
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _varied(value: Any) -> str:
    return ",".join(map(as_text, value)) if isinstance(value, list | tuple) else as_text(value)


def as_text(value: Any) -> str:
    """A value of YAML or Python as the command line writes it, such as null, true or [1,2]."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _default_overrides(defaults: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    given = set(given)
    if "experiment" in given:
        return []
    return [
        f"{key}={as_text(value)}"
        for key, value in defaults.items()
        if key not in given and key.partition(".")[0] not in given
    ]


def _with_twins(combinations: Sequence[tuple[str, ...]], fixed: Sequence[str]) -> list[tuple[str, ...]]:
    """Each new twin stands before the first job that it is the twin of."""
    done: dict[frozenset[str], tuple[str, ...]] = {}
    for combination in combinations:
        rest = tuple(override for override in combination if not key_of(override).startswith("condconv."))
        twin = (f"{EXPERTS}=0", *rest)
        static = f"{EXPERTS}=0" in combination or (
            f"{EXPERTS}=0" in fixed and not any(key_of(override) == EXPERTS for override in combination)
        )
        done.setdefault(frozenset(twin), twin)
        if not static:
            done.setdefault(frozenset(combination), combination)
    return list(done.values())
