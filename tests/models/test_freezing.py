"""condconv.freeze: what is frozen does not move, running statistics included; the rest does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models import create_model
from models.optim import parameter_roles


def moved(freeze: str, experts: int = 2) -> tuple[dict[str, str], set[str]]:
    """Roles of all parameters, and the names of tensors that two training steps changed."""
    network = create_model("mobilenet_v2", 10, experts, width=0.25, freeze=freeze, from_block=10, classifier=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.01, eps=1e-30)  # moves however small the gradients are
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    after = network.state_dict()
    return parameter_roles(network), {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_backbone() -> None:
    roles, changed = moved("backbone")
    experts = {name for name, role in roles.items() if role == "expert"}
    routers = {name for name in roles if ".router." in name}
    assert changed == experts | routers | {"classifier.weight", "classifier.bias"}
    assert moved("backbone", experts=0)[1] == {"classifier.weight", "classifier.bias"}


def test_experts() -> None:
    roles, changed = moved("experts")
    experts = {name for name, role in roles.items() if role == "expert"}
    assert not changed & experts and set(roles) - experts <= changed


def test_none_and_mistakes() -> None:
    roles, changed = moved("none")
    assert set(roles) <= changed
    with pytest.raises(ValueError, match="freeze must be one of none, backbone, experts, got 'all'"):
        create_model("resnet18", 10, 2, freeze="all")
    with pytest.raises(ValueError, match="needs a network with experts"):
        create_model("resnet18", 10, 0, freeze="experts")


def test_frozen_statistics_survive_a_copy() -> None:
    network = copy.deepcopy(create_model("mobilenet_v1", 10, 2, width=0.25, freeze="backbone")).train()
    before = network.bn1.running_mean.clone()
    network(torch.randn(2, 3, 32, 32))
    assert torch.equal(network.bn1.running_mean, before) and isinstance(network.bn1, nn.BatchNorm2d)
