"""Triton kernels in triton's interpreter on the CPU, against the float64 oracle.

Not collected by itself: triton reads TRITON_INTERPRET when it is imported, so `test_interpreter.py` runs this file in a
process of its own, in which nothing else has imported triton. Sizes are odd and tiles 16 or 32: most cases have
several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from numerics import assert_close
from oracle import Case, assert_all_close, cotangent, leaves, oracle, run
from torch import Tensor

from benchmarks import kernels as benchmark
from condconv.ops import triton as backends
from condconv.ops.spec import ConvSpec
from condconv.ops.triton import dense, depthwise, mix, pointwise, pointwise_gradient, tiles
from condconv.ops.triton.launch import INTERPRETED, Geometry, Strides

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def case(dtype: torch.dtype, layout: str, workspace_bytes: int = 0, **geometry: Any) -> Any:
    made = Case(**geometry)
    name = f"{str(dtype)[6:]} {layout} {made}" + (f" workspace={workspace_bytes}" if workspace_bytes else "")
    return pytest.param(made, dtype, layout == "nhwc", workspace_bytes, id=name)


POINT: dict[str, Any] = {"kernel": (1, 1)}
POINTWISE = [
    case(FP32, "nchw", **POINT),
    case(FP32, "nhwc", **POINT, batch=1, experts=1, channels=17, out_channels=35),
    case(BF16, "nhwc", **POINT, batch=5, experts=8, channels=20, out_channels=37),
    case(FP16, "nchw", **POINT, batch=3, experts=3, channels=37, out_channels=20, stride=(2, 3)),
    case(FP16, "nhwc", **POINT, channels=37, out_channels=5, size=(6, 9), stride=(2, 1)),
    case(FP32, "nhwc", 1, **POINT, batch=3, channels=5, out_channels=35, size=(2, 3)),
    case(BF16, "nchw", 2 * 2 * 34 * 32, **POINT, channels=34, out_channels=5, size=(2, 2)),
    case(BF16, "nhwc", **POINT, size=(1, 1), batch=19, experts=17),
]
SAME: dict[str, Any] = {"padding": (1, 1)}
SEVEN: dict[str, Any] = {"channels": 7, "out_channels": 7, "groups": 7}
DEPTHWISE = [
    case(FP32, "nchw", **SEVEN, **SAME, size=(5, 5)),
    case(FP32, "nhwc", **SEVEN, batch=1, experts=1, kernel=(3, 2), stride=(2, 3), padding=(0, 1)),
    case(BF16, "nhwc", **SEVEN, experts=8, dilation=(2, 1), padding=(2, 0)),
    case(FP16, "nchw", channels=19, out_channels=19, groups=19, stride=(2, 2), size=(5, 7), **SAME),
    case(FP16, "nhwc", 1, **SEVEN, batch=3, kernel=(5, 5), padding=(2, 2), size=(2, 2)),
    case(BF16, "nchw", 4 * 7 * 9 * 2, **SEVEN, **SAME, kernel=(2, 2), size=(7, 8)),
]
SMALL: dict[str, Any] = {"kernel": (2, 3), "size": (4, 5)}
DENSE = [
    case(FP32, "nchw", **SMALL, padding=(1, 1)),
    case(FP32, "nhwc", **SMALL, batch=1, experts=1, stride=(2, 3), padding=(0, 1)),
    case(BF16, "nhwc", **SMALL, experts=8, dilation=(1, 2), padding=(1, 2), channels=17),
    case(FP16, "nchw", **SMALL, channels=18, out_channels=10, groups=2, stride=(1, 2)),
    case(FP16, "nhwc", 1, kernel=(2, 1), size=(3, 2), batch=2, out_channels=35),
    case(FP32, "nhwc", 1, **SMALL, batch=2, channels=6, out_channels=9, groups=3, padding=(1, 1)),
    case(BF16, "nchw", 2 * 2 * 2 * 5 * 32, kernel=(1, 2), size=(3, 3), out_channels=34),
    case(FP32, "nchw", kernel=(5, 5), padding=(2, 2), size=(1, 2)),
    case(FP32, "nhwc", kernel=(1, 1), padding=(1, 0), stride=(2, 1), size=(3, 3)),
    case(FP32, "nchw", channels=1, out_channels=4, kernel=(2, 2), size=(3, 3)),
]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    assert INTERPRETED.value, "run through test_interpreter.py, or with TRITON_INTERPRET=1"
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def compare(
    backend: str, made: Case, dtype: torch.dtype, channels_last: bool, workspace_bytes: int
) -> tuple[list[Tensor], list[Tensor]]:
    tensors = made.tensors(dtype, channels_last)
    actual = run(tensors, made.spec, backend, workspace_bytes)
    expected = torch.channels_last if channels_last and made.channels > 1 else torch.contiguous_format
    assert actual[0].is_contiguous(memory_format=expected)
    assert actual[1].is_contiguous(memory_format=expected)
    return actual, oracle(tensors, made.spec)


@pytest.mark.parametrize(("made", "dtype", "channels_last", "workspace_bytes"), POINTWISE)
def test_pointwise(made: Case, dtype: torch.dtype, channels_last: bool, workspace_bytes: int) -> None:
    assert_all_close(*compare("triton_pointwise", made, dtype, channels_last, workspace_bytes), dtype)


@pytest.mark.parametrize(("made", "dtype", "channels_last", "workspace_bytes"), DEPTHWISE)
def test_depthwise(made: Case, dtype: torch.dtype, channels_last: bool, workspace_bytes: int) -> None:
    assert_all_close(*compare("triton_depthwise", made, dtype, channels_last, workspace_bytes), dtype)


@pytest.mark.parametrize(("made", "dtype", "channels_last", "workspace_bytes"), DENSE)
def test_dense(made: Case, dtype: torch.dtype, channels_last: bool, workspace_bytes: int) -> None:
    assert_all_close(*compare("triton_dense", made, dtype, channels_last, workspace_bytes), dtype)


FUSED = [
    pytest.param("pointwise", pointwise, {"fuse_mixing": True}, {"fuse_reduction": True}, id="pointwise"),
    pytest.param("depthwise", depthwise, {"fuse_mixing": True}, {"fuse_mixing": True}, id="depthwise fused"),
    pytest.param("depthwise", depthwise, {"fuse_mixing": False}, {"fuse_mixing": False}, id="depthwise workspace"),
]


@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(FP32, False), (BF16, True)], ids=["float32 nchw", "bfloat16 nhwc"]
)
@pytest.mark.parametrize(("kind", "module", "forward_options", "backward_options"), FUSED)
def test_options(
    kind: str, module: Any, forward_options: Any, backward_options: Any, dtype: torch.dtype, channels_last: bool
) -> None:
    made = Case(batch=5, channels=17, out_channels=20, kernel=(1, 1), stride=(1, 2))
    if kind == "depthwise":
        made = Case(**SEVEN, size=(5, 9), padding=(1, 0), stride=(1, 2))
    x, routing, weight, _ = tensors = made.tensors(dtype, channels_last)
    y, *gradients = oracle([*tensors[:3], torch.zeros_like(tensors[3])], made.spec)
    actual = module.forward(x, routing, weight, made.spec, 0, **forward_options)
    grads = module.backward(cotangent(actual), x, routing, weight, made.spec, (True,) * 3, 0, **backward_options)
    for name, a, e in zip(("y", "x", "routing", "weight"), (actual, *grads), (y, *gradients), strict=False):
        assert_close(a, e, name, dtype)


KINDS = {
    "triton_pointwise": Case(**POINT, size=(3, 5)),
    "triton_depthwise": Case(**SEVEN, kernel=(2, 2), size=(3, 3)),
    "triton_dense": Case(kernel=(2, 1), size=(3, 3)),
}


@pytest.mark.parametrize(("name", "made"), KINDS.items(), ids=KINDS)
def test_only_what_is_needed(name: str, made: Case) -> None:
    """Every subset of gradients is the same as in the full backward, and what is not asked for is not computed."""
    entry = next(e for e in backends.ENTRIES if e.name == name)
    x, routing, weight, _ = made.tensors(FP32)
    grad_y = cotangent(entry.forward(x, routing, weight, made.spec, 0))
    full = entry.backward(grad_y, x, routing, weight, made.spec, (True, True, True), 0)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        part = entry.backward(grad_y, x, routing, weight, made.spec, needs, 0)
        for needed, gradient, expected in zip(needs, part, full, strict=True):
            assert (gradient is not None) == needed
            assert gradient is None or torch.equal(gradient, expected)


@pytest.mark.parametrize(("name", "made"), KINDS.items(), ids=KINDS)
def test_master_weights_keep_their_precision(name: str, made: Case) -> None:
    """bfloat16 inputs, float32 experts, as under autocast: expert gradients are float32, not rounded to bfloat16."""
    entry = next(e for e in backends.ENTRIES if e.name == name)
    x, routing, weight, bias = made.tensors(BF16)
    bias = torch.zeros_like(bias)
    weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    expected = oracle([x, routing, weight, bias], made.spec)
    y = entry.forward(x, routing, weight, made.spec, 0)
    gradients = entry.backward(cotangent(y), x, routing, weight, made.spec, (True,) * 3, 0)
    assert (y.dtype, *(g.dtype for g in gradients)) == (BF16, BF16, FP32, FP32)
    assert not torch.equal(gradients[2], gradients[2].bfloat16().float())
    for label, a, e in zip(("x", "routing", "weight"), gradients, expected[1:], strict=False):
        assert_close(a, e, label, BF16)


@pytest.mark.parametrize(("name", "made"), KINDS.items(), ids=KINDS)
@pytest.mark.parametrize("empty", ["batch", "map", "channels"])
def test_nothing_to_compute(name: str, made: Case, empty: str) -> None:
    entry = next(e for e in backends.ENTRIES if e.name == name)
    x, routing, weight, _ = made.tensors(FP32)
    spec: ConvSpec = made.spec._replace(padding=(1, 1))
    if empty == "batch":
        x, routing = x[:0], routing[:0]
    elif empty == "map":
        x, spec = x[:, :, :0], spec._replace(padding=(0, 0))
        spec = spec._replace(padding=((weight.shape[3]) // 2, 0))
    else:
        x, weight = x[:, :0], weight[:, :, :0]
    y = entry.forward(x, routing, weight, spec, 0)
    assert not y.isnan().any()
    gradients = entry.backward(torch.ones_like(y), x, routing, weight, spec, (True,) * 3, 0)
    for gradient, tensor in zip(gradients, (x, routing, weight), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.count_nonzero() == 0


def test_expert_gradients_are_reproducible() -> None:
    made = Case(batch=5, channels=17, out_channels=35, kernel=(1, 1), size=(2, 3))
    x, routing, weight, _ = leaves(made.tensors(BF16))
    grad_y = torch.randn(5, 35, 2, 3).bfloat16()
    ways: list[Callable[[], tuple[Tensor | None, ...]]] = [
        partial(pointwise.backward, grad_y, x, routing, weight, made.spec, (True,) * 3, 0, fuse_reduction=fused)
        for fused in (False, True)
    ]
    for way in ways:
        assert all(torch.equal(a, b) for a, b in zip(way(), way(), strict=True) if a is not None and b is not None)


def test_batch_is_divided_among_programs_exactly_once() -> None:
    made = Case(batch=7, channels=5, out_channels=6, kernel=(1, 1))
    x, routing, weight, _ = made.tensors(FP32)
    grad_y = torch.randn(7, 6, 7, 7)
    results = [
        pointwise_gradient.expert_gradients(grad_y, x, routing, weight, made.spec, True, True, min_programs)
        for min_programs in (1, 2, 4, 100)
    ]
    for routing_gradient, weight_gradient in results[1:]:
        assert_close(routing_gradient, results[0][0], "routing")
        assert_close(weight_gradient, results[0][1], "weight")


def test_mixing_is_better_than_the_rounding_of_its_factors() -> None:
    """The split of float32 factors into two bfloat16: the mixed kernel is off by its own rounding alone."""
    routing, weight = torch.rand(5, 3), torch.randn(3, 1, 40)
    kernel = torch.empty(5, 40, dtype=BF16)
    mix.mix(routing, weight, kernel)
    exact = routing.double() @ weight[:, 0].double()

    def within_one_unit(mixed: Tensor) -> bool:
        """The interpreter truncates to bfloat16 instead of rounding, hence a whole unit in the last place."""
        return bool(((mixed.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-4).all())

    assert within_one_unit(kernel)
    assert not within_one_unit(routing.bfloat16().double() @ weight[:, 0].bfloat16().double())


APART = 2**30 + 64


@pytest.fixture
def far_apart() -> Tensor:
    """Three examples `[3, 4, 3, 3]`, so far apart that the third lies past 2^31 elements; the rest is never touched."""
    storage = torch.UntypedStorage(2 * (2 * APART + 36))
    x = torch.empty(0, dtype=BF16).set_(storage).as_strided((3, 4, 3, 3), (APART, 9, 3, 1))
    return x.copy_(torch.randn(3, 4, 3, 3))


@pytest.mark.parametrize("kernels", [pointwise.KERNELS, dense.KERNELS], ids=["pointwise", "dense"])
def test_offsets_across_examples_are_64_bit(kernels: tiles.Kernels, far_apart: Tensor) -> None:
    x, y, kernel, spec = far_apart, torch.empty(3, 5, 3, 3, dtype=BF16), torch.randn(3, 5, 1, 4).bfloat16(), ConvSpec()
    call = tiles.Call(spec, Geometry.of(x, y, 1, spec), Strides(APART, 1, 9), Strides(45, 1, 9))
    kernels.forward(x, kernel, y, call)
    assert_close(y, torch.einsum("nkc,nchw->nkhw", kernel[:, :, 0].double(), x.double()), "y")
    grad_kernel = torch.empty_like(kernel)
    kernels.kernel_gradient(y, x, grad_kernel, call)
    assert_close(grad_kernel[:, :, 0], torch.einsum("nkhw,nchw->nkc", y.double(), x.double()), "kernel gradient")
    x.zero_()
    kernels.input_gradient(y, kernel, x, call)
    assert_close(x, torch.einsum("nkc,nkhw->nchw", kernel[:, :, 0].double(), y.double()), "gradient of x")


TINY = [
    benchmark.Layer("tiny", "pointwise", 5, 7, 3, experts=2, batch=2),
    benchmark.Layer("tiny", "depthwise", 5, 5, 3, 2, experts=2, batch=2),
    benchmark.Layer("tiny", "dense", 3, 5, 3, 2, experts=2, batch=2),
]


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.kind)
def test_benchmark_times_what_is_right_and_only_that(layer: benchmark.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's script, on the CPU: the clock is replaced, the gate is real."""

    def once(run: Callable[[], Any]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(benchmark, "measure_ms", once)
    monkeypatch.setattr(benchmark, "GATE_BATCH", 1)
    rows = benchmark.measure(layer, FP32, True, benchmark.Ceilings(1e9, 1e12), "cpu")
    assert len(rows) >= 4
    assert all(row["correct"] and row["share_of_bound"] == row["bound_ms"] / 2 for row in rows)
    module, forward = benchmark.module_of(layer), benchmark.module_of(layer).forward
    monkeypatch.setattr(module, "forward", lambda *a, **options: 1.01 * forward(*a, **options))
    rows = benchmark.measure(layer, FP32, True, benchmark.Ceilings(1e9, 1e12), "cpu")
    assert not any(row["correct"] or "ms" in row for row in rows)
    assert "wrong: not timed" in benchmark.markdown({}, rows, [])
