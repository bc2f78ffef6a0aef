"""Collapsing is exact where routing is constant, and says what it costs where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from numerics import assert_close
from small_networks import SmallNet
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured as prune

from condconv import CondConv2d, CondLinear, Router, convert
from condconv.collapse import collapse, routing_moments
from condconv.routing import build_router

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def converted(routing: str = "fc", experts: int = 3) -> SmallNet:
    net = SmallNet()
    convert(net, experts, blocks="blocks.*.*", classifier="classifier", exclude="se", routing=routing)
    return net.eval()


@pytest.mark.parametrize("routing", ["fc", "softmax", "hidden_small", "hierarchical", "single", "partially_shared"])
def test_constant_routing_collapses_exactly(routing: str) -> None:
    net = converted(routing)
    for module in net.modules():
        if isinstance(module, Router):
            nn.init.zeros_(module.fc.weight)
            nn.init.normal_(module.fc.bias)  # constant, but different for each expert
    expected = net(X)
    keys = set(SmallNet().state_dict())
    report = collapse(net, routing_moments(net, [X[:4], X[4:]]))
    assert report.exact and len(report.layers) == 13
    assert set(net.state_dict()) == keys, "a static network with the static names"
    assert not any(isinstance(m, CondConv2d | CondLinear | Router) for m in net.modules())
    assert_close(net(X), expected, routing)


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    layer = CondConv2d(4, 4, 3, padding=1, num_experts=3)
    net, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4, 6, 6)
    collapse(net, torch.tensor([0.2, 0.5, 0.3]))
    assert type(net[0]) is nn.Conv2d and net[2] is net[0]
    assert net(x).shape == (2, 4, 6, 6)


class Doubled(nn.Module):
    """A parametrization that is seen to run."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(("bias", "frozen"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(
    "compute",
    [lambda layer: register_parametrization(layer, "weight", Doubled()), lambda layer: prune(layer, "weight", 3)],
)
def test_experts_that_are_computed(compute: Callable[[nn.Module], object], bias: bool, frozen: bool) -> None:
    layer = CondConv2d(3, 4, 3, bias=bias, num_experts=3)
    nn.init.zeros_(layer.router.fc.weight)
    compute(layer)
    if frozen:
        layer.requires_grad_(False)
        layer.router.requires_grad_(True)
    net = nn.Sequential(layer)
    expected = net(X)
    report = collapse(net, routing_moments(net, [X]))
    assert report.exact and net[0].weight.requires_grad is not frozen
    assert_close(net[0](X), expected, "mixed kernel")


def test_the_cost_is_the_change_of_the_kernels() -> None:
    layer = CondConv2d(3, 4, 3, num_experts=5)
    nn.init.normal_(layer.router.fc.weight, 0, 20)
    net = nn.Sequential(layer)
    routing = layer.router(X).detach().double()
    kernels = torch.einsum(
        "ne,e...->n...", routing, torch.cat([p.detach().double().flatten(1) for p in (layer.weight, layer.bias)], 1)
    )
    mean = kernels.mean(0)
    expected = float((kernels - mean).square().sum(1).mean().sqrt() / mean.norm())
    report = collapse(net, routing_moments(net, [X]))
    assert math.isclose(report.layers[0].cost, expected, rel_tol=1e-9) and expected > 0.1
    assert not report.exact
    assert f"0  {expected:.3g}" in str(report)
    assert_close(net[0].weight.flatten(), mean[: net[0].weight.numel()], "mixed kernel", torch.float32)


def test_given_weights_for_all_or_for_each_layer() -> None:
    net, one_hot = converted(), torch.tensor([0.0, 1.0, 0.0])
    expert = net.blocks[1][0].conv_dw.weight[1].clone()
    report = collapse(net, one_hot)
    assert torch.equal(net.blocks[1][0].conv_dw.weight, expert)
    assert report.layers[0].cost is None and "not measured" in str(report)
    net = nn.Sequential(CondConv2d(3, 4, 3, padding="same_tf", stride=2, num_experts=2))
    x, weights = torch.randn(2, 3, 9, 8), torch.tensor([0.3, -0.2])
    expected = net[0](x, weights.expand(2, 2))
    collapse(net, {"0": weights})
    assert_close(net(x), expected, "same_tf")


class RoutesByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = build_router("fc", 3, 2)
        self.conv = CondConv2d(3, 4, 3, num_experts=2, router=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.router(x))


def test_layers_that_are_called_with_routing_weights_are_refused_and_left() -> None:
    net = RoutesByHand()
    expected = net(X)
    with pytest.raises(ValueError, match="conv has no router"):
        collapse(net, routing_moments(net, [X]))
    assert torch.equal(net(X), expected)


def test_what_cannot_be_collapsed_is_refused_and_left() -> None:
    net = converted()
    before = net(X)
    with pytest.raises(ValueError, match="has 3 experts, its routing weights the shape"):
        collapse(net, torch.ones(4))
    with pytest.raises(ValueError, match=r"no routing weights are given for blocks\.0\.0\.conv_pw"):
        collapse(net, {"classifier": torch.ones(3)})
    with pytest.raises(ValueError, match="no routing weights were seen for blocks"):
        routing_moments(net, [])
    with pytest.raises(ValueError, match="has no CondConv layer"):
        collapse(SmallNet(), torch.ones(3))
    assert torch.equal(net(X), before)
