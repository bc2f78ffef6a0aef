"""A trained static network becomes a CondConv network that computes the same: experts and routers for `convert`.

The kernel of example x is K(x) = sum_e a_e(x) W_e. It must be the static kernel W for every x, so the experts are

    W_e = W / s + D_e        with        sum_e a_e(x) = s        and        sum_e a_e(x) D_e = 0        for every x.

Routing weights of a general router span R^E; then the second condition leaves D = 0, and for a sigmoid, whose weights
have no constant sum, the first cannot hold either. So the router must start on a smaller set of routing weights:

* "paired", the default: experts in pairs. Sigmoid: the second of a pair gets the negated row, and sigmoid(z) +
  sigmoid(-z) = 1, so s = E/2 though the routing depends on the input from the first step. The D of a pair must be
  equal, and sum to zero over the pairs: E/2 - 1 directions. Softmax always sums to s = 1; the two of a pair share their
  row and D is opposite within the pair: E/2 directions. An odd expert at the end is neutral (sigmoid) or has D = 0.
* "neutral": zero weights and biases, a_e = 1/2 for a sigmoid (s = E/2), 1/E for softmax (s = 1). D may be anything
  with sum_e D_e = 0: E - 1 directions. Routing does not depend on the input at first, so all experts get the same
  gradients; the gradient of a_e is <dL/dK, W_e>, so the routers' rows part by the noise, and the experts by the
  routers. Experts part far more slowly than with pairs (tests/condconv/test_upcycle.py).

Both are one formula: the D_e are random numbers, projected onto the complement of the span of all routing weights that
the router can give. Biases are treated like kernels.

At equal learning rates the mixed kernel moves faster than the static one would: with a_e = 1/2 by the factor E/4 under
SGD, E/2 under optimisers that normalise the gradient (Adam, RMSProp). Fine-tune with a learning rate divided by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv.float64 import to_float64
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import FCRouter, Router, SoftmaxRouter

STARTS = ("paired", "neutral")


@dataclass(frozen=True)
class Upcycle:
    """The rule `init=Upcycle(...)` of `convert`: the network's output stays what it was.

    Args:
        noise: RMS of an expert's deviation from its share of the static kernel, over the RMS of that share. 0 makes all
            experts of a layer equal, and with neutral routers they stay equal.
        routers: how routers start, "paired" or "neutral", see above.

    Raises:
        ValueError: an argument is out of range.
    """

    noise: float = 0.1
    routers: str = "paired"

    def __post_init__(self) -> None:
        if isinstance(self.noise, bool) or not isinstance(self.noise, int | float) or not 0 <= self.noise < 100:
            raise ValueError(f"noise of upcycled experts must be a number from 0 to 100, got {self.noise!r}")
        if self.routers not in STARTS:
            raise ValueError(f"routers of an upcycled network start {' or '.join(STARTS)}, not {self.routers!r}")

    def __call__(self, static: nn.Module, name: str) -> None:
        """As a layer's initialisation: leave the static values, so that every expert begins as the static layer."""

    @torch.no_grad()
    def settle(self, units: Iterable[tuple[Router | None, Sequence[CondConv2d | CondLinear]]]) -> None:
        """Prepare routers and experts of a network whose experts are all the static layers.

        Args:
            units: in order of execution, each routing unit's router (None: that of the unit before it) and its layers.

        Raises:
            ValueError: a router is not one of `condconv.ROUTINGS`, so nothing is known of its routing weights.
        """
        start: tuple[float, Tensor] | None = None
        for router, layers in units:
            if router is not None:
                start = self._start_router(router)
            assert start is not None, "the first unit of a network has a router"
            for layer in layers:
                for parameter in layer.parameters(recurse=False):
                    self._spread(parameter, *start)

    def _start_router(self, router: Router) -> tuple[float, Tensor]:
        """Set the router; returns s, the sum of its routing weights, and the projector `[E, E]` of the noise."""
        if not isinstance(router, FCRouter):
            raise ValueError(f"cannot upcycle with a {type(router).__name__}: its routing weights are not known")
        experts = router.num_experts
        softmax = isinstance(router, SoftmaxRouter)
        paired = experts - experts % 2 if self.routers == "paired" else 0
        if paired:  # in full size whatever the router's gain: here the output does not depend on it
            nn.init.xavier_uniform_(router.fc.weight)
        for row in (router.fc.weight, router.fc.bias):
            if paired:
                row[1:paired:2] = row[0:paired:2] if softmax else -row[0:paired:2]
            if not paired or not softmax:
                row[paired:] = 0.0
        span = torch.ones(1, experts, dtype=torch.float64)
        if paired:
            first = torch.eye(experts, dtype=torch.float64)[0:paired:2]
            second = torch.eye(experts, dtype=torch.float64)[1:paired:2]
            rest = torch.eye(experts, dtype=torch.float64)[paired:]
            span = torch.cat([first + second, rest] if softmax else [span, first - second])
        projector = torch.eye(experts, dtype=torch.float64) - torch.linalg.pinv(span) @ span
        return (1.0 if softmax else experts / 2), projector

    def _spread(self, experts: Tensor, total: float, projector: Tensor) -> None:
        """Turn equal experts `[E, ...]` into shares of the static tensor that differ by noise."""
        experts /= total
        directions = float(projector.trace())  # of a projector: its rank
        if not self.noise or directions < 0.5:
            return
        share = to_float64(experts[0])
        scale = self.noise * share.square().mean().sqrt() * (len(experts) / directions) ** 0.5
        noise = torch.randn(experts.shape, dtype=torch.float64, device=share.device)
        noise = (projector.to(share.device) @ noise.flatten(1)).view(experts.shape)
        experts += (noise * scale).to(experts.dtype).to(experts.device)


UPCYCLES = {"upcycle": Upcycle(), "upcycle_neutral": Upcycle(routers="neutral")}
"""The rules by name."""
