"""CondConv2d and CondLinear: static twins, initialisation, padding modes, where routing weights come from."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor, nn

from condconv import CondConv2d, CondLinear, Router, build_router, cond_linear, condconv2d

GEOMETRY: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (1, 2), "dilation": (2, 1)},
    {"groups": 2, "padding": "same"},
    {"groups": 4, "bias": False},
    {"padding": "valid", "stride": (2, 1)},
]


def with_kernels_of(layer: CondConv2d | CondLinear, static: nn.Conv2d | nn.Linear) -> CondConv2d | CondLinear:
    """All experts are the static layer."""
    with torch.no_grad():
        layer.weight.copy_(static.weight.expand_as(layer.weight))
        if layer.bias is not None and static.bias is not None:
            layer.bias.copy_(static.bias.expand_as(layer.bias))
    return layer


def ones(batch: int, experts: int) -> Tensor:
    return torch.full((batch, experts), 1.0 / experts)


def test_the_signature_is_that_of_the_static_layer_and_then_ours() -> None:
    for ours, static in ((CondConv2d, nn.Conv2d), (CondLinear, nn.Linear)):
        theirs = [p for p in inspect.signature(static).parameters.values() if p.name not in ("device", "dtype")]
        mine = list(inspect.signature(ours).parameters.values())
        assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
        assert [p.default for p in mine[: len(theirs)]] == [p.default for p in theirs]
        defaults = {p.name: p.default for p in mine[len(theirs) :]}
        assert defaults.pop("num_experts") == 8
        assert defaults.pop("router") == "fc"
        assert defaults.pop("backend") == "auto"
        assert {"device": None, "dtype": None}.items() <= defaults.items()


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_equal_experts_are_the_static_layer(geometry: dict[str, Any], experts: int) -> None:
    static = nn.Conv2d(4, 8, 3, **geometry)
    layer = with_kernels_of(CondConv2d(4, 8, 3, num_experts=experts, router=None, **geometry), static)
    x = torch.randn(3, 4, 9, 8)
    assert_close(layer(x, ones(3, experts)), static(x), "y")


def test_a_depthwise_layer_with_multiplier_is_the_static_one() -> None:
    static = nn.Conv2d(4, 12, (3, 5), groups=4, padding=(1, 2))
    layer = with_kernels_of(CondConv2d(4, 12, (3, 5), groups=4, padding=(1, 2), num_experts=1, router=None), static)
    x = torch.randn(3, 4, 7, 6)
    assert_close(layer(x, torch.ones(3, 1)), static(x), "y")


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_one_expert_with_routing_one_is_the_static_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    static = nn.Linear(5, 7, bias=bias)
    layer = with_kernels_of(CondLinear(5, 7, bias=bias, num_experts=1, router=None), static)
    x = torch.randn(shape)
    assert_close(layer(x, torch.ones(shape[0], 1)), static(x), "y")


@pytest.mark.parametrize("padding", [1, (2, 1), "same", 0, "valid"], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_modes(mode: str, padding: Any) -> None:
    kernel = (4, 3) if padding == "same" else (3, 3)
    options: dict[str, Any] = {"padding": padding, "padding_mode": mode, "dilation": (1, 2)}
    static = nn.Conv2d(3, 5, kernel, **options)
    layer = with_kernels_of(CondConv2d(3, 5, kernel, num_experts=2, router=None, **options), static)
    x = torch.randn(3, 3, 7, 6)
    assert_close(layer(x, ones(3, 2)), static(x), "y")
    y_channels_last = layer(x.contiguous(memory_format=torch.channels_last), ones(3, 2))
    assert_close(y_channels_last, static(x), "y, channels last")


def test_parameters() -> None:
    layer = CondConv2d(4, 6, (3, 5), groups=2, num_experts=3)
    assert layer.weight.shape == (3, 6, 2, 3, 5)
    assert layer.bias is not None
    assert layer.bias.shape == (3, 6)
    assert layer.weight.is_contiguous()
    assert {name: tuple(p.shape) for name, p in CondLinear(4, 6, num_experts=3).named_parameters()} == {
        "weight": (3, 6, 4),
        "bias": (3, 6),
        "router.fc.weight": (3, 4),
        "router.fc.bias": (3,),
    }
    assert [name for name, _ in CondLinear(4, 6, bias=False, router=None).named_parameters()] == ["weight"]


def test_each_expert_is_initialised_as_the_static_layer() -> None:
    """Fan-in of one kernel: that of the stacked tensor would make the weights far too small."""
    static = nn.Conv2d(16, 64, 3, groups=2)
    layer = CondConv2d(16, 64, 3, groups=2, num_experts=5, router=None)
    assert static.bias is not None
    assert layer.bias is not None
    bound = 1 / (8 * 9) ** 0.5
    for expert in layer.weight:
        # The standard error of the deviation of 4,608 uniform numbers is below 1 %.
        assert expert.std().item() == pytest.approx(static.weight.std().item(), rel=0.05)
        assert expert.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert 0.95 * bound < expert.abs().max().item() <= bound
    for biases in layer.bias:
        assert 0.5 * bound < biases.abs().max().item() <= bound
    linear = CondLinear(100, 50, num_experts=4, router=None)
    for expert in linear.weight:
        assert expert.std().item() == pytest.approx(nn.Linear(100, 50).weight.std().item(), rel=0.05)
        assert expert.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_experts_differ_and_are_independent() -> None:
    layer = CondConv2d(8, 16, 3, num_experts=4)
    flat = layer.weight.detach().flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(4)
    assert correlation.abs().max() < 0.15  # 1,152 numbers each: five standard errors
    assert layer.bias is not None
    assert len({row.sum().item() for row in layer.bias}) == 4


def test_one_expert_draws_what_the_static_layer_draws() -> None:
    """The same seed gives the same weights: a static network and its twin with one expert start alike."""
    torch.manual_seed(5)
    static = nn.Conv2d(4, 6, 3)
    torch.manual_seed(5)
    layer = CondConv2d(4, 6, 3, num_experts=1, router=None)
    assert torch.equal(layer.weight[0], static.weight)
    assert layer.bias is not None
    assert static.bias is not None
    assert torch.equal(layer.bias[0], static.bias)


def test_reset_parameters_draws_anew() -> None:
    layer = CondConv2d(4, 6, 3, num_experts=2)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["convolution", "linear", "sequence"])
def test_a_layer_routes_by_its_own_router_or_by_given_weights(kind: str) -> None:
    layer = CondConv2d(4, 6, 3, num_experts=3) if kind == "convolution" else CondLinear(4, 6, num_experts=3)
    x = {"convolution": torch.randn(2, 4, 5, 5), "linear": torch.randn(2, 4), "sequence": torch.randn(2, 7, 4)}[kind]
    assert layer.router is not None
    pooled = {"convolution": x.mean((-1, -2)) if x.dim() == 4 else x, "linear": x, "sequence": x.mean(1)}[kind]
    own = torch.sigmoid(layer.router.fc(pooled))  # type: ignore[operator]
    function = condconv2d if kind == "convolution" else cond_linear
    assert_close(layer(x), function(x, own, layer.weight, layer.bias), "own router")
    given = torch.rand(2, 3)
    assert_close(layer(x, given), function(x, given, layer.weight, layer.bias), "given weights")
    assert not torch.allclose(layer(x), layer(x, given))


def test_the_blocks_routing_weights_go_before_the_layers_router_and_after_the_argument() -> None:
    layer = CondConv2d(4, 6, 1, num_experts=3)
    x, shared, given = torch.randn(2, 4, 3, 3), torch.rand(2, 3), torch.rand(2, 3)
    by_argument, by_block = layer(x, given), layer(x, shared)
    layer.routing = shared
    assert torch.equal(layer(x), by_block)
    assert torch.equal(layer(x, given), by_argument)
    layer.routing = None
    assert not torch.equal(layer(x), by_block)


def test_a_router_may_be_a_name_a_module_or_none() -> None:
    assert type(CondConv2d(4, 6, 3, router="softmax").router).__name__ == "SoftmaxRouter"
    router = build_router("hidden_small", 4, 8)
    assert CondConv2d(4, 6, 3, router=router).router is router
    assert CondConv2d(4, 6, 3, router=None).router is None

    class Half(Router):
        """A routing function of the user's own."""

        def logits(self, pooled_NC: Tensor) -> Tensor:
            return pooled_NC[:, : self.num_experts]

    layer = CondConv2d(4, 6, 3, num_experts=2, router=Half(4, 2))
    x = torch.randn(3, 4, 5, 5)
    assert_close(layer(x), layer(x, torch.sigmoid(x.mean((2, 3))[:, :2])), "y")


def test_every_parameter_gets_a_gradient() -> None:
    network = nn.Sequential(
        CondConv2d(3, 6, 3, padding=1, num_experts=3),
        nn.ReLU(),
        CondConv2d(6, 6, 3, groups=6, num_experts=3, router="softmax"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        CondLinear(6, 4, num_experts=3, router="hidden_large"),
    )
    network(torch.randn(5, 3, 8, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_backend_and_workspace_of_a_layer_are_used() -> None:
    x, routing = torch.randn(5, 4, 6, 6), torch.rand(5, 3)
    layer = CondConv2d(4, 6, 3, num_experts=3, router=None, backend="depthwise")
    with pytest.raises(ValueError, match="backend 'depthwise' cannot run this layer"):
        layer(x, routing)
    layer.backend = "reference"
    expected = layer(x, routing)
    layer.backend, layer.workspace_bytes = "gemm", 100
    assert_close(layer(x, routing), expected, "y")
    layer.workspace_bytes = -1
    with pytest.raises(ValueError, match="workspace_bytes"):
        layer(x, routing)


def test_representation() -> None:
    assert CondConv2d(4, 6, 3, router=None).extra_repr() == (
        "4, 6, kernel_size=(3, 3), stride=(1, 1), num_experts=8, backend='auto'"
    )
    options: dict[str, Any] = {"stride": 2, "padding": (1, 2), "dilation": 3, "groups": 2, "bias": False}
    text = CondConv2d(4, 6, 3, **options, padding_mode="reflect", num_experts=2, backend="gemm").extra_repr()
    for part in (
        "stride=(2, 2)",
        "padding=(1, 2)",
        "dilation=(3, 3)",
        "groups=2",
        "bias=False",
        "padding_mode='reflect'",
        "num_experts=2",
        "backend='gemm'",
    ):
        assert part in text
    assert "padding='same_tf'" in CondConv2d(4, 6, 3, padding="same_tf").extra_repr()
    assert CondLinear(4, 6, bias=False, num_experts=3).extra_repr() == (
        "in_features=4, out_features=6, bias=False, num_experts=3, backend='auto'"
    )
    assert "FCRouter" in repr(CondLinear(4, 6))
