"""Statistics of routing weights: are the experts used, and does the routing depend on the input?

Letters: N examples, E experts, L classes (labels). All statistics are streaming: they need O(E x bins) or O(L x E)
memory, however many examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv.float64 import widest
from condconv.recording import hooks_run, routers_of
from condconv.routing import SoftmaxRouter

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
        bimodality: of all weights together, see `bimodality`: experts with different constant weights have a high one.
        expert_bimodality: mean of the experts' own ones, each counted by its variance: high only where single experts
            are switched on and off by the input.
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
    bimodality: float
    expert_bimodality: float

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
        self._origin: Tensor | None = None

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
        if self._origin is not None and self._origin.shape[0] != experts:
            raise ValueError(f"these statistics are of {self._origin.shape[0]} experts, got {experts}")
        if routing_NE.shape[0] == 0:
            return
        weights = widest(routing_NE.detach())
        if self._origin is None:  # sums of powers about a point near the mean: about zero, small variances cancel
            self._origin = weights.mean(0)
        centred = weights - self._origin
        batch = {
            "powers": torch.stack([centred.pow(k).sum(0) for k in (1, 2, 3, 4)]),
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
        counts = torch.zeros(experts * self.num_bins, dtype=torch.int64, device=flat.device)
        # Not `bincount`, which waits for the device to learn the largest bin.
        return counts.index_add_(0, flat, torch.ones_like(flat)).view(experts, self.num_bins)

    def compute(self) -> RoutingSummary:
        """Statistics of everything seen since the start or the last reset.

        Raises:
            RuntimeError: nothing was seen.
        """
        if self._origin is None:
            raise RuntimeError("no routing weights were seen: call update() with at least one example first")
        sums = {name: value.cpu().double() for name, value in self._sums.items()}
        count = self.num_examples
        shift, m2, m3, m4 = _central_moments(sums["powers"] / count)
        mean = self._origin.cpu().double() + shift
        offset = mean - mean.mean()
        pooled2 = m2 + offset**2
        pooled3 = m3 + 3 * offset * m2 + offset**3
        pooled4 = m4 + 4 * offset * m3 + 6 * offset**2 * m2 + offset**4
        own = bimodality(m2, m3, m4).nan_to_num(0.0)
        dead = tuple(int(i) for i in torch.nonzero(sums["maximum"] < DEAD).flatten())
        return RoutingSummary(
            num_examples=count,
            mean=mean,
            std=m2.sqrt(),
            minimum=sums["minimum"],
            maximum=sums["maximum"],
            histogram=sums["histogram"].long(),
            entropy=float(sums["entropy_sum"]) / count,
            mean_entropy=float(normalized_entropy(mean.unsqueeze(0))),
            saturation=float(sums["saturated"]) / (count * mean.shape[0]),
            dead=dead,
            bimodality=float(bimodality(pooled2.mean(), pooled3.mean(), pooled4.mean())),
            expert_bimodality=float((own * m2).sum() / m2.sum()) if m2.sum() > 0 else math.nan,
        )


def _central_moments(raw_4E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and second to fourth central moments from the first four moments about any point."""
    r1, r2, r3, r4 = raw_4E
    m2 = (r2 - r1**2).clamp_min(0)
    m3 = r3 - 3 * r1 * r2 + 2 * r1**3
    m4 = r4 - 4 * r1 * r3 + 6 * r1**2 * r2 - 3 * r1**4
    return r1, m2, m3, m4


def bimodality(m2: Tensor, m3: Tensor, m4: Tensor) -> Tensor:
    """Sarle's coefficient (skewness^2 + 1) / kurtosis from central moments; nan for constants (spread below 1e-6).

    1 for two values, 5/9 for a uniform distribution, 1/3 for a normal one: above 5/9 is the usual sign of two modes. A
    strongly skewed distribution with one mode has a high value too, so look at the histogram.
    """
    skewness2 = m3**2 / m2**3
    kurtosis = m4 / m2**2
    return torch.where(m2 > 1e-12, (skewness2 + 1) / kurtosis, torch.nan)


@dataclass(frozen=True)
class ClassSummary:
    """What `ClassStatistics.compute` returns; tensors are float64 on the CPU.

    Attributes:
        counts: [L] labelled examples of each class.
        mean, std: [L, E] of the weights of each class; nan for a class that was not seen.
        between: [E] share of an expert's variance that lies between the classes, in [0, 1]: 0 when its weight says
            nothing about the class, 1 when it is the same for all examples of a class. Adjusted for chance (Kelley's
            epsilon squared): with many classes and few examples, class means differ by accident. nan where it is not
            defined: a constant weight, or not more examples than classes.
        between_all: the same of all experts together (sums of variances).
    """

    counts: Tensor
    mean: Tensor
    std: Tensor
    between: Tensor
    between_all: float


class ClassStatistics:
    """Accumulates the routing weights of one router by class; memory O(L x E).

    Args:
        num_classes: labels are 0 ... num_classes - 1; examples with a negative label belong to no class and are left
            out.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self._counts: Tensor | None = None

    @torch.no_grad()
    def update(self, routing_NE: Tensor, labels_N: Tensor) -> None:
        """Add the routing weights of a batch, [N, E], and its labels, int64 [N].

        Raises:
            ValueError: numbers of examples that differ.
        """
        if len(labels_N) != len(routing_NE):
            raise ValueError(f"{len(routing_NE)} examples need as many labels, got {len(labels_N)}")
        known = labels_N >= 0
        weights = widest(routing_NE.detach())[known]
        labels = labels_N[known].to(weights.device)
        if self._counts is None:
            self._origin = weights.mean(0) if len(weights) else weights.new_zeros(weights.shape[1])
            self._counts = weights.new_zeros(self.num_classes)
            self._sum, self._square_sum = (weights.new_zeros(self.num_classes, weights.shape[1]) for _ in range(2))
        centred = weights - self._origin
        self._counts.index_add_(0, labels, torch.ones_like(weights[:, 0]))
        self._sum.index_add_(0, labels, centred)
        self._square_sum.index_add_(0, labels, centred.square())

    def compute(self) -> ClassSummary:
        """Statistics of everything seen.

        Raises:
            RuntimeError: nothing was seen.
        """
        if self._counts is None:
            raise RuntimeError("no routing weights were seen: call update() with at least one example first")
        counts, sums, squares = (x.cpu().double() for x in (self._counts, self._sum, self._square_sum))
        count, seen = float(counts.sum()), int((counts > 0).sum())
        mean = sums / counts[:, None]  # 0 / 0 is nan, on purpose
        std = (squares / counts[:, None] - mean**2).clamp_min(0).sqrt()
        grand = sums.sum(0) / count
        total = (squares.sum(0) - count * grand**2).clamp_min(0)
        between = (counts[:, None] * (mean - grand) ** 2).nan_to_num(0.0).sum(0)

        def share(between: Tensor, total: Tensor) -> Tensor:
            if count <= seen:
                return torch.full_like(total, torch.nan)
            adjusted = 1 - (1 - between / total) * (count - 1) / (count - seen)
            return torch.where(total > 1e-12 * count, adjusted.clamp(0, 1), torch.nan)

        origin = self._origin.cpu().double()
        return ClassSummary(
            counts.long(), mean + origin, std, share(between, total), float(share(between.sum(), total.sum()))
        )


def normalized_entropy(routing_NE: Tensor) -> Tensor:
    """Entropy of each example's weights divided by their sum, over log E: [N, E] -> [N], in [0, 1]; 0 for E = 1."""
    experts = routing_NE.shape[1]
    if experts == 1:
        return routing_NE.new_zeros(routing_NE.shape[0])
    share = routing_NE / routing_NE.sum(1, keepdim=True).clamp_min(torch.finfo(routing_NE.dtype).tiny)
    return -torch.xlogy(share, share).sum(1) / math.log(experts)


@contextmanager
def record_routing(
    model: nn.Module, num_bins: int = 20, counts: Callable[[], bool] = lambda: True
) -> Iterator[dict[str, RoutingStatistics]]:
    """While entered, every forward pass of the network adds to the statistics of each of its routers.

    Yields statistics by the name of the router's block or layer ("blocks.4.0", see `routers_of`); dropout on routing
    weights is part of what is recorded, so use it in eval mode for undisturbed figures. A router that runs several
    times in a pass, for layers that share it, counts every image as often.

    Args:
        model: the network.
        num_bins: bins of the histograms over [0, 1].
        counts: asked in every pass whether this one does: the network may hold other weights in between.

    Raises:
        ValueError: the network has no router.
    """
    routers = routers_of(model)
    statistics = {
        name: RoutingStatistics(isinstance(router, SoftmaxRouter), num_bins) for name, router in routers.items()
    }
    names: dict[nn.Module, str] = {router: name for name, router in routers.items()}

    def hook(router: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if counts():
            statistics[names[router]].update(output)

    with hooks_run([router.register_forward_hook(hook) for router in routers.values()]):
        yield statistics
