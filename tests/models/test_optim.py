"""Parameter roles and groups; optimisers against independent numpy computations, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from condconv.layers import CondConv2d, CondLinear
from condconv.routing import Router
from models.optim import OPTIMIZERS, ROLES, build_optimizer, keep_settings, parameter_groups, parameter_roles


def small_net() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3, bias=True),
            "norm": nn.BatchNorm2d(4),
            "cond": CondConv2d(4, 6, 1, num_experts=2),
            "head": CondLinear(6, 5, num_experts=3),
            "scale": nn.ParameterDict({"gamma": nn.Parameter(torch.ones(4))}),
        }
    )


def test_every_parameter_has_its_role() -> None:
    net = small_net()
    roles = parameter_roles(net)
    assert roles.keys() == {name for name, _ in net.named_parameters()}
    routers = [name for name in roles if ".router." in name and not name.endswith("bias")]
    assert len(routers) == 2
    expected = dict.fromkeys(routers, "router") | {
        "stem.weight": "weight",
        "stem.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "cond.weight": "expert",
        "cond.bias": "bias",
        "head.weight": "expert",
        "head.bias": "bias",
        "scale.gamma": "bias",
    }
    router_biases = [name for name in roles if ".router." in name and name.endswith("bias")]
    assert router_biases
    assert roles == expected | dict.fromkeys(router_biases, "router_bias")


def test_groups_partition_the_trainable_parameters() -> None:
    net = small_net()
    net["stem"].weight.requires_grad_(False)
    groups = parameter_groups(net, 0.1, decay_by_role={"router": 0.0, "expert": 0.3, "bias": 0.2})
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("norm", 0.0),
        ("bias", 0.2),
        ("router", 0.0),
        ("expert", 0.3),
    ]
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == {id(p) for p in net.parameters() if p.requires_grad}
    whole = {group["name"]: group["weight_decay"] for group in parameter_groups(small_net(), 0.1, no_decay=["norm"])}
    assert whole == {role: 0.0 if role == "norm" else 0.1 for role in ROLES if role != "router_bias"}


def test_a_lone_router_and_a_lone_layer_are_networks_too() -> None:
    assert set(parameter_roles(CondConv2d(2, 2, 1, num_experts=2).router).values()) == {"router", "router_bias"}
    assert isinstance(CondConv2d(2, 2, 1, num_experts=2).router, Router)
    assert parameter_roles(nn.Linear(2, 2)) == {"weight": "weight", "bias": "bias"}


def tensorflow_rmsprop(value: np.ndarray, gradient: Any, rates: list[float], l2: float) -> np.ndarray:
    """TensorFlow 1's RMSPropOptimizer(rate, decay=0.9, momentum=0.9, epsilon=1e-3), as its kernel documents it."""
    value = value.astype(np.float64).copy()
    mean_square, moment = np.ones_like(value), np.zeros_like(value)
    for step, rate in enumerate(rates):
        grad = gradient(step, value) + l2 * value  # the gradient of l2 * sum(value ** 2) / 2, tf.nn.l2_loss
        mean_square += (grad * grad - mean_square) * (1 - 0.9)
        moment = moment * 0.9 + rate * grad / np.sqrt(mean_square + 1e-3)
        value -= moment
    return value


def test_rmsprop_equals_tensorflows_at_every_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    start = {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
    noise = {name: torch.randn(30, *p.shape, dtype=torch.float64) * 0.05 for name, p in net.named_parameters()}
    # The authors' values; the rate changes at every step, so it matters that it enters the momentum.
    optimizer = build_optimizer(net, name="rmsprop_tf", lr=0.128, l2=1e-1, no_decay=["norm"])
    rates = [0.128 * (step % 7) / 7 for step in range(30)]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in net.named_parameters():
            parameter.grad = noise[name][step] + 0.01 * parameter.detach()
        optimizer.step()
        for name, parameter in net.named_parameters():

            def gradient(at: int, value: np.ndarray, name: str = name) -> np.ndarray:
                return noise[name][at].numpy() + 0.01 * value

            l2 = 0.0 if name.startswith("1.") else 1e-1
            expected = tensorflow_rmsprop(start[name], gradient, rates[: step + 1], l2)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_rmsprop_differs_from_torchs_form() -> None:
    """The test above would be worthless if it could not tell the two forms apart."""
    ours, torchs = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(ours.weight)
    nn.init.ones_(torchs.weight)
    for net, optimizer in (
        (ours, build_optimizer(ours, name="rmsprop_tf", lr=0.1)),
        (torchs, torch.optim.RMSprop(torchs.parameters(), lr=0.1, alpha=0.9, eps=1e-3, momentum=0.9)),
    ):
        net.weight.grad = torch.full_like(net.weight, 0.01)
        optimizer.step()
    assert ours.weight.item() == pytest.approx(1 - 0.1 * 0.01 / np.sqrt(0.9 + 0.1 * 1e-4 + 1e-3))
    assert torchs.weight.item() < 0.8


@pytest.mark.parametrize(
    ("options", "shrink"),
    [
        ({"name": "sgd", "weight_decay": 0.1}, 1 - 0.05 * 0.1),
        ({"name": "adamw", "weight_decay": 0.1}, 1 - 0.05 * 0.1),
        ({"name": "rmsprop_tf", "weight_decay": 0.1}, 1 - 0.05 * 0.1),
        ({"name": "sgd", "l2": 0.1}, 1 - 0.05 * 0.1),  # one step of plain L2 is the same; its form shows below
    ],
)
def test_decay_without_a_gradient(options: dict[str, Any], shrink: float) -> None:
    net = nn.Linear(3, 2)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    optimizer = build_optimizer(net, lr=0.05, **options)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), weight * shrink)
    assert torch.equal(net.bias, bias)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop_tf"])
def test_l2_is_the_gradient_of_a_term_in_the_loss(name: str) -> None:
    torch.manual_seed(0)
    coupled, in_loss = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    in_loss.load_state_dict(coupled.state_dict())
    optimizers = (
        build_optimizer(coupled, name=name, lr=0.05, l2=0.3, nesterov=True),
        build_optimizer(in_loss, name=name, lr=0.05, nesterov=True),
    )
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(5):
        coupled(x).square().sum().backward()
        (in_loss(x).square().sum() + 0.3 / 2 * in_loss.weight.square().sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(coupled.weight, in_loss.weight)
    torch.testing.assert_close(coupled.bias, in_loss.bias)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_checkpoint(name: str, tmp_path: Any) -> None:
    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net, name=name, lr=0.05)
    step(net, optimizer, 0)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = nn.Linear(3, 2)
    resumed = build_optimizer(other, name=name, lr=0.05)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert [group["name"] for group in resumed.param_groups] == ["bias", "weight"]
    step(net, optimizer, 1)
    step(other, resumed, 1)
    assert torch.equal(net.weight, other.weight)


def test_a_checkpoint_brings_the_state_and_not_the_settings() -> None:
    net = nn.Linear(3, 2)
    before = build_optimizer(net, name="sgd", lr=0.5, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    before.step()
    saved = before.state_dict()
    saved["param_groups"][0]["counted"] = 7  # as some optimisers keep what is state
    now = build_optimizer(net, name="sgd", lr=0.1, momentum=0.8, l2=0.3)
    keep_settings(now)
    now.load_state_dict(saved)
    groups = {group["name"]: group for group in now.param_groups}
    assert all((group["lr"], group["momentum"]) == (0.1, 0.8) for group in groups.values())
    assert groups["weight"]["weight_decay"] == 0.3 and groups["bias"]["weight_decay"] == 0
    assert groups["bias"]["counted"] == 7
    for parameter in net.parameters():
        assert torch.equal(now.state[parameter]["momentum_buffer"], before.state[parameter]["momentum_buffer"])
    other = build_optimizer(nn.Linear(3, 2, bias=False), name="sgd", lr=0.1)
    keep_settings(other)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lars"}, "Unknown optimiser 'lars'; choose one of"),
        ({"l2": 0.1, "weight_decay": 0.1}, "not both"),
        ({"name": "adam", "weight_decay": 0.1}, "use 'adamw'"),
        ({"name": "adamw", "l2": 0.1}, "use 'adam'"),
        ({"lr": -1.0}, "at least 0"),
        ({"no_decay": ["batchnorm"]}, "Unknown parameter role"),
        ({"decay_by_role": {"experts": 0.1}}, "Unknown parameter role"),
        ({"decay_by_role": {"expert": -0.1}}, "at least 0"),
        ({"lr_factor_by_role": {"gate": 0.1}}, "lr_factor_by_role"),
        ({"lr_factor_by_role": {"router": -0.1}}, "lr_factor_by_role"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(nn.Linear(2, 2), **({"lr": 0.1} | options))


def test_roles_may_have_learning_rates_of_their_own() -> None:
    optimizer = build_optimizer(small_net(), name="adamw", lr=0.2, lr_factor_by_role={"router": 0.1, "expert": 2.0})
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"norm": 0.2, "bias": 0.2, "router": 0.02, "expert": 0.4, "weight": 0.2})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == pytest.approx([rate / 2 for rate in rates.values()])


def test_biases_of_routers_are_biases_unless_they_are_named() -> None:
    def settings(**options: Any) -> dict[str, tuple[float, float]]:
        optimizer = build_optimizer(small_net(), lr=0.2, l2=0.1, **options)
        return {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}

    assert "router_bias" not in settings(lr_factor_by_role={"router": 0.0})
    stopped = settings(lr_factor_by_role={"router": 0.0, "router_bias": 0.0}, decay_by_role={"bias": 0.3})
    assert stopped["router"] == (0.0, 0.1) and stopped["router_bias"] == (0.0, 0.3) and stopped["bias"] == (0.2, 0.3)
    assert settings(decay_by_role={"router_bias": 0.5})["router_bias"] == (0.2, 0.5)
    slow = settings(decay_by_role={"router_bias": 0.5}, lr_factor_by_role={"bias": 0.5})
    assert slow["router_bias"] == (0.1, 0.5) and slow["bias"] == (0.1, 0.0)


def test_routers_can_be_stopped() -> None:
    net = small_net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = build_optimizer(net, lr=0.2, lr_factor_by_role={"router": 0.0, "router_bias": 0.0})
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stopped = {name for name, value in net.named_parameters() if torch.equal(value, before[name])}
    assert stopped == {name for name in before if ".router." in name}


def test_a_frozen_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=0.1)
