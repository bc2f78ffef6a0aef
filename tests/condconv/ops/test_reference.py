"""The oracle itself: against loops written out in numpy, the paper's equation and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numerics import assert_close
from numpy.typing import NDArray
from oracle import Case
from torch import Tensor
from torch.nn import functional as F

from condconv.ops import mixture, reference
from condconv.ops.spec import ConvSpec

CASES = [
    Case(),
    Case(stride=(2, 1), padding=(1, 2), kernel=(3, 2)),
    Case(dilation=(2, 3), padding=(2, 1), kernel=(2, 3), size=(6, 9)),
    Case(channels=6, out_channels=4, groups=2, padding=(1, 1)),
    Case(channels=3, out_channels=6, groups=3, stride=(2, 2)),
    Case(batch=1, experts=1, kernel=(1, 1), size=(1, 1)),
]


def written_out(tensors: list[Tensor], case: Case) -> NDArray[np.float64]:
    """`y_nkpq = sum_e a_ne (b_ek + sum_crs W_ekcrs x_n,c,p*stride+r*dilation-padding,...)`, term by term."""
    x, routing, weight, bias = (t.numpy() for t in tensors)
    batch, _, height, width = x.shape
    experts, out_channels, group_channels, rows, columns = weight.shape
    y = np.zeros((batch, out_channels, *case.spec.output_size((height, width), (rows, columns))))
    for n, k, p, q in np.ndindex(*y.shape):
        group = k // (out_channels // case.groups)
        for e in range(experts):
            total = bias[e, k]
            for c, r, s in itertools.product(range(group_channels), range(rows), range(columns)):
                h = p * case.stride[0] + r * case.dilation[0] - case.padding[0]
                w = q * case.stride[1] + s * case.dilation[1] - case.padding[1]
                if 0 <= h < height and 0 <= w < width:
                    total += weight[e, k, c, r, s] * x[n, group * group_channels + c, h, w]
            y[n, k, p, q] += routing[n, e] * total
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_sum_written_out(case: Case) -> None:
    small = case._replace(batch=min(case.batch, 2), size=(min(case.size[0], 6), min(case.size[1], 6)))
    tensors = small.tensors()
    assert_close(reference.condconv2d(*tensors, small.spec), torch.from_numpy(written_out(tensors, small)), "y")


def test_pointwise_is_one_einsum() -> None:
    x, routing, weight, bias = Case(kernel=(1, 1)).tensors()
    expected = torch.einsum("ne,ekc,nchw->nkhw", routing, weight[..., 0, 0], x) + (routing @ bias)[..., None, None]
    assert_close(reference.condconv2d(x, routing, weight, bias, ConvSpec()), expected, "y")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixing_kernels_is_mixing_outputs(case: Case) -> None:
    """The identity that CondConv rests on (paper section 3), by the static convolutions of torch."""
    x, routing, weight, bias = case.tensors()
    outputs_ENKPQ = torch.stack([F.conv2d(x, w, b, *case.spec) for w, b in zip(weight, bias, strict=True)])
    expected = torch.einsum("ne,enkpq->nkpq", routing, outputs_ENKPQ)
    assert_close(reference.condconv2d(x, routing, weight, bias, case.spec), expected, "y")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixture_and_reference_agree_as_operators(case: Case) -> None:
    """Two independent forms against each other, below the operator: forward and gradients."""
    x, routing, weight, _ = (t.requires_grad_() for t in case.tensors())
    expected = reference.condconv2d(x, routing, weight, None, case.spec)
    grad_y = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, routing, weight), grad_y)
    with torch.no_grad():
        assert_close(mixture.forward(x, routing, weight, case.spec, 0), expected, "y")
        actual = mixture.backward(grad_y, x, routing, weight, case.spec, (True, True, True), 0)
    for name, a, e in zip(("x", "routing", "weight"), actual, gradients, strict=True):
        assert a is not None
        assert_close(a, e, f"gradient of {name}")


def test_gradients_twice() -> None:
    case = Case(batch=2, channels=2, out_channels=2, size=(3, 3), kernel=(2, 2), experts=2)
    arguments = tuple(t.requires_grad_() for t in case.tensors())
    function = lambda *a: reference.condconv2d(*a, case.spec)  # noqa: E731 - named only to be differentiated twice
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_one_expert_with_routing_one_is_the_static_convolution() -> None:
    x, _, weight, bias = Case(experts=1).tensors()
    expected = F.conv2d(x, weight[0], bias[0])
    assert_close(reference.condconv2d(x, torch.ones(3, 1), weight, bias, ConvSpec()), expected, "y")


def test_kernels_are_mixed_in_float32_and_rounded_once() -> None:
    case = Case(kernel=(1, 1), size=(1, 1), channels=1, out_channels=1, experts=2)
    x, routing = torch.ones(3, 1, 1, 1, dtype=torch.bfloat16), torch.full((3, 2), 0.5)
    weight = torch.tensor([300.0, -299.0]).view(2, 1, 1, 1, 1)  # bfloat16 cannot tell 300 from 299
    y = reference.condconv2d(x, routing, weight, None, case.spec)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.flatten(), torch.full((3,), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_examples_still_give_every_argument_a_gradient(channels_last: bool) -> None:
    case = Case(batch=0, stride=(2, 2), padding=(1, 1))
    arguments = [t.requires_grad_() for t in case.tensors(channels_last=channels_last)]
    y = reference.condconv2d(*arguments, case.spec)
    assert y.shape == (0, 7, 4, 4)
    for argument, grad in zip(arguments, torch.autograd.grad(y.sum(), arguments), strict=True):
        assert grad.shape == argument.shape
        assert not grad.any()
