"""Which backend runs a layer when the user says "auto": one decision, callable, printable, with its reason."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from condconv.ops.spec import Problem


class Choice(NamedTuple):
    """The chosen backend and why."""

    backend: str
    reason: str


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Choice:
    """The backend for a problem, by rule."""
    if problem.is_depthwise:
        return Choice("depthwise", "depthwise layer")
    if problem.positions <= 2:
        return Choice("mixture", "few positions")
    if problem.spec.groups > 1:
        return Choice("grouped", "groups")
    return Choice("gemm", "default")
