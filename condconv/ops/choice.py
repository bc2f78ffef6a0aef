"""Which backend runs a layer when the user says "auto": the measured one if there is one, else one by rule.

The rule knows few facts. Kernel mixing moves N x P numbers and costs E multiply-adds for each; running every expert
costs E convolutions. So on maps of few positions the mixture form is cheaper, on larger maps mixing first. Dense k x k
layers go to products of unfolded patches, on a CPU with large maps and stride 1 to the library's grouped convolution,
which unfolds nothing (docs/experiments.md, "Which algorithm for k x k layers on a CPU?"). With one expert there is
nothing to mix: the mixture form is the library's own convolution and a scale ("Which algorithm for one expert?", same
place, says where it is not faster). Nothing has been measured on a GPU yet, so there the rule never names a Triton
kernel: batched matrix products, the mixture form and grouped convolution are its candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from condconv.ops.spec import Problem, live_taps

UNFOLDS_BELOW = 196
"""Output positions from which dense k x k layers with stride 1 are faster as grouped convolutions, on a CPU in float32.
At 14 x 14 by 0.8, at 28 x 28 and 56 x 56 by 0.4 to 0.6; at 10 x 10 it is no faster, at 7 x 7 slower."""


class Choice(NamedTuple):
    """The chosen backend and why."""

    backend: str
    reason: str


_measured: dict[Problem, str] = {}
_recorders: list[list[Problem]] = []


def choose(problem: Problem) -> Choice:
    """The backend for a problem: the fastest one measured by `condconv.autotune`, else what the rule says."""
    for recorder in _recorders:
        recorder.append(problem)
    if _measured and problem in _measured:
        return Choice(_measured[problem], "measured by autotune")
    return rule(problem)


@lru_cache(maxsize=4096)
def rule(problem: Problem) -> Choice:
    """The backend for a problem when nothing was measured."""
    positions = problem.positions
    taps_R, taps_S = live_taps(problem.size_HW, problem.kernel_RS, problem.spec)
    live_RS = (taps_R.stop - taps_R.start, taps_S.stop - taps_S.start)
    # Kernels with groups of which a single tap is left: on one thread the library runs those group by group.
    is_scale = problem.spec.groups > 1 and live_RS == (1, 1)
    if problem.batch == 1 and problem.device == "cpu" and not is_scale:
        return Choice("single", "one example: a static convolution, once its kernel is mixed")
    if problem.experts == 1 and live_RS != (1, 1) and (live_RS == (3, 3) or not problem.is_depthwise):
        return Choice("mixture", "one expert: a static convolution, whose outputs are scaled")
    if problem.is_depthwise:
        return Choice("depthwise", "depthwise: the batch folds into the channels")
    spec = problem.spec._replace(padding=(taps_R.padding, taps_S.padding))
    if problem.spec.groups > 1:
        return Choice("grouped", "grouped: the batch folds into the groups")
    pointwise = spec.is_pointwise(live_RS)
    if pointwise and positions == 1:
        return Choice("mixture", "one position: mixing kernels would cost as much as running all experts, and memory")
    if pointwise and positions <= 4 and problem.batch >= 2 * problem.experts:
        return Choice(
            "mixture", f"{positions} positions, batch {problem.batch}: all experts run at the speed of large matrices"
        )
    library = problem.device == "cpu" and problem.dtype == torch.float32
    if library and live_RS != (1, 1) and positions >= UNFOLDS_BELOW and spec.stride == spec.dilation == (1, 1):
        return Choice(
            "grouped", f"{positions} positions, k x k, stride 1: one convolution with a group for each example"
        )
    return Choice("gemm", f"{positions} positions: mix kernels, then batched matrix products")


def remember(problem: Problem, backend: str) -> None:
    """Let `choose` answer with this backend from now on."""
    _measured[problem] = backend


def forget() -> None:
    """Forget all measurements: `choose` goes by rule again."""
    _measured.clear()


@contextmanager
def recording() -> Iterator[list[Problem]]:
    """Collect the problems that `choose` is asked about."""
    problems: list[Problem] = []
    _recorders.append(problems)
    try:
        yield problems
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not problems]  # equal ones may be open
