"""Configs of the groups as YAML: what all share once, what is each group's own, the commands of its runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import yaml

from reports.comparison import Row
from reports.groups import Settings, show

ABSOLUTE = re.compile(r"(?<![\w.:/<])(?:~|[A-Za-z]:)?[/\\][^\s'\",;)\]]+[/\\]([^\s'\",;)\]/\\]+)")


def shortened(value: Any) -> Any:
    """Absolute paths in a text reduced to their last part: they say nothing elsewhere, and too much about a machine."""
    return ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value


def config_entries(rows: Sequence[Row], paths: bool) -> dict[str, Any]:
    """`shared`, `shared_count` and `configs` for the page; without `paths`, absolute ones are shortened."""
    if not rows:
        return {"shared": "", "shared_count": 0, "configs": []}
    first = rows[0].group.settings
    same = {key for key in first if all(_equal(row.group.settings, first, key) for row in rows)}
    shared = {key: value for key, value in first.items() if key in same}
    configs = []
    for index, row in enumerate(rows):
        own = {key: value for key, value in row.group.settings.items() if key not in same}
        commands = dict.fromkeys(command_text(run.command, paths) for run in row.group.runs if run.command)
        configs.append(
            {
                "index": index,
                "label": row.label,
                "seeds": ", ".join(show(run.seed) for run in row.group.runs),
                "text": as_yaml(own, paths) if own else "nothing of its own\n",
                "commands": "\n".join(commands),
            }
        )
    return {"shared": as_yaml(shared, paths), "shared_count": len(shared), "configs": configs}


def _equal(settings: Settings, first: Settings, key: str) -> bool:
    return key in settings and settings[key] == first[key] and type(settings[key]) is type(first[key])


def as_yaml(settings: Settings, paths: bool) -> str:
    """Flat settings as the nested YAML they came from."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        node = tree
        *parents, leaf = key.split(".")
        for part in parents:
            child = node.setdefault(part, {})
            node = child if isinstance(child, dict) else node
        node[leaf] = value if paths else _shorten(value)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        return [_shorten(each) for each in value]
    return shortened(value)


def command_text(words: Sequence[str], paths: bool) -> str:
    """A command to type; without `paths`, also without the name and folder that a sweep gave the run."""
    words = [*words]
    if words and words[0].endswith(".py"):
        words.insert(0, "python")
    if not paths:
        programs = (".py", "python", "python3")
        words = [word for word in words if not word.startswith(("name=", "paths.run=", "sweep_dir="))]
        words = [PurePath(word).name if word.endswith(programs) else shortened(word) for word in words]
    return shlex.join(words)
