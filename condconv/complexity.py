"""Parameters and multiply-adds (MADDs) of a network, by the paper's accounting, static and CondConv.

Multiply-adds per image of

* a convolution: weights of one kernel x output positions; a linear layer: its weights (x tokens, if there are any);
* a CondConv layer: the same, plus E x (kernel and bias elements) for mixing E experts into one kernel per image
  (Yang et al., 2019, section 3: the cost that replaces the E convolutions of a mixture of experts);
* a router: the elements of its weight matrices.

Normalisation, activations, pooling, additions of biases and residuals are not counted, as in the published tables.
Hook-based counters of static networks do not see convolutions whose kernels are computed; this one counts analytically.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from condconv.compress import CompressedLayer
from condconv.kinds import layer_kind
from condconv.layers import CondConv2d, CondLinear
from condconv.recording import hooks_run
from condconv.routing import Router


@dataclass(frozen=True)
class LayerComplexity:
    """One counted layer: its own parameters and its MADDs per image, and those of the static layer it stands for."""

    name: str
    kind: str
    params: int
    madds: int
    static_params: int
    static_madds: int
    num_experts: int = 0
    output_shape: tuple[int, ...] | None = None  # without the batch; None: the forward pass did not reach the layer


@dataclass(frozen=True)
class Complexity:
    """Parameters and MADDs of a network; `str()` is a table with one line per layer.

    `params` counts every parameter once, normalisation included; `static_params` and `static_madds` are those of the
    network with a static layer in the place of every CondConv layer and without routers.
    """

    params: int
    madds: int
    static_params: int
    static_madds: int
    layers: tuple[LayerComplexity, ...]
    input_size: tuple[int, ...]

    def __str__(self) -> str:
        head = ("layer", "kind", "experts", "output", "params", "MADDs", "static MADDs")
        rows = [head]
        for layer in self.layers:
            shape = "not reached" if layer.output_shape is None else "x".join(map(str, layer.output_shape))
            experts = str(layer.num_experts) if layer.num_experts else ""
            counts = (readable(layer.params), readable(layer.madds), readable(layer.static_madds))
            rows.append((layer.name, layer.kind, experts, shape, *counts))
        others = self.params - sum(layer.params for layer in self.layers)
        rows.append(("(normalisation and others)", "", "", "", readable(others), "", ""))
        rows.append(("total", "", "", "", readable(self.params), readable(self.madds), readable(self.static_madds)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        size = "x".join(map(str, self.input_size))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], f"input {size}: {self.summary()}"])

    def summary(self) -> str:
        """One line: totals, and what CondConv adds to the static network."""
        text = f"{readable(self.params)} parameters, {readable(self.madds)} MADDs"
        if self.madds == self.static_madds:
            return text
        added = (readable(self.params - self.static_params), readable(self.madds - self.static_madds))
        percent = 100 * (self.madds / self.static_madds - 1)
        return f"{text}; CondConv adds {added[0]} parameters and {added[1]} MADDs (+{percent:.1f} %)"


def readable(count: int) -> str:
    """Three or four digits with a unit: 950, 31.4k, 5.29M, 4.21G."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            value = count / limit
            return f"{value:.2f}{unit}" if value < 100 else f"{value:.1f}{unit}"
    return str(count)


def complexity(model: nn.Module, input_size: int | Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count parameters and MADDs per image of any network, layer by layer.

    The network runs once on one input without data (meta device), so this is cheap and needs no memory for activations;
    a network that cannot run there is run on its own device instead. It is left as it was.

    Args:
        model: the network; CondConv layers, Conv and Linear layers of any dimension are counted.
        input_size: the shape of one input without the batch, (C, H, W) or (C,); an int S means (3, S, S).

    Raises:
        ValueError: the size is not made of positive ints, or the network cannot run on such an input.
    """
    size = (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"input_size must be a shape of positive ints without the batch, e.g. (3, 224, 224); got {size}"
        )
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    counted: dict[str, LayerComplexity] = {}
    for name, module in model.named_modules():
        inside_router = any(name.startswith(f"{router}.") for router in routers)
        layer = None if inside_router else _without_madds(name, module)
        if layer is not None:
            counted[name] = layer
    _run(model, size, counted)
    layers = tuple(counted.values())
    params = sum(p.numel() for p in model.parameters())
    params += sum(module.weight.numel() for module in model.modules() if isinstance(module, CompressedLayer))
    return Complexity(
        params=params,
        madds=sum(layer.madds for layer in layers),
        static_params=params - sum(layer.params - layer.static_params for layer in layers),
        static_madds=sum(layer.static_madds for layer in layers),
        layers=layers,
        input_size=size,
    )


def _without_madds(name: str, module: nn.Module) -> LayerComplexity | None:
    """A counted layer before the forward pass: name, kind and parameters; None for modules that are not counted."""
    name = name or "(network)"
    if isinstance(module, Router):
        return LayerComplexity(name, "router", sum(p.numel() for p in module.parameters()), 0, 0, 0, module.num_experts)
    params = _own_params(module)
    if isinstance(module, CondConv2d | CondLinear):
        experts = module.num_experts
        return LayerComplexity(name, str(layer_kind(module)), params, 0, params // experts, 0, experts)
    if isinstance(module, _ConvNd | nn.Linear):
        return LayerComplexity(name, layer_kind(module) or type(module).__name__, params, 0, params, 0)
    return None


def _own_params(module: nn.Module) -> int:
    """Of the module itself; experts count also where they are no parameters (compressed, or computed)."""
    if isinstance(module, CondConv2d | CondLinear):
        return module.weight.numel() + (0 if module.bias is None else module.bias.numel())
    return sum(p.numel() for p in module.parameters(recurse=False))


def _madds(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
    """(MADDs, MADDs of the static layer) of one call."""
    # The network got one image; a layer may get several examples all the same, such as the windows of it.
    num_examples = args[0].shape[0]
    if isinstance(module, Router):
        return num_examples * sum(p.numel() for p in module.parameters() if p.ndim > 1), 0
    if isinstance(module, CondConv2d | CondLinear):
        static = output.numel() * module.weight[0, 0].numel()
        return static + num_examples * _own_params(module), static
    assert isinstance(module, _ConvNd | nn.Linear)
    positions = args[0].numel() if isinstance(module, _ConvTransposeNd) else output.numel()
    static = positions * module.weight[0].numel()
    return static, static


@contextmanager
def _counting(model: nn.Module, counted: dict[str, LayerComplexity]) -> Iterator[None]:
    """While entered, every forward call of a counted layer of the network adds its MADDs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        name = names[module]
        layer = counted[name]
        madds, static = _madds(module, args or tuple(kwargs.values()), output)
        shape = tuple(output.shape[1:])
        counted[name] = replace(
            layer, madds=layer.madds + madds, static_madds=layer.static_madds + static, output_shape=shape
        )

    names = {model.get_submodule(name): name for name in counted}
    with hooks_run([module.register_forward_hook(hook, with_kwargs=True) for module in names]):
        yield


# What they return has the shape of their first argument. Without data torch goes through their definitions in Python,
# which takes about half of the time of a pass and more.
_SHAPES_STAY = {
    *(F.batch_norm, F.dropout, F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish),
    *(F.hardsigmoid, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_),
}


class _ShapesAlone(TorchFunctionMode):
    """While entered, functions that keep the shape of their argument return it as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fits = bool(args)
        if func is F.batch_norm:  # statistics of another size are an error, for torch to tell
            fits = len(args) > 1 and (args[1] is None or args[1].numel() == args[0].shape[1])
        if fits and func in _SHAPES_STAY:
            return args[0]
        return func(*args, **(kwargs or {}))


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which takes no memory; what the network keeps of a run (grids) goes with it."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], requires_grad=False)
    return copy.deepcopy(model, memo)


def _run(model: nn.Module, size: tuple[int, ...], counted: dict[str, LayerComplexity]) -> None:
    """Run the network once in eval mode with the counting hooks; flags are put back."""
    training = {module: module.training for module in model.modules()}
    fresh = dict(counted)
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    device = floating[0].device if floating else torch.device("cpu")
    model.eval()
    try:
        with torch.no_grad():
            try:
                without_data = _without_data(model)
                with _counting(without_data, counted), _ShapesAlone():
                    without_data(torch.empty(1, *size, dtype=dtype, device="meta"))
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                # Not every operator runs without data, not every network can be copied; a shape that does not fit
                # fails again here, with a real message.
                counted.update(fresh)
                with _counting(model, counted):
                    model(torch.zeros(1, *size, dtype=dtype, device=device))
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, (1, *size)))
        raise ValueError(f"the network cannot run on an input of shape {shape}: {error}") from error
    finally:
        for module, flag in training.items():
            module.training = flag
