"""Devices without float64: what computes in it goes through the CPU there. A stand-in for MPS, which is not at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor, nn

import condconv.float64
from condconv import CondLinear
from condconv.analysis import ClassStatistics, RoutingStatistics
from condconv.collapse import RoutingMoments, _cost, _mixed
from condconv.initializers import independent
from condconv.similarity import expert_similarity
from condconv.upcycle import Upcycle


class NoFloat64(Tensor):
    """Refuses it as MPS does; on "the CPU" it is an ordinary tensor."""

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.float64 in (*args, kwargs.get("dtype")):
            self.double()
        return super().to(*args, **kwargs)

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def there(x: Tensor) -> Tensor:
    return x.detach().clone().as_subclass(NoFloat64)


@pytest.fixture(autouse=True)
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condconv.float64, "has_float64", lambda device: False)


def layer() -> CondLinear:
    made = CondLinear(4, 5, num_experts=3, router=None)
    made.weight, made.bias = nn.Parameter(there(made.weight)), nn.Parameter(there(made.bias))
    return made


@torch.no_grad()
def test_experts_are_drawn_from_static_layers() -> None:
    made, static = layer(), nn.Linear(4, 5)
    static.weight = nn.Parameter(there(static.weight))
    independent(made, static)
    assert torch.equal(made.weight[0], static.weight) and made.weight[1:].abs().max() < 1.2
    before = made.weight.sum(0).cpu()
    Upcycle(noise=0.5)._spread(made.weight, 1.5, torch.eye(3, dtype=torch.float64) - 1 / 3)
    assert_close(made.weight.sum(0).cpu(), before / 1.5, "the noise sums to zero")


@torch.no_grad()
def test_experts_are_collapsed_and_compared() -> None:
    made, routing = layer(), torch.rand(6, 3)
    moments = RoutingMoments(3)
    moments.update(there(routing))
    weight = made.weight.cpu()
    assert_close(_mixed(made.weight, there(routing[0])), torch.tensordot(routing[0], weight, 1), "kernel")
    assert _cost(made, moments) > 0
    assert torch.allclose(expert_similarity(made)[0].cosine.diagonal(), torch.ones(3, dtype=torch.float64))


def test_statistics_stay_where_the_weights_are() -> None:
    routing, statistics, classes = torch.rand(6, 3), RoutingStatistics(), ClassStatistics(2)
    statistics.update(there(routing))
    classes.update(there(routing), torch.tensor([0, 1, 1, 0, 1, 0]))
    assert statistics._origin.dtype == classes._sum.dtype == torch.float32
    assert_close(statistics._origin.cpu(), routing.mean(0), "mean")
