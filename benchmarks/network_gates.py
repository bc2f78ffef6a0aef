"""The gate of a row of networks: ours against the float64 oracle, timm's against ours, before anything is timed.

In float32 whole networks are compared, logits and the gradients of all parameters. In half precision that says nothing:
a network with random weights magnifies the rounding of its first layers beyond its logits, static layers as much as
ours. There every CondConv layer is compared by itself, on the inputs that it has in the network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gates
from benchmarks.contenders import OURS, TIMM, Trio, autocast
from benchmarks.peers import TimmLayer
from benchmarks.presets import Case
from benchmarks.timing import failure
from condconv import CondConv2d, CondLinear
from condconv.ops.registry import REFERENCE

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 0.1
"""RMS(error) / RMS(reference) of whole networks in float32. A few values so near zero that rounding carries them across
the kink of a ReLU are off by all of themselves, which is up to 3e-2 of a gradient's norm, for the loop over examples in
float32 too; a wrong expert or example is O(1)."""
FEW = 2
"""Examples for the oracle: it takes seconds for each."""
MIN_IMAGES = 16
"""For the statistics of BatchNorm."""

Answers = dict[str, Tensor]


def gate(trio: Trio, case: Case, images: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """The largest error of each contender, and for those that must not be timed the reason."""
    ours = trio.networks[OURS]
    trio.restore()
    _take_statistics(ours, images)
    if trio.peer is not None:
        trio.peer.take_weights(ours)
    errors: dict[str, float] = {}
    notes = dict(trio.missing)
    few = gates.few_of(case.batch, FEW)
    oracle = _network_answers(_oracle(ours), case, images[few].double(), list(range(len(few))))
    answers = _network_answers(ours, case, images, few)
    _judge(OURS, answers, oracle, errors, notes)
    del oracle
    if trio.peer is not None:
        try:
            theirs = trio.peer.to_ours(_network_answers(trio.peer.network, case, images, few))
            _judge(TIMM, theirs, answers, errors, notes)
        except (RuntimeError, MemoryError) as error:
            notes[TIMM] = failure(error)
    if case.dtype != "float32":
        _gate_layers(ours, case, images, errors, notes)
    return errors, notes


def _judge(name: str, actual: Answers, expected: Answers, errors: dict[str, float], notes: dict[str, str]) -> None:
    """Note the larger error, or the failure."""
    try:
        logits = {"logits": expected["logits"]}
        gradients = {key: tensor for key, tensor in expected.items() if key != "logits"}
        found = [gates.check(actual, logits, LOGITS_TOLERANCE)]
        found += [gates.check(actual, gradients, GRADIENT_TOLERANCE)] if gradients else []
        errors[name] = max(found)
    except gates.GateFailure as error:
        notes[name] = str(error)


def _network_answers(network: nn.Module, case: Case, images: Tensor, few: list[int]) -> Answers:
    """Logits of some examples and, for training, the gradients of all parameters with a cotangent for these alone.

    In eval mode, where examples do not meet in BatchNorm.
    """
    network.eval()
    with torch.set_grad_enabled(case.training):
        logits = network(images)
    found = {"logits": logits.detach()[few]}
    if case.training:
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(logits, list(named.values()), gates.sparse_cotangent(logits, few))
        found |= dict(zip(named, gradients, strict=True))
    return found


def _gate_layers(ours: nn.Module, case: Case, images: Tensor, errors: dict[str, float], notes: dict[str, str]) -> None:
    """Compare every CondConv layer, ours and timm's, with the oracle on the inputs it has in the network."""
    few = gates.few_of(case.batch, FEW)
    tolerance = gates.TOLERANCE[getattr(torch, case.dtype)]

    def compare(name: str, layer: nn.Module, x: Tensor, routing: Tensor) -> None:
        rows = list(range(len(few)))
        oracle = _layer_answers(_oracle(layer), x[few].double(), routing[few].double(), rows)
        for contender, candidate in ((OURS, copy.deepcopy(layer)), (TIMM, TimmLayer(layer).to(x.device))):
            if contender in notes:
                continue
            with autocast(case):
                found = _layer_answers(candidate, x, routing, few)
            try:
                found["weight"] = found["weight"].view_as(oracle["weight"])
                errors[contender] = max(errors[contender], gates.check(found, oracle, tolerance))
            except gates.GateFailure as error:
                notes[contender] = f"{error} in {name}"

    with torch.no_grad(), autocast(case), _inputs(ours) as inputs:
        ours.eval()(images)
    for name, (x, routing) in inputs.items():
        compare(name, ours.get_submodule(name), x.to(getattr(torch, case.dtype)), routing)


def _layer_answers(layer: nn.Module, x: Tensor, routing: Tensor, few: list[int]) -> Answers:
    """Output and gradients of a layer on given inputs; its weights alone are parameters here."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, routing)]
    layer.routing = leaves[1]  # type: ignore[assignment]  # a plain attribute of our layers and of TimmLayer
    weight = next(
        tensor for name, tensor in layer.named_parameters() if name.endswith("weight") and "router" not in name
    )
    y = layer.forward(leaves[0])
    gradients = torch.autograd.grad(y, [*leaves, weight], gates.sparse_cotangent(y, few))
    return {"y": y.detach()[few], "dx": gradients[0][few], "drouting": gradients[1][few], "weight": gradients[2]}


@contextmanager
def _inputs(network: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(x, routing weights) of every CondConv layer that runs inside the block, by name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, CondConv2d | CondLinear):

            def hook(layer: Any, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                found[name] = (args[0], layer._routing_weights(args[0], None))

            handles.append(module.register_forward_hook(hook))
    yield found
    for handle in handles:
        handle.remove()


def _oracle(module: nn.Module) -> nn.Module:
    """Our network, or a layer of it, in float64 by the loop over examples."""
    oracle = copy.deepcopy(module).double()
    for layer in oracle.modules():
        if isinstance(layer, CondConv2d | CondLinear):
            layer.backend = REFERENCE
    return oracle


@contextmanager
def _momentum(network: nn.Module, momentum: float) -> Iterator[None]:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    yield
    for norm, value in zip(norms, before, strict=True):
        norm.momentum = value


@torch.no_grad()
def _take_statistics(network: nn.Module, images: Tensor) -> None:
    """Make BatchNorm's running statistics those of these images: with others, activations grow from block to block.

    Of few images some variances are nearly zero and would magnify rounding errors; then noise is added to them.
    """
    missing = max(0, MIN_IMAGES - images.shape[0])
    more = torch.randn((missing, *images.shape[1:]), generator=torch.Generator().manual_seed(3))
    more = more.to(images.device, memory_format=torch.channels_last)
    with _momentum(network, 1.0):
        network.train()(torch.cat([images, more]))
