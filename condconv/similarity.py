"""How alike experts and routers are: do the experts do different things, do the layers decide the same?

Letters: E experts, S sampled examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condconv.compress import CompressedLayer
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import FCRouter, Router
from condconv.survey import RoutingSurvey


@dataclass(frozen=True)
class Similarity:
    """Of the experts of one layer, or of the rows of one router.

    Attributes:
        name: of the layer or the router's block.
        cosine: [E, E] cosines between the flattened kernels (or rows), 1 on the diagonal.
        spread: root mean square distance of the experts from their mean, over the norm of the mean: 0 when all experts
            are the same, about sqrt(E - 1) when they are unrelated.
    """

    name: str
    cosine: Tensor
    spread: float

    @property
    def mean_cosine(self) -> float:
        """Mean over pairs of different experts; nan for a single expert."""
        experts = len(self.cosine)
        if experts < 2:
            return float("nan")
        return float((self.cosine.sum() - self.cosine.trace()) / (experts * (experts - 1)))


def _similarity(name: str, rows_EP: Tensor) -> Similarity:
    rows = rows_EP.detach().flatten(1).cpu().double()
    unit = F.normalize(rows, dim=1)
    mean = rows.mean(0)
    distance = (rows - mean).square().sum(1).mean().sqrt()
    return Similarity(name, unit @ unit.T, float(distance / mean.norm().clamp_min(1e-12)))


def expert_similarity(model: nn.Module) -> tuple[Similarity, ...]:
    """Of the kernels of each CondConv layer, in the order of registration; biases are not looked at."""
    return tuple(
        _similarity(name, layer.dequantized() if isinstance(layer, CompressedLayer) else layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, CondConv2d | CondLinear)
    )


def router_similarity(model: nn.Module) -> tuple[Similarity, ...]:
    """Of the rows of each router's last map, one row per expert: a high cosine means experts called for together."""
    routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    return tuple(
        _similarity(name.removesuffix(".router"), router.fc.weight)
        for name, router in routers.items()
        if isinstance(router, FCRouter)
    )


def depth_similarity(survey: RoutingSurvey) -> Tensor:
    """Linear CKA between the routing weights of every two routers, over the sample: [routers, routers] in [0, 1].

    1 when two layers tell the images apart in the same way (up to rotation and scale), near 0 when what one decides
    says nothing about the other; nan for a router whose weights do not depend on the image. (Kornblith et al.,
    *Similarity of Neural Network Representations Revisited*, ICML 2019, equation 3.)
    """
    centred = [survey.sample_of(router.name).double() for router in survey.routers]
    centred = [weights - weights.mean(0) for weights in centred]
    own = torch.stack([(x.T @ x).norm() for x in centred])
    # Constants leave rounding errors, whose directions mean nothing.
    own[own < 1e-10 * len(survey.sample)] = torch.nan
    cross = torch.stack([torch.stack([(x.T @ y).norm().square() for y in centred]) for x in centred])
    return cross / torch.outer(own, own)
