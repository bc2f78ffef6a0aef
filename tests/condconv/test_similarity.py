"""Similarity of experts, routers and depths in cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import SmallNet

from condconv.analysis import RoutingStatistics
from condconv.compress import compress_experts
from condconv.convert import convert
from condconv.similarity import depth_similarity, expert_similarity, router_similarity
from condconv.survey import RouterSurvey, RoutingSurvey


def test_cosines_of_experts_and_routers() -> None:
    net = SmallNet()
    convert(net, 3, blocks=("blocks.1.0",))
    layer = net.blocks[1][0].conv_pwl
    with torch.no_grad():
        layer.weight[1] = 2 * layer.weight[0]
        layer.weight[2] = -layer.weight[0]
        net.blocks[1][0].router.fc.weight.copy_(torch.eye(3, 7))
    found = {each.name: each for each in expert_similarity(net)}
    # Squeeze-and-excitation is converted too.
    assert [n.rpartition(".")[2] for n in found] == ["conv_pw", "conv_dw", "reduce", "expand", "conv_pwl"]
    expected = torch.tensor([[1, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(found["blocks.1.0.conv_pwl"].cosine, expected)
    assert found["blocks.1.0.conv_pwl"].mean_cosine == pytest.approx(-1 / 3)
    # Distances of 1, 2 and -1 times a kernel from their mean, which is 2/3 of it.
    assert found["blocks.1.0.conv_pwl"].spread == pytest.approx(math.sqrt((1 / 9 + 16 / 9 + 25 / 9) / 3) / (2 / 3))
    (router,) = router_similarity(net)
    assert router.name == "blocks.1.0" and router.mean_cosine == pytest.approx(0)
    compress_experts(net, "bf16")
    compressed = {each.name: each for each in expert_similarity(net)}
    torch.testing.assert_close(compressed["blocks.1.0.conv_pwl"].cosine, expected, atol=1e-2, rtol=0)


def test_depths_that_decide_alike() -> None:
    base = torch.rand(200, 2)
    angle = torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]])
    weights = {"a": base, "rotated": 0.1 + 0.3 * base @ angle, "other": torch.rand(200, 3), "constant": base * 0 + 0.5}

    def router(name: str) -> RouterSurvey:
        statistics = RoutingStatistics()
        statistics.update(weights[name])
        return RouterSurvey(name, statistics.compute(), None, torch.empty(0), torch.empty(0))

    sample = torch.cat(list(weights.values()), 1)
    cka = depth_similarity(RoutingSurvey(tuple(map(router, weights)), 200, None, sample, torch.zeros(200)))
    assert float(cka[0, 1]) == pytest.approx(1, abs=1e-6) and float(cka[0, 0]) == pytest.approx(1)
    assert float(cka[0, 2]) < 0.1 and bool(cka[3].isnan().all())
