"""What "auto" does in a network: explain its choice layer by layer, or replace the rule by measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from condconv.compress import CompressedLayer
from condconv.layers import CondConv2d, CondLinear
from condconv.ops import autotune as measuring
from condconv.ops.autotune import Measurement
from condconv.ops.choice import choose, recording, remember
from condconv.ops.spec import Problem
from condconv.recording import hooks_run


@dataclass(frozen=True)
class LayerChoice:
    """One CondConv layer of a network: its problem, the backend that "auto" takes, why, and times if measured."""

    layer: str
    problem: Problem
    backend: str
    reason: str
    time_ms: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """The choices for all layers of a network; `str()` is a table."""

    layers: tuple[LayerChoice, ...]

    def __str__(self) -> str:
        rows = [("layer", "channels", "kernel", "map", "backend", "why")]
        for choice in self.layers:
            problem = choice.problem
            in_order = sorted(choice.time_ms.items(), key=lambda t: t[1])
            times = ", ".join(f"{name} {'out of memory' if isinf(ms) else f'{ms:.2f} ms'}" for name, ms in in_order)
            rows.append(
                (
                    choice.layer,
                    f"{problem.in_channels} -> {problem.out_channels}",
                    "x".join(map(str, problem.kernel_RS)),
                    "x".join(map(str, problem.size_HW)),
                    choice.backend,
                    times or choice.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def same_random_state(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside changes nothing afterwards: a training is the same whether layers were measured or not."""
    state: AbstractContextManager[None] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return state


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """What forward passes inside write to buffers is undone, also when one fails."""
    values = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), values, strict=True):
                buffer.copy_(value)


@contextmanager
def _layer_problems(model: nn.Module) -> Iterator[list[tuple[str, Problem]]]:
    """Collect (layer name, problem) of every CondConv layer with backend "auto" that runs inside the block."""
    found: list[tuple[str, Problem]] = []
    with recording() as problems:

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not isinstance(module, CompressedLayer):  # those have algorithms of their own
                    found.extend((name, problem) for problem in problems)
                problems.clear()

            return hook

        layers = {name: m for name, m in model.named_modules() if isinstance(m, CondConv2d | CondLinear)}
        with hooks_run([layer.register_forward_hook(note(name)) for name, layer in layers.items()]):
            yield found


def layer_problems(model: nn.Module, x: Tensor) -> list[tuple[str, Problem]]:
    """The problem of every CondConv layer with backend "auto" when the network runs on `x`.

    Gradients count when the network is in training mode. Buffers such as BatchNorm's and the random state are restored.
    """
    with (
        _same_buffers(model),
        same_random_state(x.device),
        _layer_problems(model) as found,
        torch.set_grad_enabled(model.training),
    ):
        model(x)
    if not found:
        raise ValueError(
            'The network has no CondConv layer with backend="auto" that runs on this input; layers with compressed '
            "experts do not count."
        )
    return found


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Which backend "auto" takes for each layer of a network on inputs like `x`, and why.

    Args:
        model: A network with CondConv layers; its mode says whether gradients count.
        x: An input of the batch size, image size, dtype and device in question.

    Raises:
        ValueError: When no CondConv layer with backend "auto" runs.
    """
    return Explanation(
        tuple(LayerChoice(name, problem, *choose(problem), time_ms={}) for name, problem in layer_problems(model, x))
    )


def autotune(model: nn.Module, x: Tensor, *, cache: str | Path | None = None, repeats: int = 5) -> Explanation:
    """Time all backends for each layer of a network once, and let "auto" take the fastest from now on.

    Answers are kept in a file for the same versions, device and number of threads. With torch.distributed the first
    process measures and all others take its answers.

    Args:
        model: A network with CondConv layers; in training mode forward and backward are timed, else the forward.
        x: An input of the batch size, image size, dtype and device to tune for.
        cache: File for the measurements; None for the user's cache folder.
        repeats: Runs that each median is taken of.

    Raises:
        ValueError: When no CondConv layer with backend "auto" runs.
        torch.OutOfMemoryError: When all backends of a layer run out of memory; those that did alone are left out.
    """
    named = layer_problems(model, x)
    times: dict[Problem, dict[str, float]] = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        # Times, the name of the GPU in the cache and tensors on "cuda" are those of the current GPU.
        with torch.cuda.device_of(x), same_random_state(x.device):
            times = _measure_all([problem for _, problem in named], Path(cache or measuring.default_cache()), repeats)
    if dist.is_initialized():
        answer = [[times.get(problem) for _, problem in named]]
        dist.broadcast_object_list(answer, src=0)
        times = {problem: t for (_, problem), t in zip(named, answer[0], strict=True) if t is not None}
    layers = []
    for name, problem in named:
        measurement = Measurement(problem, times[problem])
        remember(problem, measurement.backend)
        layers.append(LayerChoice(name, problem, measurement.backend, "measured by autotune", measurement.time_ms))
    return Explanation(tuple(layers))


def _measure_all(problems: list[Problem], cache: Path, repeats: int) -> dict[Problem, dict[str, float]]:
    device = problems[0].device
    known = measuring.load_cache(cache, device)
    times: dict[Problem, dict[str, float]] = {}
    new: list[Measurement] = []
    for problem in dict.fromkeys(problems):
        stored = known.get(str(problem))
        if stored is None or set(stored) != {backend.name for backend in measuring.candidates(problem)}:
            new.append(measuring.measure(problem, repeats))
            stored = new[-1].time_ms
        times[problem] = stored
    if new:
        measuring.save_cache(cache, device, [measurement for measurement in new if measurement.is_complete])
    return times
