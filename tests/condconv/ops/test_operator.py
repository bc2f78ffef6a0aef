"""The custom operator: its registrations, gradients only where asked, second order, gradcheck."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, case_for, leaves
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from condconv import condconv2d, functional
from condconv.ops import operator, registry
from condconv.ops.workspace import workspace

TINY = {
    "dense": Case(batch=2, channels=2, out_channels=3, size=(3, 4), kernel=(2, 3), padding=(1, 1), experts=2),
    "pointwise": Case(batch=2, channels=3, out_channels=2, size=(2, 2), kernel=(1, 1), stride=(2, 1), experts=2),
    "depthwise": Case(batch=2, channels=2, out_channels=2, groups=2, size=(3, 3), padding=(1, 1), experts=2),
    "grouped": Case(batch=2, channels=4, out_channels=2, groups=2, size=(3, 3), kernel=(2, 2), experts=2),
}
PAIRS = [
    pytest.param(backend, case, id=f"{backend} {kind}")
    for kind, case in TINY.items()
    for backend in (*CPU_BACKENDS, "auto")
    if backend == "auto" or case.supported_by(backend)
]


def operator_arguments(case: Case, backend: str) -> tuple[Any, ...]:
    x, routing, weight, _ = (t.requires_grad_() for t in case.tensors())
    geometry = [list(case.stride), list(case.padding), list(case.dilation), case.groups]
    return x, routing, weight, *geometry, backend, True, 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_forward_operator_is_registered_properly(backend: str, case: Case, channels_last: bool) -> None:
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    arguments = list(operator_arguments(case, backend))
    if channels_last:
        arguments[0] = arguments[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(operator.conv2d, tuple(arguments))


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_backward_operator_is_registered_properly(backend: str, case: Case, needs: list[bool]) -> None:
    x, routing, weight, *geometry = (
        a.detach() if isinstance(a, Tensor) else a for a in operator_arguments(case, backend)[:7]
    )
    y = operator.conv2d(x, routing, weight, *geometry, backend, True, 0)
    arguments = (torch.randn_like(y), x, routing, weight, *geometry, backend, needs, 0)
    torch.library.opcheck(operator.conv2d_backward, arguments)


@pytest.mark.parametrize("kind", ["channels_last", "one pixel", "sliced", "channels of NHWC", "no examples"])
def test_fake_tensors_tell_the_true_strides(kind: str) -> None:
    x, routing, weight, _ = Case(kernel=(1, 1)).tensors()
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "one pixel":
        x = x[:, :, :1, :1].contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = x[:, :, ::2, 1::2]
    elif kind == "channels of NHWC":
        x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    else:
        x, routing = x[:0], routing[:0]
    arguments = (x.requires_grad_(), routing, weight, [1, 1], [0, 0], [1, 1], 1, "auto", True, 0)
    torch.library.opcheck(operator.conv2d, arguments, test_utils=("test_schema", "test_faketensor"))
    y = operator.conv2d(*arguments)
    backward = (torch.ones_like(y), x.detach(), routing, weight, [1, 1], [0, 0], [1, 1], 1, "auto", [True] * 3, 0)
    torch.library.opcheck(operator.conv2d_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("workspace_bytes", [0, 1])
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_gradcheck(backend: str, case: Case, workspace_bytes: int) -> None:
    def function(x: Tensor, routing: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return condconv2d(x, routing, weight, bias, *case.spec, backend=backend, workspace_bytes=workspace_bytes)

    assert torch.autograd.gradcheck(function, tuple(leaves(case.tensors())), fast_mode=True)


class Spy:
    """Stands in for a backend and writes down which gradients it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.needs: list[tuple[bool, bool, bool]] = []
        true = registry.BACKENDS[name]

        def backward(*arguments: Any) -> Any:
            self.needs.append(arguments[5])
            return true.backward(*arguments)

        monkeypatch.setitem(registry.BACKENDS, name, true._replace(backward=backward))


@pytest.mark.parametrize(("backend", "case"), [p for p in PAIRS if p.values[0] != "auto"])
def test_gradients_are_computed_only_where_asked(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, backend)
    full = leaves(case.tensors())
    condconv2d(*full, *case.spec, backend=backend).square().sum().backward()
    for needs in itertools.product([False, True], repeat=4):
        if not any(needs):
            continue
        spy.needs.clear()
        arguments = [t.detach().requires_grad_(need) for t, need in zip(full, needs, strict=True)]
        condconv2d(*arguments, *case.spec, backend=backend).square().sum().backward()
        # The operator knows no bias: a bias alone needs no operator at all.
        assert spy.needs == ([needs[:3]] if any(needs[:3]) else [])
        for argument, need, reference in zip(arguments, needs, full, strict=True):
            assert (argument.grad is not None) == need
            if argument.grad is not None and reference.grad is not None:
                assert_close(argument.grad, reference.grad, f"gradient, needs={needs}")


@pytest.mark.parametrize(("backend", "case"), [p for p in PAIRS if p.values[0] != "auto"])
def test_backends_give_none_for_a_gradient_nobody_needs(backend: str, case: Case) -> None:
    x, routing, weight, _ = case.tensors()
    chosen = registry.BACKENDS[backend]
    grad_y = torch.ones_like(chosen.forward(x, routing, weight, case.spec, 0))
    for needs in itertools.product([False, True], repeat=3):
        gradients = chosen.backward(grad_y, x, routing, weight, case.spec, needs, 0)
        assert [g is not None for g in gradients] == list(needs)


def test_no_graph_without_gradients() -> None:
    tensors = leaves(Case().tensors())
    with torch.no_grad():
        assert not condconv2d(*tensors).requires_grad
    assert not condconv2d(*(t.detach() for t in tensors)).requires_grad


def test_inference_mode_and_training_take_turns() -> None:
    """Buffers that are kept between calls must not belong to the mode they were made in."""
    case = Case(batch=4, channels=9, out_channels=9, size=(5, 5))
    for backend in ("gemm", "grouped", "mixture"):
        tensors = case.tensors(torch.float32)
        workspace.buffers.clear()
        with torch.inference_mode():
            expected = condconv2d(*tensors, backend=backend, workspace_bytes=5000)
        trained = leaves(tensors)
        y = condconv2d(*trained, backend=backend, workspace_bytes=5000)
        y.sum().backward()
        with torch.inference_mode():
            again = condconv2d(*tensors, backend=backend, workspace_bytes=5000)
        assert_close(y, expected, "training")
        assert torch.equal(again, expected)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
def test_second_order_is_a_clear_error(backend: str) -> None:
    case = case_for(backend, size=(3, 3))
    x, routing, weight, bias = leaves(case.tensors())
    y = condconv2d(x, routing, weight, bias, *case.spec, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first-order gradients only.*backend='reference'"):
        grad.square().sum().backward()


def test_second_order_by_the_reference() -> None:
    case = TINY["depthwise"]

    def function(*tensors: Tensor) -> Tensor:
        return condconv2d(*tensors, *case.spec, backend="reference")

    arguments = tuple(leaves(case.tensors()))
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_threads_do_not_share_their_workspace() -> None:
    """As in a server: same sizes, different values, at the same time."""
    case = Case(batch=4, channels=8, out_channels=16, size=(6, 6), padding=(1, 1))
    x, routing, weight, bias = case.tensors(torch.float32)
    inputs = [x * factor for factor in range(1, 9)]

    def call(x: Tensor) -> Tensor:
        return condconv2d(x, routing * x.std(), weight, bias, padding=1, backend="gemm", workspace_bytes=2000)

    alone = [call(x) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads do meet in the middle of a tile
    try:
        with ThreadPoolExecutor(4) as pool:
            for together, expected in zip(pool.map(call, inputs * 10), alone * 10, strict=True):
                assert torch.equal(together, expected)
    finally:
        sys.setswitchinterval(interval)


def test_the_operator_is_left_out_only_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients its implementation is called by itself; tracers, modes and transforms see the operator."""
    calls: list[str] = []
    for name in ("conv2d", "convolve"):
        function = getattr(operator, name)
        spy = lambda *args, name=name, function=function: (calls.append(name), function(*args))[1]  # noqa: E731
        monkeypatch.setattr(functional, name, spy)
    x, routing, weight, _ = TINY["pointwise"].tensors()

    def by(*tensors: Tensor) -> str:
        calls.clear()
        condconv2d(*tensors)
        return calls[0]

    assert by(x, routing, weight) == "convolve"
    assert by(x, routing, weight.clone().requires_grad_()) == "conv2d"
    with torch.no_grad():
        assert by(x, routing, nn.Parameter(weight)) == "convolve"
    with Recorder() as seen:
        assert by(x, routing, weight) == "conv2d"
    assert "condconv.conv2d.default" in seen.names
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert by(x, routing, weight) == "conv2d"
    with forward_ad.dual_level():
        assert by(x, routing, weight) == "conv2d"
    traced = make_fx(lambda x: condconv2d(x, routing, weight))(x)
    assert "condconv.conv2d" in traced.code
    meta = [t.to("meta") for t in (x, routing, weight)]
    assert by(*meta) == "conv2d"
    for name in ("peek_interpreter_stack", "get_interpreter_stack"):  # private: a later torch may not have them
        monkeypatch.delattr(torch._C._functorch, name)
    assert by(x, routing, weight) == "conv2d"


def test_derivatives_that_the_operator_does_not_have() -> None:
    """The reference is taken for them by "auto"; a backend by name says so instead of giving zeros."""
    x, routing, weight, _ = (t.double() for t in TINY["dense"].tensors())
    tangents = [torch.randn_like(t) for t in (x, routing, weight)]

    def call(backend: str) -> Any:
        return lambda *tensors: condconv2d(*tensors, backend=backend)

    def derivatives(run: Any) -> list[Tensor]:
        def value(*tensors: Tensor) -> Tensor:
            return run(*tensors).square().sum()

        inputs = (x, routing, weight)
        results = [*jvp(run, inputs, tuple(tangents)), *grad(value, argnums=(0, 1, 2))(*inputs)]
        results.append(jacfwd(lambda r: run(x, r, weight))(routing))
        per_example = vmap(grad(lambda w, one, r: value(one[None], r[None], w)), (None, 0, 0))
        results.append(per_example(weight, x, routing))
        results.append(vmap(lambda one, r: run(one[None], r[None], weight))(x, routing))
        with forward_ad.dual_level():
            dual = run(x, forward_ad.make_dual(routing, tangents[1]), weight)
            results.append(forward_ad.unpack_dual(dual).tangent)
        return results

    for plain, automatic in zip(derivatives(call("reference")), derivatives(call("auto")), strict=True):
        assert float(plain.abs().max()) > 0.1
        torch.testing.assert_close(automatic, plain)
    for wrong in (
        lambda: jvp(call("gemm"), (x, routing, weight), tuple(tangents)),
        lambda: grad(lambda x: call("gemm")(x, routing, weight).sum())(x),
    ):
        with pytest.raises(RuntimeError, match="backend='gemm' has gradients by backward"):
            wrong()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        call("gemm")(forward_ad.make_dual(x, tangents[0]), routing, weight)


def test_derivatives_inside_compiled_functions() -> None:
    """The reference is taken where torch.compile traces a transform of torch.func: the operator would give zeros."""
    x, routing, weight, _ = (t.double() for t in TINY["dense"].tensors())

    def output(x: Tensor) -> Tensor:
        return condconv2d(x, routing, weight)

    def value(x: Tensor) -> Tensor:
        return output(x).square().sum()

    def derivatives(x: Tensor) -> list[Tensor]:
        tangent = jvp(output, (x,), (torch.ones_like(x),))[1]
        return [tangent, grad(value)(x), jvp(grad(value), (x,), (torch.ones_like(x),))[1]]

    marked = vars(torch.compiler.assume_constant_result(lambda: True))
    assert vars(operator._differentiates) == marked, "torch marks such functions in another way now"
    compiled = torch.compile(derivatives, backend="aot_eager", fullgraph=True)(x)
    for plain, result in zip(derivatives(x), compiled, strict=True):
        assert float(plain.abs().max()) > 0.1
        torch.testing.assert_close(result, plain)


class Recorder(TorchDispatchMode):
    """Names of the operators that are called inside."""

    names: list[str]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))
