"""What experts without routing are: a static network; see docs/results/cifar10.md."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condconv import CondConv2d

EXPERTS, RATE, DECAY = 8, 0.05, 0.02
TINY = 1e-30  # torch refuses 0


def frozen(in_channels: int, out_channels: int) -> CondConv2d:
    """A layer whose router is zero and stays so."""
    layer = CondConv2d(in_channels, out_channels, 3, bias=False, num_experts=EXPERTS).double()
    nn.init.zeros_(layer.router.fc.weight)
    nn.init.zeros_(layer.router.fc.bias)
    layer.router.requires_grad_(False)
    return layer


def test_frozen_routers_are_a_static_network_at_another_rate() -> None:
    """Routers at zero mix all images alike, by 1/2.

    Under SGD with momentum and L2 that mixture takes the steps of a static kernel at E / 4 times the learning rate
    and L2 over E / 4, from a start that is sqrt(E / 4) times as large.
    """
    torch.manual_seed(0)
    cond = frozen(3, 4)
    static = nn.Conv2d(3, 4, 3, bias=False).double()
    with torch.no_grad():
        static.weight.copy_(cond.weight.sum(0) / 2)
    factor = EXPERTS / 4
    options = {"momentum": 0.9, "nesterov": True}
    optimizers = [
        torch.optim.SGD([cond.weight], RATE, weight_decay=DECAY, **options),
        torch.optim.SGD([static.weight], factor * RATE, weight_decay=DECAY / factor, **options),
    ]
    start = static.weight.detach().clone()
    for _ in range(5):
        x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randn(6, 4, 6, 6, dtype=torch.float64)
        for net, optimizer in zip((cond, static), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
    assert float((static.weight.detach() - start).abs().max()) > 0.01
    torch.testing.assert_close(cond.weight.sum(0) / 2, static.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("relative_rate", [1.0, 0.5])
def test_before_batchnorm_that_is_one_at_the_same_rate(relative_rate: float) -> None:
    """What BatchNorm follows knows no size of kernels, so the step counts that is relative to it.

    Twice the rate on a kernel sqrt(2) times as large, at half the L2, is the same rate and L2 on one of the usual size.
    """
    torch.manual_seed(0)
    cond = nn.Sequential(
        frozen(3, 6), nn.BatchNorm2d(6, eps=TINY), nn.ReLU(), frozen(6, 4), nn.BatchNorm2d(4, eps=TINY)
    )
    convs = [nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False)]
    static = nn.Sequential(convs[0], nn.BatchNorm2d(6, eps=TINY), nn.ReLU(), convs[1], nn.BatchNorm2d(4, eps=TINY))
    cond.double(), static.double()
    with torch.no_grad():
        for place in (0, 3):
            static[place].weight.copy_(cond[place].weight.sum(0) / 2 / (EXPERTS / 4) ** 0.5)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": DECAY}
    optimizers = [
        torch.optim.SGD([p for p in cond.parameters() if p.requires_grad], RATE, **options),
        torch.optim.SGD(static.parameters(), relative_rate * RATE, **options),
    ]
    for _ in range(5):
        x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randn(6, 4, 4, 4, dtype=torch.float64)
        for net, optimizer in zip((cond, static), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
    error = float((cond(x) - static(x)).detach().abs().max())
    assert error < 1e-10 if relative_rate == 1 else error > 1e-2


def test_the_start_is_larger_by_the_root() -> None:
    torch.manual_seed(0)
    cond = CondConv2d(64, 64, 3, bias=False, num_experts=EXPERTS)
    mixed, one = cond.weight.detach().sum(0) / 2, cond.weight.detach()[0]
    assert float(mixed.std() / one.std()) == pytest.approx((EXPERTS / 4) ** 0.5, rel=0.02)
