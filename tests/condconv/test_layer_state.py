"""Layers as modules: state_dict, copies, dtypes, devices, memory formats, and the machinery of torch around them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from numerics import assert_close
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from condconv import CondConv2d, CondLinear


def layers() -> nn.Module:
    return nn.Sequential(
        CondConv2d(3, 6, 3, padding=1, num_experts=3, router="softmax"),
        nn.BatchNorm2d(6),
        CondConv2d(6, 6, 3, groups=6, num_experts=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        CondLinear(6, 4, num_experts=2),
    )


IMAGES = (5, 3, 7, 7)


def test_state_dict_and_back() -> None:
    network, other = layers(), layers()
    x = torch.randn(IMAGES)
    network(x)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) >= {"0.weight", "0.bias", "0.router.fc.weight", "0.router.temperature", "5.weight"}
    other.load_state_dict(state)
    assert torch.equal(network.eval()(x), other.eval()(x))


def test_state_of_another_number_of_experts_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        CondLinear(4, 6, num_experts=3).load_state_dict(CondLinear(4, 6, num_experts=4).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(how: str) -> None:
    network = layers().eval()
    x = torch.randn(IMAGES)
    expected = network(x)
    twin = copy.deepcopy(network) if how == "deepcopy" else pickle.loads(pickle.dumps(network))
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[5].router.fc.bias.fill_(9.0)
    assert torch.equal(network(x), expected)
    assert not torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_the_dtype(dtype: torch.dtype) -> None:
    network = layers().eval()
    x = torch.randn(IMAGES)
    expected = network(x)
    converted = copy.deepcopy(network).to(dtype)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    y = converted(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y, expected, "y", torch.float32 if dtype == torch.float64 else dtype)


def test_half_and_float_again() -> None:
    layer = CondConv2d(4, 6, 3, num_experts=2).half()
    assert layer.weight.dtype == torch.float16
    assert layer.router is not None
    routing = layer.router(torch.randn(2, 4, 5, 5).half())
    assert routing.dtype == torch.float32
    assert layer(torch.randn(2, 4, 5, 5).half()).dtype == torch.float16
    assert layer.float()(torch.randn(2, 4, 5, 5)).dtype == torch.float32


def test_channels_last_networks() -> None:
    """`network.to(memory_format=...)` works and leaves the experts' layout alone; maps keep their format."""
    network = layers().eval()
    x = torch.randn(IMAGES)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous()  # type: ignore[operator, union-attr]
    assert network[0].weight.shape == (3, 6, 3, 3, 3)
    features = network[:3](x.contiguous(memory_format=torch.channels_last))  # type: ignore[index]
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert_close(network(x.contiguous(memory_format=torch.channels_last)), expected, "y")
    both = layers().to(torch.float64, memory_format=torch.channels_last)
    assert {p.dtype for p in both.parameters()} == {torch.float64}


def test_meta_device() -> None:
    for layer in (CondConv2d(4, 6, 3, device="meta"), CondLinear(4, 6, device="meta", router="softmax")):
        assert all(t.device.type == "meta" for t in (*layer.parameters(), *layer.buffers()))
    with torch.device("meta"):
        network = layers()
        assert network(torch.empty(IMAGES)).shape == (5, 4)
    network.to_empty(device="cpu")
    network.load_state_dict(layers().state_dict())
    assert network(torch.randn(IMAGES)).isfinite().all()


def test_dtype_at_construction() -> None:
    layer = CondConv2d(4, 6, 3, num_experts=2, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(2, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_gradient_checkpointing_changes_nothing() -> None:
    layer = CondConv2d(4, 6, 3, num_experts=3)
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    parameters = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    y = checkpoint(layer, x, use_reentrant=False)
    actual = torch.autograd.grad(y.square().sum(), parameters)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_frozen_experts_and_frozen_routers() -> None:
    for frozen in ("weight", "router"):
        layer = CondConv2d(4, 6, 3, num_experts=3)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        layer(torch.randn(3, 4, 6, 6)).sum().backward()
        assert {n for n, p in layer.named_parameters() if p.grad is None} == {
            n for n, _ in layer.named_parameters() if n.startswith(frozen)
        }


def test_parametrized_experts() -> None:
    """Weight normalisation, pruning and the like replace `weight` by a computed tensor."""

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = CondConv2d(4, 6, 3, bias=False, num_experts=3)
    x = torch.randn(3, 4, 6, 6)
    expected = 2 * layer(x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert_close(layer(x), expected, "y")


def test_a_small_network_learns_its_batch() -> None:
    network = nn.Sequential(
        CondConv2d(3, 8, 3, num_experts=3), nn.ReLU(), nn.Flatten(), CondLinear(8 * 5 * 5, 4, num_experts=3)
    )
    x, target = torch.randn(16, 3, 7, 7), torch.randint(0, 4, (16,))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
