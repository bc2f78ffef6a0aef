"""Expert weights of a layer that replaces a static one.

Every expert is a kernel of its own and is initialised like the static layer: with the statistics of *one* kernel, never
with the fan of the stacked tensor [E, K, C/G, R, S] (Yang et al., 2019; authors' code, `get_condconv_initializer`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from condconv.float64 import to_float64
from condconv.layers import CondConv2d, CondLinear
from condconv.upcycle import UPCYCLES

CondLayer = CondConv2d | CondLinear
LayerInit = Callable[[nn.Module, str], None]
"""Initialises a static layer in place, given its name: what a network's own initialisation does to one layer."""


def independent(layer: CondLayer, static: nn.Module) -> None:
    """Draw experts with the statistics of the static layer's tensors; the first expert is the static layer itself.

    The static layer's values are one draw of the network's initialiser, whichever it was. The others are drawn with the
    same mean and standard deviation, uniformly if no value lies further out than a uniform distribution reaches, else
    normally; constant tensors (zero biases) are copied. The estimate is as good as the layer is large: the standard
    deviation of n values is known to about 1/sqrt(2n), 1 % for the smallest layer of the paper's placements.
    """
    for name, value in static.named_parameters(recurse=False):
        experts = getattr(layer, name)
        experts[0] = value
        for expert in experts[1:]:
            _draw_like(expert, value)


def by_function(layer: CondLayer, static: nn.Module, name: str, initialize: LayerInit) -> None:
    """Initialise experts one by one with the network's own function; the first expert is the static layer itself."""
    scratch = copy.deepcopy(static)
    for index in range(layer.num_experts):
        if index:
            initialize(scratch, name)
        for parameter, value in scratch.named_parameters(recurse=False):
            getattr(layer, parameter)[index] = value


EXPERT_INITS: dict[str, Callable[[CondLayer, nn.Module], None]] = {"independent": independent}
"""Rules by name: each fills the parameters of a CondConv layer from the static layer that it replaces."""


def resolve_init(init: str | LayerInit) -> str | LayerInit:
    """The rule that `init` names, with the rules for trained networks (`condconv.upcycle`) as functions.

    Raises:
        ValueError: `init` is neither a function nor the name of a rule.
    """
    if callable(init):
        return init
    if init in UPCYCLES:
        return UPCYCLES[init]
    if init not in EXPERT_INITS:
        raise ValueError(
            f"unknown init {init!r}: give one of {', '.join([*EXPERT_INITS, *UPCYCLES])}, or a function (layer, name) "
            "that initialises a static layer in place"
        )
    return init


@torch.no_grad()
def initialize_experts(layer: CondLayer, static: nn.Module, name: str, init: str | LayerInit) -> None:
    """Fill `layer.weight` and `layer.bias` from the static layer by the rule `init`."""
    if callable(init):
        by_function(layer, static, name, init)
    else:
        EXPERT_INITS[init](layer, static)


def _draw_like(target: Tensor, sample: Tensor) -> None:
    if sample.is_meta:
        return
    values = to_float64(sample)
    mean, std = float(values.mean()), float(values.std(correction=0))
    if not math.isfinite(std) or std == 0.0:
        target.copy_(sample)
        return
    reach = math.sqrt(3.0) * std  # a uniform distribution of this standard deviation ends here
    if float((values - mean).abs().max()) <= 1.05 * reach:
        target.uniform_(mean - reach, mean + reach)
    else:
        target.normal_(mean, std)
