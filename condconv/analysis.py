"""Statistics of routing weights: are the experts used, and does the routing depend on the input?

Letters: N examples, E experts. All statistics are streaming and need O(E x bins) memory, however many examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv.routing import Router, SoftmaxRouter

SATURATED = 0.98
"""A sigmoid weight a is saturated when |2a - 1| > 0.98, that is below 0.01 or above 0.99: its gradient is under 4 % of
the largest possible one. For softmax an example is judged as a whole: 1 when one expert holds more than 0.99."""

DEAD = 0.01
"""An expert is dead when its weight stayed below 0.01 for every example seen."""


@dataclass(frozen=True)
class RoutingSummary:
    """What `RoutingStatistics.compute` returns; tensors are float64 on the CPU, scalars plain floats.

    Attributes:
        num_examples: examples seen.
        mean: [E] mean weight of each expert.
        std: [E] standard deviation over the examples (0 for an expert that ignores its input).
        minimum, maximum: [E] extreme weights.
        histogram: [E, bins] counts of the weights over equal bins of [0, 1].
        entropy: mean over the examples of the entropy of the weights divided by their sum, over log E: 1 when all
            experts weigh the same, 0 when one expert does all the work (and for E = 1).
        mean_entropy: the same of the mean weights: low when the whole data set leans on few experts.
        saturation: share of saturated weights, see `SATURATED`.
        dead: indices of dead experts, see `DEAD`.
    """

    num_examples: int
    mean: Tensor
    std: Tensor
    minimum: Tensor
    maximum: Tensor
    histogram: Tensor
    entropy: float
    mean_entropy: float
    saturation: float
    dead: tuple[int, ...]

    @property
    def num_dead(self) -> int:
        return len(self.dead)

    def scalars(self) -> dict[str, float]:
        """The figures worth a curve, for a logger."""
        return {
            "mean": float(self.mean.mean()),
            "std": float(self.std.mean()),
            "entropy": self.entropy,
            "mean_entropy": self.mean_entropy,
            "saturation": self.saturation,
            "dead_experts": float(self.num_dead),
        }


class RoutingStatistics:
    """Accumulates statistics of the routing weights of one router, batch by batch.

    Sums stay on the device of the weights, in float64 where the device has it, and nothing is transferred before
    `compute`, so an update in a training loop does not wait for the device.

    Args:
        normalized: True for softmax routing (an example's weights sum to 1), which changes what saturation means.
        num_bins: bins of the histogram over [0, 1].
    """

    def __init__(self, normalized: bool = False, num_bins: int = 20) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        self.normalized = normalized
        self.num_bins = num_bins
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.num_examples = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, routing_NE: Tensor) -> None:
        """Add the routing weights of a batch, [N, E], any floating dtype.

        Raises:
            ValueError: not a matrix, or another number of experts than before.
        """
        if routing_NE.ndim != 2 or not routing_NE.is_floating_point():
            raise ValueError(
                f"routing weights must be a floating [N, E] matrix, got {routing_NE.dtype} {tuple(routing_NE.shape)}"
            )
        experts = routing_NE.shape[1]
        if self._sums and self._sums["sum"].shape[0] != experts:
            raise ValueError(f"these statistics are of {self._sums['sum'].shape[0]} experts, got {experts}")
        if routing_NE.shape[0] == 0:
            return
        weights = routing_NE.detach().to(torch.float32 if routing_NE.device.type == "mps" else torch.float64)
        batch = {
            "sum": weights.sum(0),
            "square_sum": weights.square().sum(0),
            "entropy_sum": normalized_entropy(weights).sum(),
            "saturated": self._saturated(weights).sum(),
            "histogram": self._histogram(weights),
        }
        for name, value in batch.items():
            self._sums[name] = value + self._sums[name] if name in self._sums else value
        for name, value in {"minimum": weights.amin(0), "maximum": weights.amax(0)}.items():
            reduce = torch.minimum if name == "minimum" else torch.maximum
            self._sums[name] = reduce(value, self._sums[name]) if name in self._sums else value
        self.num_examples += weights.shape[0]

    def _saturated(self, weights_NE: Tensor) -> Tensor:
        """Per weight (sigmoid) or per example (softmax, counted E times so that both divide by N x E)."""
        if self.normalized:
            winner_N = weights_NE.amax(1) > (1 + SATURATED) / 2
            return winner_N * weights_NE.shape[1]
        return (2 * weights_NE - 1).abs() > SATURATED

    def _histogram(self, weights_NE: Tensor) -> Tensor:
        experts = weights_NE.shape[1]
        bins_NE = (weights_NE * self.num_bins).long().clamp(0, self.num_bins - 1)
        flat = (bins_NE + self.num_bins * torch.arange(experts, device=weights_NE.device)).flatten()
        return torch.bincount(flat, minlength=experts * self.num_bins).view(experts, self.num_bins)

    def compute(self) -> RoutingSummary:
        """Statistics of everything seen since the start or the last reset.

        Raises:
            RuntimeError: nothing was seen.
        """
        if not self.num_examples:
            raise RuntimeError("no routing weights were seen: call update() with at least one example first")
        sums = {name: value.cpu().double() for name, value in self._sums.items()}
        count = self.num_examples
        mean = sums["sum"] / count
        std = (sums["square_sum"] / count - mean.square()).clamp_min(0).sqrt()
        dead = tuple(int(i) for i in torch.nonzero(sums["maximum"] < DEAD).flatten())
        return RoutingSummary(
            num_examples=count,
            mean=mean,
            std=std,
            minimum=sums["minimum"],
            maximum=sums["maximum"],
            histogram=sums["histogram"].long(),
            entropy=float(sums["entropy_sum"]) / count,
            mean_entropy=float(normalized_entropy(mean.unsqueeze(0))),
            saturation=float(sums["saturated"]) / (count * mean.shape[0]),
            dead=dead,
        )


def normalized_entropy(routing_NE: Tensor) -> Tensor:
    """Entropy of each example's weights divided by their sum, over log E: [N, E] -> [N], in [0, 1]; 0 for E = 1."""
    experts = routing_NE.shape[1]
    if experts == 1:
        return routing_NE.new_zeros(routing_NE.shape[0])
    share = routing_NE / routing_NE.sum(1, keepdim=True).clamp_min(torch.finfo(routing_NE.dtype).tiny)
    return -torch.xlogy(share, share).sum(1) / math.log(experts)


@contextmanager
def record_routing(model: nn.Module, num_bins: int = 20) -> Iterator[dict[str, RoutingStatistics]]:
    """While entered, every forward pass of the network adds to the statistics of each of its routers.

    Yields statistics by the router's name ("blocks.4.0.router"); dropout on routing weights is part of what is
    recorded, so use it in eval mode for undisturbed figures.

    Raises:
        ValueError: the network has no router.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if not routers:
        raise ValueError("the network has no router, so there are no routing weights to record (experts=0?)")
    statistics = {
        name: RoutingStatistics(isinstance(router, SoftmaxRouter), num_bins) for name, router in routers.items()
    }
    names: dict[nn.Module, str] = {router: name for name, router in routers.items()}

    def hook(router: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        statistics[names[router]].update(output)

    handles = [router.register_forward_hook(hook) for router in routers.values()]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
