"""What the operators of a step are for, from the events of torch's profiler.

Parts of our algorithms are labelled while a profile runs. An event belongs to the innermost label around it; what has
no label is told by the operator's name. In the backward, an operator belongs where the forward operator of the same
sequence number belongs. Times are self times, so that every microsecond is counted once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from torch.autograd.profiler import record_function

from condconv.ops import chunked, single
from condconv.ops.registry import BACKENDS
from condconv.routing import Router

STATIC_CONVOLUTIONS, NORMS, ELEMENTWISE = (
    "static convolutions, linear layers",
    "BatchNorm",
    "activations, pooling, sums",
)
ROUTERS, MIXING, PRODUCTS = "routers", "mixing kernels", "products with mixed kernels: output, input gradient"
KERNEL_GRADIENTS, REDUCTION = "products with mixed kernels: kernel gradients", "reduction onto routing and experts"
ALL_EXPERTS, COPIES = "mixture form: all experts, mixed outputs", "copies and unfolding in CondConv layers"
CALLS = "calls and memory of CondConv layers (Python, freed tensors)"
OPTIMISER, BETWEEN = "optimiser", "between operators (Python, the profiler)"
KINDS = (
    STATIC_CONVOLUTIONS, NORMS, ELEMENTWISE, ROUTERS, MIXING, PRODUCTS, KERNEL_GRADIENTS, REDUCTION, ALL_EXPERTS,
    COPIES, CALLS, OPTIMISER, BETWEEN,
)  # fmt: skip
"""In the order of a table."""

_PREFIX = "work: "
_COPYING = (
    "aten::copy_",
    "aten::im2col",
    "aten::col2im",
    "aten::contiguous",
    "aten::clone",
    "aten::fill_",
    "aten::zero_",
)
_CONVOLVING = ("conv", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm")
_OURS = ("condconv::", "GeneratedBackwardFor_condconv")


def _labelled_call(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + kind):
            return function(*args, **kwargs)

    return run


def _places() -> Iterator[tuple[Any, str, str]]:
    """(owner, attribute, kind) of the functions that get a label."""
    yield Router, "forward", ROUTERS
    yield chunked._Mixer, "kernels", MIXING
    yield single, "mix", MIXING
    yield chunked._Mixer, "add_gradients", REDUCTION
    for conv in chunked.PerExampleConv.__subclasses__():
        for method in ("forward", "input_gradient", "finish_input_gradient"):
            if method in vars(conv):
                yield conv, method, PRODUCTS
        yield conv, "kernel_gradient", KERNEL_GRADIENTS


@contextmanager
def labelled() -> Iterator[None]:
    """The parts of CondConv layers run under labels inside the block."""
    with ExitStack() as stack:
        for owner, name, kind in _places():
            stack.enter_context(patch.object(owner, name, _labelled_call(getattr(owner, name), kind)))
        for name, kind in (("mixture", ALL_EXPERTS), ("single", PRODUCTS)):
            backend = BACKENDS[name]
            halves = {half: _labelled_call(getattr(backend, half), kind) for half in ("forward", "backward")}
            stack.enter_context(patch.dict(BACKENDS, {name: backend._replace(**halves)}))
        yield


def milliseconds(events: Iterable[Any]) -> dict[str, float]:
    """Self time of all operators on the CPU by kind of work."""
    events = list(events)
    forward_kinds = {
        event.sequence_nr: kind
        for event in events
        if event.sequence_nr >= 0 and not _in_backward(event)
        for kind in (_labelled_kind(event),)
        if kind is not None
    }
    found: dict[str, float] = defaultdict(float)
    for event in events:
        found[_kind(event, forward_kinds)] += event.self_cpu_time_total / 1e3
    return dict(found)


def _ancestors(event: Any) -> Iterator[Any]:
    """The event and what it ran in, outwards."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _in_backward(event: Any) -> bool:
    return any(around.name.startswith("autograd::engine") for around in _ancestors(event))


def _labelled_kind(event: Any) -> str | None:
    names = (around.name for around in _ancestors(event))
    return next((name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)), None)


def _kind(event: Any, forward_kinds: dict[int, str]) -> str:
    around = list(_ancestors(event))
    if any(each.name.startswith("Optimizer.") for each in around):
        return OPTIMISER
    label = _labelled_kind(event)
    if label is None:
        label = next((forward_kinds[each.sequence_nr] for each in around if each.sequence_nr in forward_kinds), None)
    if label == ROUTERS:
        return ROUTERS
    ours = label is not None or any(each.name.startswith(_OURS) for each in around)
    if ours and event.name.startswith((*_OURS, _PREFIX, "autograd::engine")):
        return CALLS  # its own time, not that of the operators in it
    if ours and event.name.startswith(_COPYING):
        return COPIES
    if ours:
        return label or CALLS
    return _static_kind([each.name for each in around])


def _static_kind(names: list[str]) -> str:
    if any("batch_norm" in name or "BatchNorm" in name for name in names):
        return NORMS
    if any(part in name.lower() for name in names for part in _CONVOLVING):
        return STATIC_CONVOLUTIONS
    return ELEMENTWISE
