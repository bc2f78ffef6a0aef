"""Counting by hand; counting leaves the network alone. The paper's table is in tests/models/test_placements.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import SmallNet
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from condconv.complexity import _SHAPES_STAY, complexity, readable
from condconv.convert import convert
from condconv.layers import CondConv2d, CondLinear

EXPERTS = 4


def test_layers_counted_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        CondConv2d(8, 8, 3, padding=1, groups=8, bias=False, num_experts=EXPERTS),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        CondLinear(8, 10, num_experts=EXPERTS),
    )
    result = complexity(net, (3, 9, 7))
    stem, depthwise, depthwise_router, linear, linear_router = result.layers
    positions = 5 * 4
    assert (stem.params, stem.madds) == (3 * 8 * 9 + 8, 3 * 8 * 9 * positions)
    assert (depthwise.kind, depthwise.static_madds, depthwise.static_params) == ("depthwise", 8 * 9 * positions, 8 * 9)
    assert (depthwise.params, depthwise.madds) == (EXPERTS * 72, 72 * positions + EXPERTS * 72)
    assert depthwise.output_shape == (8, 5, 4)
    assert (linear.static_madds, linear.madds) == (80, 80 + EXPERTS * 90)
    for router in (depthwise_router, linear_router):
        assert (router.kind, router.params, router.madds, router.static_madds) == (
            "router",
            8 * EXPERTS + EXPERTS,
            8 * EXPERTS,
            0,
        )
    assert result.params == sum(p.numel() for p in net.parameters())
    assert result.static_params == 3 * 8 * 9 + 8 + 16 + 72 + 90
    assert result.madds == sum(layer.madds for layer in result.layers)
    assert result.static_madds == stem.madds + 72 * positions + 80


def test_converting_adds_what_the_paper_says_and_nothing_else() -> None:
    static = complexity(SmallNet(), 16)
    net = SmallNet()
    report = convert(net, EXPERTS, blocks="blocks.1.*", exclude="se", classifier="classifier")
    result = complexity(net, 16)
    assert (result.static_params, result.static_madds) == (static.params, static.madds)
    replaced = sum(layer.params for layer in static.layers if layer.name in report.layers)
    routers = sum(unit.in_channels for unit in report.units) * EXPERTS
    assert result.madds - static.madds == EXPERTS * replaced + routers
    assert result.params - static.params == (EXPERTS - 1) * replaced + routers + EXPERTS * len(report.routers)


def test_other_dimensions_tokens_and_transposed_convolutions() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3)
            self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)
            self.linear = nn.Linear(2, 5)
            self.unused = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.up(self.conv(x)).transpose(1, 2))

    layers = {layer.name: layer for layer in complexity(Tokens(), (3, 10)).layers}
    assert layers["conv"].madds == 3 * 4 * 3 * 8
    assert layers["up"].madds == 4 * 2 * 2 * 8
    assert layers["linear"].madds == 2 * 5 * 16
    assert layers["unused"].madds == 0 and layers["unused"].output_shape is None
    assert "not reached" in str(complexity(Tokens(), (3, 10)))


def test_a_layer_used_twice_costs_twice_and_has_its_parameters_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    result = complexity(Twice(), (4,))
    assert (result.params, result.madds) == (16, 32)


def test_experts_that_a_parametrization_computes() -> None:
    net = nn.Sequential(CondConv2d(3, 4, 3, num_experts=EXPERTS, bias=False))
    before = complexity(net, (3, 8, 8))
    register_parametrization(net[0], "weight", nn.Identity())
    assert complexity(net, (3, 8, 8)) == before


def test_positions_in_the_batch_count_too() -> None:
    """Windows, tokens and crops that a network folds into the batch, as Swin does."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.static, self.cond = nn.Linear(8, 8), CondLinear(8, 8, bias=False, num_experts=EXPERTS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
            return self.cond(self.static(tokens))

    static, cond, router = complexity(Folded(), (8, 4, 4)).layers
    assert static.madds == cond.static_madds == 16 * 64
    assert (cond.madds, router.madds) == (16 * (64 + EXPERTS * 64), 16 * 8 * EXPERTS), "each is an example of its own"


def test_what_a_network_keeps_of_a_run_is_its_own() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grid = nn.Conv2d(3, 4, 1), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.grid is None:
                self.grid = torch.ones(x.shape[2:], device=x.device)
            return self.conv(x) * self.grid

    net = Cached()
    assert complexity(net, 8).madds == 12 * 64 and net.grid is None
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 4, 8, 8)


def test_the_network_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    complexity(net, 8)
    assert [m.training for m in net] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("func", sorted(_SHAPES_STAY, key=repr))
def test_what_is_passed_over_keeps_shape_and_dtype(func: Callable[..., torch.Tensor]) -> None:
    x = torch.rand(2, 3, 5)
    statistics = (torch.zeros(3), torch.ones(3)) if func is F.batch_norm else ()
    result = func(x, *statistics)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)


def test_normalisation_of_other_channels_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5), nn.ReLU())
    with pytest.raises(ValueError, match="cannot run"):
        complexity(net, 8)


def test_without_data_as_with_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module) -> nn.Module:
        raise RuntimeError("with data, please")

    net = SmallNet()
    convert(net, EXPERTS, blocks="blocks.1.*", classifier="classifier")
    without = complexity(net, (3, 17, 11))
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules[complexity.__module__], "_without_data", refuse)
    assert complexity(net, (3, 17, 11)) == without


def test_a_network_that_needs_true_data_is_run_on_its_device() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y if float(y.sum()) < 1e9 else self.conv(x)

    assert complexity(Branching(), 5).madds == 12 * 25


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype(dtype: torch.dtype) -> None:
    net = SmallNet()
    convert(net, 2, blocks="blocks.1.*", exclude="se")
    assert complexity(net.to(dtype), 16).madds == complexity(net.float(), 16).madds


def test_the_table_reads() -> None:
    net = SmallNet()
    convert(net, EXPERTS, blocks="blocks.1.*", exclude="se")
    result = complexity(net, 32)
    text = str(result)
    row = next(line for line in text.splitlines() if line.startswith("blocks.1.0.conv_dw"))
    assert row.split()[1:4] == ["depthwise", str(EXPERTS), "14x8x8"]
    assert text.splitlines()[-2].startswith("total") and "input 3x32x32" in text.splitlines()[-1]
    assert "CondConv adds" in result.summary() and "CondConv" not in complexity(SmallNet(), 32).summary()
    assert max(map(len, text.splitlines())) < 140


def test_readable_numbers() -> None:
    numbers = (999, 31_400, 5_288_548, 385_800_000, 4_089_200_000)
    assert [readable(n) for n in numbers] == ["999", "31.40k", "5.29M", "385.8M", "4.09G"]


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, 8.0, 8), "224"])
def test_bad_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="input_size must be a shape of positive ints"):
        complexity(SmallNet(), size)


def test_an_input_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="cannot run on an input of shape 1x4x16x16"):
        complexity(SmallNet(), (4, 16, 16))
