"""Routing functions by name against hand computations, their precision, dropout, options and mistakes."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor, nn

import condconv
from condconv import ROUTINGS, Router, build_router
from condconv.routing import DEFAULT_GAIN, FCRouter, SoftmaxRouter, check_routing, pool

SIGMOID = [name for name in ROUTINGS if name != "softmax"]


def parameters(router: Router) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in router.named_parameters()}


def test_names() -> None:
    assert set(ROUTINGS) == {
        "fc",
        "softmax",
        "hidden_small",
        "hidden_medium",
        "hidden_large",
        "hierarchical",
        "single",
        "partially_shared",
    }
    assert condconv.ROUTINGS is ROUTINGS


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1), (3, 4, 5, 7), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_shapes_and_precision(name: str, shape: tuple[int, ...]) -> None:
    router = build_router(name, 4, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        routing = router(torch.randn(shape).to(dtype))
        assert routing.shape == (3, 5)
        assert routing.dtype == torch.float32
        assert (routing > 0).all()
        assert (routing < 1).all()
    assert router.in_channels == 4
    assert router.num_experts == 5
    assert router(torch.randn(0, *shape[1:])).shape == (0, 5)


def test_fc_by_hand() -> None:
    """Two channels, two experts, a 1x2 map: `sigmoid(mean(x) R + b)`, number by number."""
    router = build_router("fc", 2, 2)
    with torch.no_grad():
        router.fc.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))  # type: ignore[union-attr, operator]
        router.fc.bias.copy_(torch.tensor([0.5, -0.25]))  # type: ignore[union-attr, operator]
    x = torch.tensor([[[[1.0, 3.0]], [[-1.0, 0.0]]]])  # means 2 and -0.5
    expected = [1 / (1 + math.exp(-(2 - 1 + 0.5))), 1 / (1 + math.exp(-(-2 - 0.25 - 0.25)))]
    assert router(x)[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["fc", "single", "partially_shared", "hierarchical"])
def test_fc_is_a_sigmoid_of_one_linear_map(name: str) -> None:
    """Not a softmax: the weights of an example do not sum to one, and one expert does not push another."""
    router = build_router(name, 4, 3)
    x = torch.randn(5, 4, 6, 7)
    p = parameters(router)
    assert set(p) == {"fc.weight", "fc.bias"}
    expected = torch.sigmoid(x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"])
    routing = router(x)
    assert_close(routing, expected, "routing")
    assert (routing.sum(1) - 1).abs().min() > 1e-3
    with torch.no_grad():
        router.fc.bias[0] += 3.0  # type: ignore[union-attr, operator, index]
    assert torch.equal(router(x)[:, 1:], routing[:, 1:])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 30.0])
def test_softmax(temperature: float) -> None:
    router = build_router("softmax", 4, 3, temperature=temperature)
    x = torch.randn(5, 4, 6, 7)
    p = parameters(router)
    logits = x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    e = (logits / temperature).exp()
    assert_close(router(x), e / e.sum(1, keepdim=True), "routing")
    assert router(x).sum(1).tolist() == pytest.approx([1.0] * 5, rel=1e-6)


def test_the_temperature_is_state_and_no_parameter() -> None:
    router = build_router("softmax", 4, 3, temperature=30.0)
    assert isinstance(router, SoftmaxRouter)
    assert "temperature" not in dict(router.named_parameters())
    assert router.state_dict()["temperature"].item() == 30.0
    router.set_temperature(7.0)
    other = build_router("softmax", 4, 3)
    other.load_state_dict(router.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(other(x), router(x))
    router.set_temperature(1e6)
    assert router(x).flatten().tolist() == pytest.approx([1 / 3] * 15, rel=1e-4)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            router.set_temperature(wrong)


def test_the_temperature_is_there_again_after_the_meta_device() -> None:
    router = build_router("softmax", 4, 3, temperature=30.0, device="meta").to_empty(device="cpu")
    router.temperature.fill_(math.nan)  # what memory happens to hold
    router.reset_parameters()
    assert router.temperature.item() == 30.0


@pytest.mark.parametrize("name", ROUTINGS)
def test_logits_are_what_is_activated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subclasses may give other logits: no router goes around the method."""
    router = build_router(name, 4, 3)
    seen: list[Tensor] = []
    logits = router.logits
    monkeypatch.setattr(router, "logits", lambda pooled: seen.append(logits(pooled)) or seen[-1])
    assert torch.equal(router(torch.randn(5, 4, 6, 7)), router.activation(seen[0]))


@pytest.mark.parametrize(
    ("name", "channels", "units"),
    [
        ("hidden_small", 32, 4),
        ("hidden_medium", 32, 32),
        ("hidden_large", 32, 256),
        ("hidden_small", 3, 1),  # never without a unit
    ],
)
def test_hidden(name: str, channels: int, units: int) -> None:
    router = build_router(name, channels, 5)
    x = torch.randn(4, channels, 3, 3)
    p = parameters(router)
    assert {key: tuple(value.shape) for key, value in p.items()} == {
        "hidden.weight": (units, channels),
        "hidden.bias": (units,),
        "fc.weight": (5, units),
        "fc.bias": (5,),
    }
    hidden = (x.mean((2, 3)) @ p["hidden.weight"].T + p["hidden.bias"]).clamp(min=0)
    assert_close(router(x), torch.sigmoid(hidden @ p["fc.weight"].T + p["fc.bias"]), "routing")


def test_hierarchical() -> None:
    router = build_router("hierarchical", 4, 3, prev_experts=2)
    x, previous = torch.randn(5, 4, 6, 7), torch.rand(5, 2)
    p = parameters(router)
    assert p["fc.weight"].shape == (3, 6)
    pooled = torch.cat([x.mean((2, 3)), previous], dim=1)
    assert_close(router(x, previous), torch.sigmoid(pooled @ p["fc.weight"].T + p["fc.bias"]), "routing")
    previous.requires_grad_()
    router(x, previous).sum().backward()
    assert previous.grad is not None
    assert previous.grad.any()
    first = build_router("hierarchical", 4, 3)
    assert first(x).shape == (5, 3)


def test_hierarchical_wants_the_previous_weights_it_was_built_for() -> None:
    x = torch.randn(5, 4)
    second, first = build_router("hierarchical", 4, 3, prev_experts=2), build_router("hierarchical", 4, 3)
    for router, previous, message in (
        (second, None, "expects 2 previous routing weights, got 0"),
        (second, torch.rand(5, 3), "expects 2 previous routing weights, got 3"),
        (first, torch.rand(5, 3), "expects 0 previous routing weights, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            router(x, previous)


@pytest.mark.parametrize("name", ROUTINGS)
def test_initialisation_is_the_authors_dense_layer(name: str) -> None:
    """With gain 1: Glorot-uniform weights, zero biases, also of the last layer of those with a hidden one."""
    options: dict[str, Any] = {"prev_experts": 16} if name == "hierarchical" else {}
    router = build_router(name, 64, 48, gain=1.0, **options)
    for module in router.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not module.bias.any()


@pytest.mark.parametrize("name", ROUTINGS)
def test_float32_inside_autocast_and_half_precision_networks(name: str) -> None:
    router = build_router(name, 16, 4)
    x = torch.randn(5, 16, 7, 7)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x), expected)
    half = copy.deepcopy(router).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = half(x.half())
    assert routing.dtype == torch.float32
    rounded = copy.deepcopy(half).float()  # the half router's own parameters, but all arithmetic in float32
    assert torch.equal(routing, rounded(x.half().float()))
    double = copy.deepcopy(router).double()(x.double())
    assert double.dtype == torch.float64
    assert_close(double, expected, "routing", torch.float32)


def test_pooling_adds_up_in_float32() -> None:
    """20,000 ones and one tenth: in float16 the sum alone would overflow or stop to grow."""
    x = torch.full((1, 2, 200, 100), 1.1).half()
    assert pool(x).dtype == torch.float32
    assert_close(pool(x), torch.full((1, 2), x[0, 0, 0, 0].float().item()), "mean", torch.float32)
    x = torch.randn(3, 4, 5, 6)
    assert_close(pool(x), x.double().flatten(2).mean(2), "mean", torch.float32)
    assert_close(pool(x.contiguous(memory_format=torch.channels_last)), pool(x), "mean")
    assert torch.equal(pool(x[:, :, 0, 0]), x[:, :, 0, 0])


def test_representation() -> None:
    assert build_router("fc", 4, 6).extra_repr() == "4, 6"
    text = build_router("fc", 4, 6, dropout=0.1, expert_dropout=0.2).extra_repr()
    assert text == "4, 6, dropout=0.1, expert_dropout=0.2"


@pytest.mark.parametrize("name", ROUTINGS)
def test_device_and_dtype(name: str) -> None:
    router = build_router(name, 4, 6, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in router.parameters()} == {("meta", torch.float64)}
    assert all(b.device.type == "meta" for b in router.buffers())
    assert router(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 6)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "typo": ({"name": "fcc"}, "Unknown routing function 'fcc'. Did you mean 'fc'? Available: fc, softmax"),
    "hidden without a size": ({"name": "hidden"}, "Unknown routing function 'hidden'. Did you mean 'hidden_"),
    "None": ({"name": None}, "Unknown routing function None. Available"),
    "channels": ({"in_channels": 0}, "in_channels must be an integer >= 1, got 0"),
    "experts": ({"num_experts": 2.5}, "num_experts must be an integer >= 1, got 2.5"),
    "experts negative": ({"num_experts": -1}, "num_experts must be an integer >= 1, got -1"),
    "dropout of all": ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    "dropout negative": ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
    "expert dropout": ({"expert_dropout": 1.5}, "expert_dropout must be in [0, 1), got 1.5"),
    "dropout not a number": ({"dropout": float("nan")}, "dropout must be in [0, 1), got nan"),
    "temperature of fc": (
        {"temperature": 2.0},
        "temperature=2.0 is an option of routing 'softmax', not of 'fc'",
    ),
    "temperature 0": ({"name": "softmax", "temperature": 0.0}, "temperature must be positive, got 0.0"),
    "previous experts": ({"prev_experts": 4}, "prev_experts=4 is an option of routing 'hierarchical', not of 'fc'"),
    "previous experts negative": (
        {"name": "hierarchical", "prev_experts": -1},
        "prev_experts must be an integer >= 0, got -1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(**({"name": "fc", "in_channels": 4, "num_experts": 6} | changes))


def test_inputs_of_the_wrong_shape() -> None:
    router = build_router("fc", 4, 6)
    for shape in ((4,), (2, 5), (2, 5, 4, 4)):
        with pytest.raises(ValueError, match=re.escape(f"pools inputs [N, 4, ...] but was given {shape}")):
            router(torch.randn(shape))


def test_known_names_pass() -> None:
    for name in ROUTINGS:
        check_routing(name)
    with pytest.raises(NotImplementedError):
        Router(4, 6)(torch.randn(2, 4))


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_starts_almost_alike_for_all_examples(name: str) -> None:
    """The default gain shrinks the map that gives the logits, and no other layer."""
    options: dict[str, Any] = {"prev_experts": 16} if name == "hierarchical" else {}
    router = build_router(name, 64, 48, **options)
    assert isinstance(router, FCRouter)
    for module in router.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            bound *= DEFAULT_GAIN if module is router.fc else 1.0
            assert 0.9 * bound < module.weight.abs().max().item() <= bound
    with pytest.raises(ValueError, match="gain must be at least 0"):
        build_router(name, 64, 48, gain=-1.0, **options)
