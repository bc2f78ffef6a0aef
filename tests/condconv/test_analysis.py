"""Statistics of routing weights against the plain computation on all of them at once."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from small_networks import SmallNet
from torch import Tensor

from condconv.analysis import ClassStatistics, RoutingStatistics, normalized_entropy, record_routing
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


def test_an_update_waits_for_no_number() -> None:
    """Meta tensors have none, so whatever would need one fails."""
    statistics = RoutingStatistics()
    for _ in range(2):
        statistics.update(torch.rand(8, 3, device="meta"))
    assert statistics.num_examples == 16 and statistics._sums["histogram"].shape == (3, 20)


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
    assert tuple(statistics) == tuple(unit.name for unit in report.units)
    for name, recorded in statistics.items():
        summary = recorded.compute()
        assert summary.num_examples == 7, name
        assert float(summary.mean.sum()) == pytest.approx(1.0) and recorded.normalized
    net(torch.randn(2, 3, 12, 12))
    assert statistics["classifier"].num_examples == 7, "recording must end with the context"
    with pytest.raises(ValueError, match="no CondConv layers"), record_routing(SmallNet()):
        pass


def sarle(values: numpy.ndarray) -> float:
    centred = values - values.mean()
    skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
    return float((skewness**2 + 1) * (centred**2).mean() ** 2 / (centred**4).mean())


def test_bimodality_equals_the_definition_on_all_weights_at_once() -> None:
    # Small spreads about different means: what sums of powers about zero would lose to rounding.
    spread = torch.tensor([1e-4, 0.02, 0.1], dtype=torch.float64)
    routing = torch.tensor([0.2, 0.5, 0.9]) + spread * torch.rand(501, 3, dtype=torch.float64) ** 2
    summary = accumulated(routing, parts=6).compute()
    whole = routing.numpy()
    assert summary.bimodality == pytest.approx(sarle(whole.ravel()), rel=1e-9)
    own, variance = [sarle(column) for column in whole.T], whole.var(0)
    assert summary.expert_bimodality == pytest.approx((own * variance).sum() / variance.sum(), rel=1e-6)


def test_bimodality_tells_switches_from_constants() -> None:
    switched = accumulated((torch.rand(2000, 2) > 0.5).float()).compute()
    assert switched.bimodality == pytest.approx(1, abs=0.01) and switched.expert_bimodality == pytest.approx(
        1, abs=0.01
    )
    constants = accumulated(torch.tensor([0.1, 0.9]).repeat(100, 1)).compute()
    assert constants.bimodality == pytest.approx(1) and math.isnan(constants.expert_bimodality)
    uniform = accumulated(torch.rand(20000, 1, dtype=torch.float64)).compute()
    assert uniform.expert_bimodality == pytest.approx(5 / 9, abs=0.01)


def by_class(routing_NE: Tensor, labels_N: Tensor, num_classes: int) -> ClassStatistics:
    statistics = ClassStatistics(num_classes)
    for part, labels in zip(routing_NE.tensor_split(5), labels_N.tensor_split(5), strict=True):
        statistics.update(part, labels)
    return statistics


def test_class_statistics_equal_the_plain_computation() -> None:
    labels = torch.randint(-1, 3, (97,))
    routing = torch.rand(97, 4, dtype=torch.float64) * 0.2 + 0.1 * labels[:, None]
    summary = by_class(routing, labels, 5).compute()
    known, classes = routing[labels >= 0].numpy(), labels[labels >= 0].numpy()
    within = numpy.zeros(4)
    for label in range(3):
        rows = known[classes == label]
        assert summary.counts[label] == len(rows)
        numpy.testing.assert_allclose(summary.mean[label], rows.mean(0))
        numpy.testing.assert_allclose(summary.std[label], rows.std(0))
        within += ((rows - rows.mean(0)) ** 2).sum(0)
    assert summary.counts[3:].tolist() == [0, 0] and bool(summary.mean[3:].isnan().all())
    total, count = ((known - known.mean(0)) ** 2).sum(0), len(known)
    numpy.testing.assert_allclose(summary.between, 1 - (within / total) * (count - 1) / (count - 3))
    assert summary.between_all == pytest.approx(1 - (within.sum() / total.sum()) * (count - 1) / (count - 3))


def test_classes_that_mean_nothing_have_no_share_of_the_variance() -> None:
    routing, labels = torch.rand(400, 8), torch.randint(0, 100, (400,))
    assert by_class(routing, labels, 100).compute().between_all < 0.03  # unadjusted: about 0.25
    assert by_class(torch.eye(4)[labels % 4], labels % 4, 4).compute().between_all == pytest.approx(1)
    assert math.isnan(by_class(torch.full((50, 3), 0.7), labels[:50] % 2, 2).compute().between_all)


def test_class_statistics_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 examples need as many labels, got 2"):
        ClassStatistics(2).update(torch.rand(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError, match="no routing weights were seen"):
        ClassStatistics(2).compute()
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        ClassStatistics(0)
