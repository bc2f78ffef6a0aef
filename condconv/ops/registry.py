"""The backends: one entry for each algorithm, with the answer to whether it can run a given problem."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from condconv.ops import chunked, depthwise, depthwise_sum, gemm, grouped, mixture, single, triton
from condconv.ops.spec import Problem

Forward = Callable[..., Tensor]
"""(x_NCHW, routing_NE, weight_EKCRS, spec, workspace_bytes) -> y_NKPQ"""
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
"""(grad_y_NKPQ, x_NCHW, routing_NE, weight_EKCRS, spec, needs, workspace_bytes) -> gradients of x, routing, weight"""


class Backend(NamedTuple):
    """One algorithm for the per-example convolution. Biases are added outside, alike for all."""

    name: str
    summary: str
    supports: Callable[[Problem], str | None]
    """None when the backend can run the problem, else the reason why not, for the user."""
    forward: Forward
    backward: Backward


def _mix_first(
    name: str, summary: str, supports: Callable[[Problem], str | None], conv: type[chunked.PerExampleConv]
) -> Backend:
    return Backend(name, summary, supports, partial(chunked.forward, conv), partial(chunked.backward, conv))


_BACKENDS = [
    Backend("mixture", "run every expert, mix the outputs", mixture.supports, mixture.forward, mixture.backward),
    Backend("single", "mix one kernel, then convolve as usual", single.supports, single.forward, single.backward),
    _mix_first("gemm", "mix kernels, batched matrix products", gemm.supports, gemm.Gemm),
    _mix_first("depthwise", "mix kernels, one folded depthwise convolution", depthwise.supports, depthwise.Depthwise),
    _mix_first(
        "depthwise_sum",
        "mix kernels, a depthwise convolution summed in groups",
        depthwise_sum.supports,
        depthwise_sum.DepthwiseSum,
    ),
    _mix_first("grouped", "mix kernels, one convolution with N * G groups", grouped.supports, grouped.Grouped),
    *(Backend(*entry) for entry in triton.ENTRIES),
]
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _BACKENDS}
REFERENCE = "reference"
AUTO = "auto"


def list_backends() -> list[str]:
    """Names that `backend=` accepts: "auto", the oracle "reference", and the algorithms."""
    return [AUTO, REFERENCE, *BACKENDS]


def check_name(name: str) -> None:
    """Raise `ValueError` with the nearest names unless `name` is a backend."""
    if name in list_backends():
        return
    near = difflib.get_close_matches(str(name), list_backends(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown CondConv backend {name!r}.{hint} Available: {', '.join(list_backends())}.")


def get_backend(name: str, problem: Problem) -> Backend:
    """The backend of that name, or `ValueError` when there is none or when it cannot run the problem."""
    check_name(name)
    backend = BACKENDS[name]
    reason = backend.supports(problem)
    if reason is not None:
        raise ValueError(f"CondConv backend {name!r} cannot run this layer: {reason}.")
    return backend
