"""What a layer keeps for its backward, and how much memory it touches on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, assert_all_close, run
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condconv import CondConv2d, condconv2d
from condconv.ops import chunked, registry
from condconv.ops.workspace import workspace

LAYERS = {
    "dense": Case(batch=48, channels=32, out_channels=32, size=(4, 4), padding=(1, 1), experts=2),
    "pointwise": Case(batch=64, channels=128, out_channels=96, size=(2, 2), kernel=(1, 1), experts=2),
    "depthwise": Case(batch=64, channels=64, out_channels=64, groups=64, size=(4, 4), kernel=(9, 9), padding=(4, 4)),
    "grouped": Case(batch=48, channels=64, out_channels=64, groups=2, size=(3, 3), padding=(1, 1), experts=2),
}
"""Layers whose mixed kernels, N x P numbers, are far larger than inputs, outputs and experts together."""
PAIRS = [
    pytest.param(backend, case, id=f"{backend} {kind}")
    for kind, case in LAYERS.items()
    for backend in (*CPU_BACKENDS, "auto")
    if backend == "auto" or case.supported_by(backend, torch.float32)
]


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def mixed_kernels(case: Case) -> int:
    """Bytes of the batch's mixed kernels in float32."""
    taps = case.kernel[0] * case.kernel[1]
    return 4 * case.batch * case.out_channels * case.channels // case.groups * taps


def saved_storages(function: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of each storage that autograd keeps, by address."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    assert y.requires_grad
    return saved


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_the_arguments_are_all_that_is_kept(backend: str, case: Case) -> None:
    arguments = [t.requires_grad_() for t in case.tensors(torch.float32)]
    saved = saved_storages(lambda: condconv2d(*arguments, *case.spec, backend=backend))
    assert set(saved) == {t.untyped_storage().data_ptr() for t in arguments}
    assert sum(saved.values()) < mixed_kernels(case) / 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_only_what_the_asked_gradients_read_is_kept(backend: str, case: Case, channels_last: bool) -> None:
    """Frozen experts and router: the activation goes. What is not kept has its shape and layout in the backward."""
    tensors = case.tensors(torch.float32, channels_last)[:3]
    expected = torch.autograd.grad(_output(case, backend, [t.requires_grad_() for t in tensors]).sum(), tensors)
    for i, kept in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        arguments = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        saved = saved_storages(lambda arguments=arguments: _output(case, backend, arguments))
        assert set(saved) == {arguments[j].untyped_storage().data_ptr() for j in kept}
        (grad,) = torch.autograd.grad(_output(case, backend, arguments).sum(), arguments[i])
        assert_close(grad, expected[i], "gradient", torch.float32)


def _output(case: Case, backend: str, arguments: list[Tensor]) -> Tensor:
    return condconv2d(*arguments, None, *case.spec, backend=backend)


def test_autocast_keeps_the_rounded_input_alone() -> None:
    case = LAYERS["pointwise"]
    x, routing, weight, _ = (t.requires_grad_() for t in case.tensors(torch.float32))

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return condconv2d(x, routing, weight, *[None], *case.spec)

    saved = saved_storages(forward)
    assert sum(saved.values()) == nbytes(x) // 2 + nbytes(routing, weight)


def test_a_layer_keeps_its_input_and_next_to_nothing_else() -> None:
    layer = CondConv2d(32, 32, 3, padding=1, num_experts=4)
    x = torch.randn(48, 32, 4, 4, requires_grad=True)
    saved = saved_storages(lambda: layer(x))
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {address: size for address, size in saved.items() if address not in parameters}
    assert sum(kept.values()) <= nbytes(x) + 4 * 48 * (32 + 4) + 64  # the pooled input and the routing weights


class Memory(TorchDispatchMode):
    """Bytes that live at once, and the largest single result, of the operations inside; views cost nothing."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "case"), [p for p in PAIRS if p.values[0] != "auto"])
def test_forward_and_backward_stay_within_their_workspace(backend: str, case: Case, channels_last: bool) -> None:
    """Beyond results of the size of the arguments: a few times the workspace, however large the batch is."""
    x, routing, weight, _ = case.tensors(torch.float32, channels_last)
    algorithm, workspace_bytes = registry.BACKENDS[backend], mixed_kernels(case) // 40
    workspace.buffers.clear()
    with torch.no_grad(), Memory(x, routing, weight) as forward:
        y = algorithm.forward(x, routing, weight, case.spec, workspace_bytes)
    grad_y = torch.ones_like(y)
    workspace.buffers.clear()
    with torch.no_grad(), Memory(x, routing, weight, y, grad_y) as backward:
        gradients = algorithm.backward(grad_y, x, routing, weight, case.spec, (True, True, True), workspace_bytes)
    assert all(g is not None for g in gradients)
    arguments = nbytes(x, y, weight) * (case.experts if backend == "mixture" else 1)
    for memory, name in ((forward, "forward"), (backward, "backward")):
        assert memory.largest < mixed_kernels(case) / 4, f"{name} makes one result of {memory.largest} bytes"
        assert memory.peak < 2 * arguments + mixed_kernels(case) / 4, f"{name} holds {memory.peak} bytes at once"


def test_the_meter_sees_what_it_should() -> None:
    """Guards the test above: an algorithm that mixes the whole batch at once is caught."""
    case = LAYERS["dense"]
    x, routing, weight, _ = case.tensors(torch.float32)
    workspace.buffers.clear()
    with torch.no_grad(), Memory(x, routing, weight) as memory:
        registry.BACKENDS["grouped"].forward(x, routing, weight, case.spec, 1 << 40)
    workspace.buffers.clear()
    assert memory.largest >= mixed_kernels(case)


def test_patches_of_few_examples_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfolded maps are nine times the activation; beyond the limit the batch is walked through."""
    case = Case(batch=12, channels=32, out_channels=32, size=(20, 20), padding=(1, 1), experts=2)
    tensors = case.tensors(torch.float32)
    patches = 4 * 20 * 20 * 32 * 9
    whole = run(tensors, case.spec, "gemm")
    monkeypatch.setattr(chunked, "PATCHES_BYTES", 5 * patches)
    with Memory(*tensors) as memory:
        parts = run(tensors, case.spec, "gemm")
    assert memory.largest <= 5 * patches
    assert_all_close(parts, whole, torch.float32)


def test_the_automatic_workspace_is_small_whatever_the_batch() -> None:
    case = Case(batch=320, channels=96, out_channels=64, kernel=(3, 3), size=(2, 2), padding=(1, 1), experts=2)
    assert mixed_kernels(case) > 4 * max(chunked.AUTOMATIC_WORKSPACE_BYTES["cpu"], 1 << 20)
    x, routing, weight, _ = case.tensors(torch.float32)
    workspace.buffers.clear()
    registry.BACKENDS["grouped"].forward(x, routing, weight, case.spec, 0)
    kept = sum(buffer.numel() * buffer.element_size() for buffer in workspace.buffers.values())
    assert 0 < kept <= chunked.AUTOMATIC_WORKSPACE_BYTES["cpu"]
