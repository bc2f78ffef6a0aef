"""Statistics of routing weights against the plain computation on all of them at once."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import SmallNet
from torch import Tensor

from condconv.analysis import RoutingStatistics, normalized_entropy, record_routing
from condconv.convert import convert


def accumulated(routing_NE: Tensor, *, normalized: bool = False, parts: int = 4) -> RoutingStatistics:
    statistics = RoutingStatistics(normalized)
    for part in routing_NE.tensor_split(parts):
        statistics.update(part)
    return statistics


def test_streaming_equals_all_at_once() -> None:
    routing = torch.rand(101, 5)
    summary = accumulated(routing, parts=7).compute()
    whole = routing.double()
    assert summary.num_examples == 101
    torch.testing.assert_close(summary.mean, whole.mean(0))
    torch.testing.assert_close(summary.std, whole.std(0, correction=0))
    assert torch.equal(summary.minimum, whole.amin(0)) and torch.equal(summary.maximum, whole.amax(0))
    share = whole / whole.sum(1, keepdim=True)
    assert summary.entropy == pytest.approx(float(-(share * share.log()).sum(1).mean()) / math.log(5))
    for expert in range(5):
        counts = torch.histc(whole[:, expert], 20, 0, 1)
        assert summary.histogram[expert].tolist() == counts.long().tolist()


def test_entropy_of_known_cases() -> None:
    cases = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.0, 0.7, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert normalized_entropy(cases).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])
    assert normalized_entropy(torch.rand(3, 1)).tolist() == [0.0, 0.0, 0.0]


def test_saturation_of_sigmoid_and_softmax() -> None:
    sigmoid = torch.tensor([[0.001, 0.5], [0.999, 0.02]])
    assert accumulated(sigmoid).compute().saturation == 0.5
    softmax = torch.tensor([[0.995, 0.004, 0.001], [0.4, 0.3, 0.3]])
    assert accumulated(softmax, normalized=True).compute().saturation == 0.5


def test_dead_experts_are_those_that_never_matter() -> None:
    routing = torch.rand(50, 4).clamp(0.1, 0.9)
    routing[:, 2] = 0.003
    routing[:49, 1] = 0.0
    routing[49, 1] = 0.6
    summary = accumulated(routing).compute()
    assert summary.dead == (2,) and summary.num_dead == 1
    assert summary.scalars()["dead_experts"] == 1.0


def test_an_expert_that_ignores_its_input_has_no_spread() -> None:
    summary = accumulated(torch.full((1000, 3), 0.7)).compute()
    assert summary.std.abs().max() < 1e-6 and summary.mean_entropy == pytest.approx(1.0)


def test_memory_does_not_grow_and_no_graph_is_kept() -> None:
    statistics = RoutingStatistics()
    for _ in range(3):
        statistics.update(torch.rand(1000, 4, requires_grad=True) * 1.0)
    assert sum(value.numel() for value in statistics._sums.values()) < 200
    assert not any(value.requires_grad for value in statistics._sums.values())


def test_half_precision_empty_batches_and_reset() -> None:
    statistics = RoutingStatistics()
    statistics.update(torch.rand(8, 3).bfloat16())
    statistics.update(torch.rand(0, 3))
    assert statistics.compute().num_examples == 8
    statistics.reset()
    with pytest.raises(RuntimeError, match="no routing weights were seen"):
        statistics.compute()


def test_bad_input_is_named() -> None:
    statistics = RoutingStatistics()
    statistics.update(torch.rand(2, 3))
    with pytest.raises(ValueError, match="of 3 experts, got 4"):
        statistics.update(torch.rand(2, 4))
    for wrong in (torch.rand(3), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"floating \[N, E\] matrix"):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="num_bins"):
        RoutingStatistics(num_bins=0)


def test_recording_a_network() -> None:
    net = SmallNet().eval()
    report = convert(net, 3, blocks="blocks.*.*", exclude="se", classifier="classifier", routing="softmax")
    with record_routing(net) as statistics:
        for count in (2, 5):
            net(torch.randn(count, 3, 12, 12))
    assert tuple(statistics) == report.routers
    for name, recorded in statistics.items():
        summary = recorded.compute()
        assert summary.num_examples == 7, name
        assert float(summary.mean.sum()) == pytest.approx(1.0) and recorded.normalized
    net(torch.randn(2, 3, 12, 12))
    assert statistics["classifier.router"].num_examples == 7, "recording must end with the context"
    with pytest.raises(ValueError, match="no router"), record_routing(SmallNet()):
        pass
