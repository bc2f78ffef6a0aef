"""Examples do not see each other, and a batch of any size, none included, is a batch."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, assert_all_close, case_for, oracle, run

from condconv import cond_linear, condconv2d
from condconv.ops.operator import conv2d, conv2d_backward

LAYERS = {
    "dense": Case(batch=6, padding=(1, 1)),
    "pointwise": Case(batch=6, kernel=(1, 1), size=(3, 3), experts=8),
    "depthwise": Case(batch=6, channels=5, out_channels=5, groups=5, padding=(1, 1)),
    "grouped": Case(batch=6, channels=6, out_channels=4, groups=2, stride=(2, 2)),
}
PAIRS = [
    pytest.param(backend, case, id=f"{backend} {kind}")
    for kind, case in LAYERS.items()
    for backend in (*CPU_BACKENDS, "auto")
    if backend == "auto" or case.supported_by(backend)
]


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_an_example_does_not_depend_on_the_others(backend: str, case: Case) -> None:
    """NaN, infinity and huge numbers in the other examples, and in their routing weights, leave no trace."""
    x, routing, weight, bias = case.tensors()
    mine = slice(2, 3)
    expected = oracle([x[mine], routing[mine], weight, bias], case.spec)
    x_bad, routing_bad = x.clone(), routing.clone()
    for n, value in ((0, float("nan")), (1, float("inf")), (3, 1e300), (5, -float("inf"))):
        x_bad[n] = value
    routing_bad[4] = float("nan")
    y = condconv2d(x_bad, routing_bad, weight, bias, *case.spec, backend=backend)
    assert_close(y[mine], expected[0], "y")
    assert not y[0].isfinite().all(), "the case is pointless: the bad example does not even reach its own output"
    # Gradients of x and of the routing weights belong to examples too.
    x_bad.requires_grad_()
    routing_bad.requires_grad_()
    y = condconv2d(x_bad, routing_bad, weight, bias, *case.spec, backend=backend)
    grad_y = torch.ones_like(y)
    grads = torch.autograd.grad(y, (x_bad, routing_bad), grad_y)
    alone = [t[mine].detach().requires_grad_() for t in (x, routing)]
    y_alone = condconv2d(*alone, weight, bias, *case.spec, backend="reference")
    for name, a, e in zip(("x", "routing"), grads, torch.autograd.grad(y_alone.sum(), alone), strict=True):
        assert_close(a[mine], e, f"gradient of {name}")


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_permuting_the_batch_permutes_the_output(backend: str, case: Case) -> None:
    x, routing, weight, bias = case.tensors(torch.float32)
    order = torch.randperm(case.batch)
    y = condconv2d(x, routing, weight, bias, *case.spec, backend=backend)
    permuted = condconv2d(x[order], routing[order], weight, bias, *case.spec, backend=backend)
    assert_close(permuted, y[order], "y", torch.float32)


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_batches_of_one_concatenated_are_the_batch(backend: str, case: Case) -> None:
    tensors = case.tensors()
    whole = run(tensors, case.spec, backend)
    x, routing, weight, bias = tensors
    parts = [
        condconv2d(x[n : n + 1], routing[n : n + 1], weight, bias, *case.spec, backend=backend)
        for n in range(case.batch)
    ]
    assert_close(torch.cat(parts), whole[0], "y")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto", "reference"])
def test_no_examples(backend: str, channels_last: bool) -> None:
    case = case_for(backend, batch=0)
    tensors = case.tensors(channels_last=channels_last)
    results = run(tensors, case.spec, backend)
    assert results[0].shape == (0, case.out_channels, *case.spec.output_size(case.size, case.kernel))
    for gradient, tensor in zip(results[1:], tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()
    assert_all_close(results, oracle(tensors, case.spec), torch.float64)


def test_no_examples_in_a_linear_layer() -> None:
    weight = torch.randn(3, 7, 5, requires_grad=True)
    for shape in ((0, 5), (0, 4, 5), (0, 2, 3, 5)):
        x = torch.randn(shape)
        y = cond_linear(x, torch.rand(shape[0], 3), weight)
        assert y.shape == (*shape[:-1], 7)
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert not grad.any()


def test_the_operators_themselves_take_no_examples() -> None:
    """Below the validation too, and with a name that could not run: there is nothing to run."""
    x, routing, weight, _ = Case(batch=0).tensors()
    y = conv2d(x, routing, weight, [1, 1], [0, 0], [1, 1], 1, "auto", True, 0)
    grads = conv2d_backward(y, x, routing, weight, [1, 1], [0, 0], [1, 1], 1, "auto", [True, False, True], 0)
    assert [tuple(g.shape) for g in grads] == [(0, 5, 7, 7), (0,), (3, 7, 5, 3, 3)]
    assert not grads[2].any()
