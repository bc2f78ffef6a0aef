"""A static network's CondConv twin computes the same at step 0, for every input, and its experts then part."""

from __future__ import annotations

import copy
import itertools
from statistics import median

import pytest
import torch
from numerics import assert_close
from small_networks import SmallNet
from torch import Tensor, nn

from condconv import ROUTINGS, CondConv2d, CondLinear, Router, convert
from condconv.upcycle import Upcycle

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def upcycled(static: nn.Module, init: str | Upcycle, experts: int = 5, routing: str = "fc") -> nn.Module:
    net = copy.deepcopy(static)
    convert(net, experts, blocks="blocks.*.*", classifier="classifier", exclude="se", routing=routing, init=init)
    return net


def cond_layers(net: nn.Module) -> list[CondConv2d | CondLinear]:
    return [m for m in net.modules() if isinstance(m, CondConv2d | CondLinear)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("routers", "experts"), [*itertools.product(("neutral", "paired"), (1, 2, 3, 8))])
def test_the_output_is_unchanged_for_every_routing_function(routing: str, routers: str, experts: int) -> None:
    static = SmallNet().double()
    net = upcycled(static, Upcycle(noise=0.5, routers=routers), experts, routing)
    for scale in (0.1, 1.0, 30.0):  # far from what any calibration would have seen
        assert_close(net(scale * X.double()), static(scale * X.double()), f"{routing} {routers} {experts} {scale}")


def test_routers_route_from_the_first_step_when_paired() -> None:
    def spread(init: str) -> Tensor:
        net = upcycled(SmallNet(), init, 4)
        return torch.stack([net.blocks[0][0].router(torch.randn(9, 6, 4, 4)).std(0).min()])

    assert spread("upcycle_neutral") == 0
    assert spread("upcycle") > 0.01


@pytest.mark.parametrize("routers", ["neutral", "paired"])
def test_noise_has_the_size_asked_for(routers: str) -> None:
    static = nn.Sequential(nn.Linear(40, 50))
    for noise in (0.0, 0.1, 2.0):
        net = copy.deepcopy(static)
        convert(net, 8, classifier="0", init=Upcycle(noise=noise, routers=routers))
        share = static[0].weight / 4
        deviation = (net[0].weight - share).square().mean().sqrt() / share.square().mean().sqrt()
        assert abs(deviation.item() - noise) < 0.05 * noise + 1e-6
        assert (torch.linalg.matrix_rank((net[0].weight - share).flatten(1)) > 1) == (noise > 0)


def test_training_parts_the_experts_and_moves_the_routers() -> None:
    pairs, neutral = train_and_part("upcycle"), train_and_part("upcycle_neutral")
    # All layers with pairs; with neutral routers the classifier at most, which is why pairs are the default.
    assert min(pairs) > 0.02, f"experts moved alike: {pairs}"
    assert max(neutral) > 0.02, f"experts moved alike: {neutral}"
    assert median(pairs) > 10 * median(neutral)


def train_and_part(init: str) -> list[float]:
    """Train an upcycled network by heart; by layer, how much of its experts' movement is not common to all of them."""
    torch.manual_seed(1)
    net = upcycled(SmallNet(), init, 4)
    labels = torch.arange(6) % 5
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    before = [layer.weight.detach().clone() for layer in cond_layers(net)]
    routers = [m for m in net.modules() if isinstance(m, Router)]
    losses = []
    for step in range(130):
        loss = nn.functional.cross_entropy(net(3 * X), labels)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for router in routers:
                rows = router.fc.weight.grad
                assert rows.abs().sum() > 0, "the router learns from the first step"
                assert (rows[0] - rows[2]).norm() > 1e-3 * rows.norm(), "and its rows differ, by the noise"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    apart = []
    for layer, start in zip(cond_layers(net), before, strict=True):
        moved = layer.weight.detach() - start
        apart.append(float((moved - moved.mean(0)).norm() / moved.norm()))
    with torch.no_grad():
        routing = routers[-1](torch.randn(8, routers[-1].in_channels))
    assert routing.std(0).min() > 1e-3, "routing depends on the input by now"
    return apart


def test_without_noise_neutral_experts_stay_equal() -> None:
    """Why there is noise: equal experts with equal routing weights get equal gradients for ever."""
    net = upcycled(SmallNet(), Upcycle(noise=0.0, routers="neutral"), 4)
    net(X).square().sum().backward()
    for layer in cond_layers(net):
        gradient = layer.weight.grad
        assert torch.allclose(gradient, gradient[:1].expand_as(gradient))
    for router in (m for m in net.modules() if isinstance(m, Router)):
        gradient = router.fc.weight.grad
        assert torch.allclose(gradient, gradient[:1].expand_as(gradient), rtol=1e-4, atol=1e-6)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown init 'upcyle': give one of independent, upcycle, upcycle_neutral"):
        upcycled(SmallNet(), "upcyle")
    with pytest.raises(ValueError, match="noise of upcycled experts must be a number from 0 to 100, got -1"):
        Upcycle(noise=-1)
    with pytest.raises(ValueError, match="start paired or neutral, not 'random'"):
        Upcycle(routers="random")
