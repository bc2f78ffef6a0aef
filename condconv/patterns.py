"""Patterns of module names: "blocks.4.*" is every block of stage 4, "layer?.*.conv2" a layer of every block.

A name is a path of parts joined by dots. In a pattern each part is a shell wildcard (`*`, `?`, `[0-3]`) that matches
one part, and `**` matches any number of parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether the whole name fits the pattern."""
    return _match(name.split("."), pattern.split("."))


def matches_end(name: str, pattern: str) -> bool:
    """Whether the name or a trailing part of it fits: "se" fits "blocks.4.0.se"."""
    return _match(name.split("."), ["**", *pattern.split(".")])


def _match(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_match(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], pattern[1:])


def nearest(pattern: str, names: Iterable[str], count: int = 5) -> str:
    """Names that resemble the pattern, for an error message; empty if there is none."""
    close = difflib.get_close_matches(pattern, [name for name in names if name], n=count, cutoff=0.5)
    return f" (near names: {', '.join(close)})" if close else ""
