"""Dropout of single routing weights and of whole experts: zeroed, scaled, off in evaluation, gradients all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_close

import condconv
from condconv import ROUTINGS, build_router


def test_dropout_zeroes_single_weights_and_scales_the_others() -> None:
    router = build_router("fc", 4, 50, dropout=0.25)
    x = torch.randn(40, 4)
    expected = copy.deepcopy(router).eval()(x)
    routing = router.train()(x)
    dropped = routing == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert_close(routing[~dropped], expected[~dropped] / 0.75, "kept weights")
    assert dropped.any(0).float().mean() > 0
    assert not dropped.all(0).any(), "whole experts are gone"
    assert not torch.equal(router(x) == 0, dropped), "the same weights are dropped every time"


def test_expert_dropout_zeroes_experts_for_the_whole_batch() -> None:
    router = build_router("fc", 4, 200, expert_dropout=0.25)
    x = torch.randn(10, 4)
    expected = copy.deepcopy(router).eval()(x)
    routing = router.train()(x)
    dropped = (routing == 0).all(0)
    assert torch.equal((routing == 0).any(0), dropped)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.12)
    assert_close(routing[:, ~dropped], expected[:, ~dropped] / 0.75, "kept experts")


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("option", ["dropout", "expert_dropout"])
def test_dropout_is_off_in_evaluation_and_keeps_the_mean_in_training(name: str, option: str) -> None:
    router = build_router(name, 4, 6, **{option: 0.5})
    x = torch.randn(3, 4)
    expected = router.eval()(x)
    assert torch.equal(router(x), expected)
    mean = torch.stack([router.train()(x) for _ in range(400)]).mean(0)
    assert (mean / expected - 1).abs().max() < 0.3  # a standard error is 0.05; without scaling this would be 0.5


def test_dropped_experts_still_get_a_gradient() -> None:
    """Zeroed, not skipped: the gradient exists and is zero, so that DDP need not look for unused parameters."""
    layer = condconv.CondConv2d(4, 6, 3, num_experts=8, router=build_router("fc", 4, 8, expert_dropout=0.5))
    layer(torch.randn(3, 4, 5, 5)).sum().backward()
    assert layer.router is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
    assert layer.weight.grad is not None
    dead = [e for e in range(8) if not layer.weight.grad[e].any()]
    assert 0 < len(dead) < 8
