"""Runs that differ in their seed alone form a group; what differs between groups becomes the columns of the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.runs import Run

Settings = dict[str, Any]

SEED, EXPERTS = "seed", "condconv.experts"
# Of a run rather than of what is measured.
NOT_SETTINGS = ("seed", "name", "paths", "logger", "resume", "sweep_dir", "retry_failed", "hydra")
NOT_SETTINGS += ("trainer.default_root_dir", "callbacks.progress")
# Follows from callbacks.checkpoint.monitor: null does what the word does that runs of earlier versions have.
NOT_SETTINGS += ("callbacks.checkpoint.mode",)
EARLIER: Settings = {"regularization": True}
"""What runs of earlier versions did, whose configs lack the key: they are the same training as later ones with it."""
OF_EXPERTS = re.compile(r"condconv\.|optim\.optimizer\.\w+_by_role\.(router|router_bias|expert)$")
"""Settings that touch no static network: a static one has neither routers nor experts to give a rate or a decay to."""
ROOMS = ("condconv.", "model.", "data.", "optim.", "task.", "trainer.")
"""In this order settings are looked at for columns; all others come after."""


@dataclass
class Group:
    """Runs with the same settings.

    Attributes:
        settings: dotted names and values, without what belongs to single runs.
        runs: those that count, by seed; never two of one seed.
        columns: the settings that tell this group from the others.
        label: the columns in words, but for values that most of the groups have.
    """

    settings: Settings
    runs: list[Run] = field(default_factory=list)
    columns: Settings = field(default_factory=dict)
    label: str = ""

    @property
    def experts(self) -> Any:
        return self.settings.get(EXPERTS)

    @property
    def is_static(self) -> bool:
        return self.experts == 0


def flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names and values; a list is a value, an empty mapping nothing."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node


def settings_of(run: Run) -> Settings:
    """What was measured: the config without seed, name, paths and loggers.

    A static network ignores every setting `OF_EXPERTS`, so its runs are told apart by none of them.
    """
    flat = EARLIER | dict(flatten(run.config))
    seed, name, folder = flat.get(SEED), flat.get("name"), flat.get("paths.run")
    static = flat.get(EXPERTS) == 0
    settings: Settings = {}
    for key, value in flat.items():
        if any(key == each or key.startswith(each + ".") for each in NOT_SETTINGS):
            continue
        if key.endswith(".seed") and value == seed:
            continue
        if static and OF_EXPERTS.match(key) and key != EXPERTS:
            continue
        if key == "pretrained" and isinstance(value, str):  # each seed goes on from the run of its own seed
            value = re.sub(rf"(?<=seed-){re.escape(str(seed))}(?!\d)", "<seed>", value)
        if isinstance(value, str) and isinstance(folder, str) and folder:
            value = value.replace(folder, "<run>")
        # Only as a whole: a name may be a word that other values hold too.
        settings[key] = "<name>" if isinstance(value, str) and value == name and key != "model.name" else value
    return settings


def identity(settings: Settings) -> str:
    """One text for equal settings; 1 and 1.0 are equal."""
    plain = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in settings.items()}
    return json.dumps(plain, sort_keys=True, default=str)


def twin_identities(settings: Settings) -> list[str]:
    """Under what a group looks for its static twin, and a static one can be found, the nearest first.

    That is everything but the experts. Weights of a network with experts fit no static one, so where a group starts
    from such (`pretrained=` without upcycling), its twin starts from weights of its own: which ones does not count.
    """
    others = {key: value for key, value in settings.items() if not OF_EXPERTS.match(key)} | {EXPERTS: 0}
    found = [identity(others)]
    if settings.get("pretrained") is not None and not str(settings.get("condconv.init")).startswith("upcycle"):
        found.append(identity({**others, "pretrained": "<its own>"}))
    return found


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Groups of the runs that count; a second run of the same settings and seed gets its reason and does not."""
    groups: dict[str, Group] = {}
    for run in sorted(runs, key=lambda each: each.ended, reverse=True):  # of duplicates the last one counts
        settings = settings_of(run)
        group = groups.setdefault(identity(settings), Group(settings))
        counted = next((other for other in group.runs if other.seed == run.seed), None)
        if counted is None:
            group.runs.append(run)
        else:
            run.reason = duplicate_of(counted, run)
    found = list(groups.values())
    for group in found:
        group.runs.sort(key=lambda run: sort_key(run.seed))
    name_groups(found)
    return sorted(found, key=lambda group: [sort_key(value) for value in group.columns.values()])


def duplicate_of(counted: Run, run: Run) -> str:
    """Why the second of two finished runs does not count."""
    same = "the same figures" if counted.figures == run.figures else "other figures"
    name = counted.folder.name if counted.folder.name != run.folder.name else str(counted.folder)
    return f"duplicate of {name} ({same}), which ended later and counts"


def sort_key(value: Any) -> tuple[int, float, str]:
    """Nothing first, then numbers by size, then words."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, str(value)


def name_groups(groups: Sequence[Group]) -> list[str]:
    """Give the groups their columns and labels; returns what also differs, but always together with a column."""
    columns, following = columns_of(groups)
    usual = {key: value for key in columns if key != EXPERTS and (value := _usual(groups, key)) is not None}
    for group in groups:
        group.columns = {key: group.settings.get(key) for key in columns}
        group.label = label_of(group, usual)
    return following


def _usual(groups: Sequence[Group], key: str) -> str | None:
    """The value, as text, that most of the groups have which can have one, three at least; None if some have none."""
    able = [group for group in groups if not (group.is_static and OF_EXPERTS.match(key))]
    values = [_text(group.settings[key]) for group in able if key in group.settings]
    if not values or len(values) < len(able):
        return None
    value = max(dict.fromkeys(values), key=values.count)
    return value if values.count(value) > max(2, len(values) / 2) else None


def columns_of(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """(settings that tell all groups apart, the others that differ).

    A setting is a column if it separates groups that those before it do not, or if somebody typed it for a run; of
    settings that were typed together and separate the same groups one is enough.
    """
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    values = {key: [_text(group.settings.get(key)) for group in groups] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    typed = [{str(o).lstrip("+~").split("=")[0] for run in group.runs for o in _overrides(run)} for group in groups]
    where = {key: {number for number, names in enumerate(typed) if key in names} for key in differing}

    def rank(key: str) -> tuple[bool, bool, int, int]:
        room = next((i for i, each in enumerate(ROOMS) if key.startswith(each)), len(ROOMS))
        return key != EXPERTS, not where[key], room, key.count(".")

    def says_as_much(key: str, column: str) -> bool:
        together = not where[column] or bool(where[key] & where[column])  # else each is a change of its own
        return together and _same_partition(values[key], values[column])

    columns: list[str] = []
    parts: list[tuple[str, ...]] = [() for _ in groups]
    for key in sorted(differing, key=rank):
        finer = [(*part, value) for part, value in zip(parts, values[key], strict=True)]
        separates = len(set(finer)) > len(set(parts))
        if separates or (where[key] and not any(says_as_much(key, column) for column in columns)):
            columns.append(key)
            parts = finer
    # What a static network has no use for differs from nothing.
    having = {key: {_text(group.settings[key]) for group in groups if key in group.settings} for key in differing}
    return columns, [key for key in differing if key not in columns and len(having[key]) > 1]


def _same_partition(one: list[str], other: list[str]) -> bool:
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == len(set(one)) == len(set(other))


def _overrides(run: Run) -> list[Any]:
    found = run.result.get("overrides")
    return found if isinstance(found, list) else []


def _text(value: Any) -> str:
    return identity({"": value})


def label_of(group: Group, usual: Mapping[str, str]) -> str:
    """The columns in words, but for what most groups have: "8 experts, width 0.5"; in want of words the experts."""
    words = []
    for key, value in group.columns.items():
        if key == EXPERTS:
            words.append(experts_label(value))
        elif key in group.settings and _text(value) != usual.get(key):  # a static network has no routing to name
            words.append(f"{short_name(key, group.columns)} {show(value)}")
    return ", ".join(words) or experts_label(group.experts)


def experts_label(experts: Any) -> str:
    """How a number of experts is called."""
    if experts is None:
        return "no experts setting"
    return "static" if experts == 0 else f"{show(experts)} expert{'' if experts == 1 else 's'}"


def short_name(key: str, others: Iterable[str] = ()) -> str:
    """The last part of a dotted name, or the last two where another column ends alike."""
    parts = key.split(".")
    alike = sum(other.split(".")[-1] == parts[-1] for other in others)
    return ".".join(parts[-2:]) if alike > 1 or parts[-1] in ("name", "_target_") else parts[-1].replace("_", " ")


def show(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return str(value)
