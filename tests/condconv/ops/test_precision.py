"""float32, bfloat16, float16 and autocast against the float64 oracle of the same rounded tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, assert_all_close, case_for, cotangent, leaves, oracle, run

from condconv import CondConv2d, CondLinear, condconv2d

CASES = [
    Case(padding=(1, 1)),
    Case(kernel=(1, 1), channels=17, out_channels=9, experts=8),
    Case(kernel=(1, 1), size=(1, 1), channels=9, out_channels=17),
    Case(kernel=(5, 5), padding=(2, 2), size=(2, 2)),
    Case(channels=6, out_channels=4, groups=2, stride=(2, 2), padding=(1, 1)),
    Case(channels=5, out_channels=5, groups=5, padding=(1, 1), batch=5),
    Case(channels=5, out_channels=5, groups=5, padding=(1, 1), stride=(2, 2), size=(18, 19)),
    Case(batch=0),
]
LOW = [torch.bfloat16, torch.float16]


def pairs(cases: list[Case], backends: list[str]) -> list[object]:
    """Backends and the cases that they take."""
    return [
        pytest.param(backend, case, id=f"{backend} {case}")
        for case in cases
        for backend in backends
        if backend in ("auto", "reference") or case.supported_by(backend, torch.float32)
    ]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(("backend", "case"), pairs(CASES, [*CPU_BACKENDS, "auto", "reference"]))
def test_matches_oracle_up_to_rounding(backend: str, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    tensors = case.tensors(dtype, channels_last)
    actual = run(tensors, case.spec, backend)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, dtype, dtype]
    assert_all_close(actual, oracle(tensors, case.spec), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("backend", "case"), pairs(CASES, [*CPU_BACKENDS, "auto", "reference"]))
def test_autocast_keeps_master_copies(backend: str, case: Case, dtype: torch.dtype) -> None:
    """The input is rounded, kernels are mixed from the float32 experts, and gradients are float32 again."""
    tensors = case.tensors(torch.float32)
    x, routing, weight, bias = arguments = leaves(tensors)
    with torch.autocast("cpu", dtype=dtype):
        y = condconv2d(x, routing, weight, bias, *case.spec, backend=backend)
    assert y.dtype == dtype
    actual = [y.detach(), *torch.autograd.grad(y, arguments, cotangent(y))]
    assert all(t.dtype == torch.float32 for t in actual[1:])
    expected = oracle([tensors[0].to(dtype), *tensors[1:]], case.spec)
    assert_all_close(actual, expected, dtype)


@pytest.mark.parametrize("backend", ["reference", *(name for name in CPU_BACKENDS if name != "mixture")])
def test_kernels_are_mixed_in_float32_under_autocast(backend: str) -> None:
    """Two experts that nearly cancel: mixed in bfloat16 nothing of the kernel would be left."""
    case = case_for(backend, experts=2)
    x, routing, weight, bias = case.tensors(torch.float32)
    routing, offset = torch.full_like(routing, 0.5), 200.0
    for tensor in (weight, bias):
        tensor[0] += offset
        tensor[1] -= offset
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = condconv2d(x, routing, weight, bias, groups=case.groups, backend=backend)
    expected = oracle([x.bfloat16(), routing, weight, bias], case.spec)[0]
    assert_close(y, expected, "y", torch.bfloat16)
    for early in ([weight.bfloat16(), bias], [weight, bias.bfloat16()]):
        rounded = oracle([x.bfloat16(), routing, *early], case.spec)[0]
        assert (rounded - expected).abs().max() > 5 * (y - expected).abs().max(), "the case does not tell them apart"


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto", "reference"])
def test_float64_routing_of_float32_tensors(backend: str) -> None:
    case = case_for(backend)
    x, routing, weight, bias = case.tensors(torch.float32)
    tensors = [x, routing.double() + 1e-9, weight, bias]
    actual = run(tensors, case.spec, backend)
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32]
    assert_all_close(actual, oracle(tensors, case.spec), torch.float32)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
def test_half_precision_routing_is_taken(backend: str) -> None:
    """A router of the user's own may well give bfloat16."""
    case = case_for(backend)
    x, routing, weight, bias = case.tensors(torch.bfloat16)
    tensors = [x, routing.bfloat16(), weight, bias]
    actual = run(tensors, case.spec, backend)
    assert actual[2].dtype == torch.bfloat16
    assert_all_close(actual, oracle(tensors, case.spec), torch.bfloat16)


def test_float64_is_left_alone_by_autocast() -> None:
    case = Case()
    tensors = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(tensors, case.spec, "auto")
    assert_all_close(actual, oracle(tensors, case.spec), torch.float64)


def float64_twin(layer: CondConv2d | CondLinear) -> CondConv2d | CondLinear:
    """The same layer by the oracle, in float64."""
    twin = copy.deepcopy(layer).double()
    twin.backend = "reference"
    return twin


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mode", ["autocast", "converted"])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_layers_with_their_routers_in_low_precision(kind: str, mode: str, dtype: torch.dtype) -> None:
    layer = CondConv2d(5, 7, 3, num_experts=3) if kind == "convolution" else CondLinear(5, 7, num_experts=3)
    x = torch.randn(3, 5, 6, 5) if kind == "convolution" else torch.randn(3, 5)
    if mode == "converted":
        layer = layer.to(dtype)
        y = layer(x.to(dtype))
    else:
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    twin = float64_twin(layer)
    x64 = x.to(dtype).double() if mode == "converted" else x.double()
    expected = twin(x64)
    expected.sum().backward()
    assert_close(y, expected, "y", dtype)
    for (name, parameter), reference in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert reference.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert_close(parameter.grad, reference.grad, name, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_half_precision_never_accumulates_the_input_gradient(dtype: torch.dtype) -> None:
    """A workspace of any size gives the same rounding: tiles of output channels would add up half-precision sums."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, 3, 3, generator=generator), torch.randn(3, 1024, 8, 1, 1, generator=generator)
    routing, grad_y = torch.rand(2, 3, generator=generator), torch.randn(2, 1024, 3, 3, generator=generator).to(dtype)
    grads = []
    for workspace_bytes in (1000, 1 << 30):
        leaf = x.to(dtype).requires_grad_()
        y = condconv2d(leaf, routing, weight.to(dtype), backend="gemm", workspace_bytes=workspace_bytes)
        grads.append(torch.autograd.grad(y, leaf, grad_y)[0].double())
    exact = x.double().requires_grad_()
    y = condconv2d(exact, routing.double(), weight.to(dtype).double(), backend="reference")
    expected = torch.autograd.grad(y, exact, grad_y.double())[0]
    small, large = ((grad - expected).square().mean().sqrt() for grad in grads)
    assert small <= 1.2 * large
