"""The functions as users call them: padding by every name, strides and pairs, linear layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, assert_all_close, case_for, cotangent, leaves, oracle
from torch import Tensor
from torch.nn import functional as F

from condconv import cond_linear, condconv2d, list_backends
from condconv.functional import Padding


def least_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's "SAME" by its definition: the fewest zeros for ceil(size / stride) outputs, more of them behind."""
    extent = dilation * (kernel - 1) + 1
    outputs = (size + stride - 1) // stride
    total = next(p for p in itertools.count() if size + p >= extent and (size + p - extent) // stride + 1 >= outputs)
    return total // 2, total - total // 2


@pytest.mark.parametrize("size", [(7, 7), (8, 6), (5, 4), (1, 2), (14, 13)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (5, 7)], ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), ((3, 2), 1), (2, 2), (1, 3)], ids=str)
def test_same_tf(size: tuple[int, int], kernel: tuple[int, int], stride: int | tuple[int, int], dilation: int) -> None:
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    case = Case(batch=2, channels=2, out_channels=3, size=size, kernel=kernel, stride=strides)
    case = case._replace(dilation=(dilation, dilation))
    x, routing, weight, bias = arguments = leaves(case.tensors())
    y = condconv2d(x, routing, weight, bias, stride, "same_tf", dilation)
    assert tuple(y.shape[2:]) == tuple(-(-n // s) for n, s in zip(size, strides, strict=True))
    rows, columns = (least_padding(size[i], kernel[i], strides[i], dilation) for i in (0, 1))
    actual = [y.detach(), *torch.autograd.grad(y, arguments, cotangent(y))]
    assert_all_close(actual, oracle(case.tensors(), case.spec, (*columns, *rows)), torch.float64)


def test_same_tf_on_the_example_of_tensorflows_documentation() -> None:
    """Width 13, kernel 6, stride 5: one zero before, two behind; windows 0 1 2 3 4 5, 5 6 7 8 9 10, 10 11 12 13 0 0."""
    x = torch.arange(1.0, 14.0).view(1, 1, 1, 13)
    ones = torch.ones(1, 1, 1, 1, 6)
    y = condconv2d(x, torch.ones(1, 1), ones, stride=(1, 5), padding="same_tf")
    assert y.flatten().tolist() == [15.0, 45.0, 46.0]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["auto", "reference", *CPU_BACKENDS])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1), (4, 1)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_same_is_torchs(kernel: tuple[int, int], backend: str, channels_last: bool) -> None:
    """Even kernels too, whose odd zero torch puts behind."""
    case = case_for(backend, kernel=kernel, dilation=(2, 1))
    x, routing, weight, bias = case.tensors(channels_last=channels_last)
    y = condconv2d(x, routing, weight, bias, 1, "same", (2, 1), case.groups, backend)
    kernels = torch.einsum("ne,ekcrs->nkcrs", routing, weight)
    pairs = zip(x, kernels, routing @ bias, strict=True)
    expected = [F.conv2d(x_n[None], w_n, b_n, 1, "same", (2, 1), case.groups) for x_n, w_n, b_n in pairs]
    assert_close(y, torch.cat(expected), "y")
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


PADDINGS: list[tuple[Padding, tuple[int, int]]] = [(0, (0, 0)), (2, (2, 2)), ((1, 2), (1, 2)), ("valid", (0, 0))]


@pytest.mark.parametrize(("padding", "amount"), PADDINGS, ids=str)
def test_symmetric_paddings(padding: Padding, amount: tuple[int, int]) -> None:
    case = Case(stride=(2, 1), padding=amount)
    x, routing, weight, bias = case.tensors()
    y = condconv2d(x, routing, weight, bias, (2, 1), padding)
    assert_close(y, oracle(case.tensors(), case.spec)[0], "y")


def test_integers_stand_for_pairs_and_lists_for_tuples() -> None:
    tensors = Case().tensors()
    expected = condconv2d(*tensors, stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    assert torch.equal(condconv2d(*tensors, stride=2, padding=1, dilation=2), expected)
    assert torch.equal(condconv2d(*tensors, stride=[2, 2], padding=[1, 1], dilation=[2, 2]), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [name for name in list_backends() if not name.startswith("triton")])
def test_without_bias(backend: str) -> None:
    case = case_for(backend)
    x, routing, weight, bias = case.tensors()
    y = condconv2d(x, routing, weight, None, groups=case.groups, backend=backend)
    expected = oracle([x, routing, weight, torch.zeros_like(bias)], case.spec)[0]
    assert_close(y, expected, "y")


@pytest.mark.parametrize("routing", ["negative", "one-hot", "large", "zero"])
def test_any_real_routing_weights(routing: str) -> None:
    case = Case()
    x, routing_NE, weight, bias = case.tensors()
    values = {
        "negative": -routing_NE,
        "one-hot": torch.eye(3, dtype=torch.float64),
        "large": 1e6 * routing_NE,
        "zero": torch.zeros_like(routing_NE),
    }[routing]
    y = condconv2d(x, values, weight, bias)
    if routing == "one-hot":
        for n in range(3):
            assert_close(y[n : n + 1], F.conv2d(x[n : n + 1], weight[n], bias[n]), f"expert {n}")
    elif routing == "zero":
        assert not y.any()
    else:
        assert_close(y, oracle([x, values, weight, bias], case.spec)[0], "y")


def linear_by_einsum(x: Tensor, routing: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("ne,ekc,n...c->n...k", routing, weight, x)
    if bias is None:
        return y
    return y + (routing @ bias).view(x.shape[0], *[1] * (x.dim() - 2), -1)


@pytest.mark.parametrize("backend", ["auto", "reference", "mixture", "gemm", "grouped"])
@pytest.mark.parametrize("inner", [(), (1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(backend: str, inner: tuple[int, ...], with_bias: bool) -> None:
    x = torch.randn(3, *inner, 5, dtype=torch.float64, requires_grad=True)
    routing = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 7, dtype=torch.float64, requires_grad=True) if with_bias else None
    y, expected = cond_linear(x, routing, weight, bias, backend), linear_by_einsum(x, routing, weight, bias)
    assert_close(y, expected, "y")
    grad_y = torch.randn_like(expected)
    arguments = [t for t in (x, routing, weight, bias) if t is not None]
    gradients = zip(
        torch.autograd.grad(y, arguments, grad_y), torch.autograd.grad(expected, arguments, grad_y), strict=True
    )
    for i, (a, e) in enumerate(gradients):
        assert_close(a, e, f"gradient {i}")


def test_one_feature_is_enough() -> None:
    """One input and one output channel look like a depthwise layer to `auto`."""
    x, routing, weight = torch.randn(3, 1), torch.rand(3, 2), torch.randn(2, 1, 1)
    expected = linear_by_einsum(x, routing, weight, None)
    for backend in ("auto", "mixture", "gemm", "depthwise", "grouped", "reference"):
        assert_close(cond_linear(x, routing, weight, backend=backend), expected, backend, torch.float32)


def test_the_convolution_is_numpys_in_one_dimension() -> None:
    """`np.correlate` knows nothing of torch."""
    x, kernel = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, -1, 0.5])
    weight = torch.from_numpy(np.stack([kernel, 2 * kernel])).view(2, 1, 1, 1, 3)
    routing = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    y = condconv2d(torch.from_numpy(x).view(1, 1, 1, 6), routing, weight)
    np.testing.assert_allclose(y.flatten().numpy(), np.correlate(x, kernel, mode="valid"), rtol=1e-12)
