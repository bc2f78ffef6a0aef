"""Routing weights as the layers get them, however they are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condconv import CondConv2d
from condconv.recording import record_layers


class ByName(nn.Module):
    """Hands its layer everything by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = CondConv2d(3, 4, 1, num_experts=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x=x, routing_weights=torch.full((len(x), 2), 0.25))
        return y


def recorded(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), record_layers(net, lambda name, routing_NE: seen.update({name: routing_NE})):
        net(x)
    return seen


def test_layers_that_are_called_by_keyword() -> None:
    assert recorded(ByName(), torch.randn(5, 3, 2, 2))["conv"].tolist() == [[0.25, 0.25]] * 5


def test_networks_that_are_compiled_already() -> None:
    net, x = nn.Sequential(CondConv2d(3, 4, 1, num_experts=2)), torch.randn(5, 3, 2, 2)
    expected = recorded(net, x)["0"]
    net.compile(backend="eager")
    with torch.no_grad():
        net(x)
    assert torch.equal(recorded(net, x)["0"], expected)
