"""The kernels on a real GPU, through the public function, at sizes of real layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics import assert_close
from oracle import Case, assert_all_close, cotangent, oracle, run
from torch import Tensor

from condconv.ops.triton import ENTRIES

LAYERS = {
    "triton_pointwise": [
        Case(kernel=(1, 1), batch=17, channels=80, out_channels=480, size=(14, 14), experts=8),
        Case(kernel=(1, 1), batch=33, channels=100, out_channels=70, size=(1, 1), experts=32),
        Case(kernel=(1, 1), batch=3, channels=65, out_channels=130, size=(13, 13), stride=(2, 2)),
        Case(kernel=(1, 1), batch=5, channels=192, out_channels=320, size=(7, 7), experts=8),
    ],
    "triton_depthwise": [
        Case(
            channels=672, out_channels=672, groups=672, kernel=(5, 5), padding=(2, 2), size=(14, 14), experts=8, batch=9
        ),
        Case(channels=97, out_channels=97, groups=97, padding=(1, 1), stride=(2, 2), size=(35, 35), experts=1),
        Case(channels=240, out_channels=240, groups=240, padding=(2, 2), dilation=(2, 2), size=(28, 28)),
    ],
    "triton_dense": [
        Case(channels=128, out_channels=128, padding=(1, 1), size=(14, 14), experts=8, batch=9),
        Case(channels=67, out_channels=65, padding=(1, 1), stride=(2, 2), size=(15, 15)),
        Case(channels=128, out_channels=256, groups=32, padding=(1, 1), size=(7, 7)),
    ],
}
CASES = [pytest.param(name, made, id=f"{name} {made}") for name, cases in LAYERS.items() for made in cases]
FORMS = [
    pytest.param(
        name,
        made,
        channels_last,
        dtype,
        turn,
        id=f"{name} {made} {'nhwc' if channels_last else 'nchw'} {str(dtype)[6:]}",
    )
    for name, cases in LAYERS.items()
    for turn, (made, channels_last) in enumerate(itertools.product(cases, (True, False)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
"""With a turn, by which each takes another tile candidate of every kernel: all are tested, none is timed.

Turns are counted within a dtype, and sizes and order are such that every candidate has its turn in each.
"""


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [t.cuda() for t in tensors]


@pytest.fixture(autouse=True)
def ieee_products_and_nan_memory() -> Iterator[None]:
    # Not by monkeypatch, which deletes at the end what is no entry of the object's __dict__.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = allowed


def candidates_of(tuner: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The tile candidates that a launch of a kernel has."""
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    return tuner.prune_configs(options)


@pytest.fixture
def take_candidate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a turn: launches take the candidate whose turn it is instead of timing all of them."""

    def take(turn: int) -> None:
        def run_one(self: Any, *args: Any, **options: Any) -> Any:
            candidates = candidates_of(self, args, options)
            return self.fn.run(*args, **options, **candidates[turn % len(candidates)].all_kwargs())

        from triton.runtime.autotuner import Autotuner

        monkeypatch.setattr(Autotuner, "run", run_one)

    return take


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "made", "channels_last", "dtype", "turn"), FORMS)
def test_matches_oracle(
    backend: str,
    made: Case,
    channels_last: bool,
    dtype: torch.dtype,
    turn: int,
    take_candidate: Callable[[int], None],
) -> None:
    take_candidate(turn)
    tensors = made.tensors(dtype, channels_last)
    expected = oracle(tensors, made.spec)
    for workspace_bytes in (0, 200_000):
        actual = run(on_gpu(tensors), made.spec, backend, workspace_bytes)
        assert_all_close(actual, expected, dtype, f"workspace={workspace_bytes}")


def test_every_candidate_has_its_turn_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no GPU: launches are counted, and nothing is computed."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    candidates: set[tuple[str, torch.dtype, str]] = set()
    taken: set[tuple[str, torch.dtype, str]] = set()

    def count(self: Any, *args: Any, **options: Any) -> None:
        kernel = f"{self.fn.__module__}.{self.fn.__name__}"
        names = [str(config) for config in candidates_of(self, args, options)]
        candidates.update((kernel, dtype, name) for name in names)
        taken.add((kernel, dtype, names[turn % len(names)]))

    monkeypatch.setattr(Autotuner, "run", count)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    for form in FORMS:
        backend, made, channels_last, dtype, turn = form.values
        entry = next(e for e in ENTRIES if e.name == backend)
        x, routing, weight, _ = made.tensors(dtype, channels_last)
        for workspace_bytes in (25 << 20, 200_000):  # the former is what 0 means on an H100
            y = entry.forward(x, routing, weight, made.spec, workspace_bytes)
            entry.backward(y, x, routing, weight, made.spec, (True,) * 3, workspace_bytes)
    assert len(candidates) > 90
    assert not candidates - taken


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "made"), CASES)
def test_fused_forms_match_oracle(backend: str, made: Case, take_candidate: Callable[[int], None]) -> None:
    take_candidate(0)
    tensors = made.tensors(torch.bfloat16, channels_last=True)
    y, *gradients = oracle([*tensors[:3], torch.zeros_like(tensors[3])], made.spec)
    x, routing, weight, _ = on_gpu(tensors)
    entry = next(e for e in ENTRIES if e.name == backend)
    options = {} if backend == "triton_dense" else {"fuse_mixing": True}
    actual = entry.forward(x, routing, weight, made.spec, 0, **options)
    options = {"fuse_reduction": True} if backend == "triton_pointwise" else options
    grads = entry.backward(cotangent_like(actual), x, routing, weight, made.spec, (True,) * 3, 0, **options)
    for name, a, e in zip(("y", "x", "routing", "weight"), (actual, *grads), (y, *gradients), strict=False):
        assert_close(a, e, name, torch.bfloat16)


def cotangent_like(y: Tensor) -> Tensor:
    return cotangent(y.cpu()).to(y.device)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "made"), CASES)
def test_gradients_are_bitwise_reproducible(backend: str, made: Case) -> None:
    """With the tiles that the autotuner chooses."""
    tensors = on_gpu(made.tensors(torch.bfloat16, channels_last=True))
    first, second = (run(tensors, made.spec, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
