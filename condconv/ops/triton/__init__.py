"""Triton backends. Importing this package loads no triton: the first call of a backend loads its kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condconv.ops.spec import Problem
from condconv.ops.triton import support


class Entry(NamedTuple):
    """One row for `condconv.ops.registry.BACKENDS`, in the order of `Backend`."""

    name: str
    summary: str
    supports: Callable[[Problem], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _lazy(module: str, function: str) -> Callable[..., Any]:
    def call(first: Tensor, *rest: Any, **options: Any) -> Any:
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(first):
            return getattr(import_module(f"condconv.ops.triton.{module}"), function)(first, *rest, **options)

    return call


def _entry(module: str, summary: str, supports: Callable[[Problem], str | None]) -> Entry:
    return Entry(f"triton_{module}", summary, supports, _lazy(module, "forward"), _lazy(module, "backward"))


ENTRIES = (
    _entry("pointwise", "mix kernels, one matrix product per example (Triton)", support.pointwise),
    _entry("depthwise", "mix and convolve depthwise kernels (Triton)", support.depthwise),
    _entry("dense", "mix kernels, implicit matrix product over taps (Triton)", support.dense),
)
