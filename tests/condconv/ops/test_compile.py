"""torch.compile and torch.export: one opaque node, one compilation for all batch sizes, a batch size left free."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from condconv import CondConv2d, CondLinear
from condconv.ops import operator
from condconv.ops.choice import Choice
from condconv.ops.spec import Problem

BATCHES = (3, 2, 5)


class Network(nn.Module):
    """Three layers that share a router, and a classifier with its own."""

    def __init__(self) -> None:
        super().__init__()
        shared: dict[str, Any] = {"num_experts": 3, "router": None}
        self.expand = CondConv2d(4, 6, 1, num_experts=3)
        self.depthwise = CondConv2d(6, 6, 3, padding="same_tf", stride=2, groups=6, **shared)
        self.project = CondConv2d(6, 4, 3, padding=1, **shared)
        self.classifier = CondLinear(4, 5, num_experts=2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.expand.router is not None
        routing = self.expand.router(x)
        x = self.project(torch.relu(self.depthwise(self.expand(x, routing), routing)), routing)
        y: Tensor = self.classifier(x.mean((2, 3)))
        return y


def gradients(network: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    network.zero_grad()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_three_batch_sizes_compile_once() -> None:
    network = Network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    gradients(network, compiled, torch.randn(BATCHES[0], 4, 8, 8))
    compilations = counter.frame_count  # torch may start one over, to make tensors of Python scalars
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in BATCHES:
            x = torch.randn(batch, 4, 8, 8)
            actual, expected = gradients(network, compiled, x), gradients(network, network, x)
            assert len(actual) == len(expected) == 1 + len(list(network.parameters()))
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                assert_close(a, e, f"output or gradient {i} at batch {batch}", torch.float32)
    assert counter.frame_count == compilations


def test_a_choice_that_changes_with_the_batch_size_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network().eval()
    chosen = set()

    def by_batch(problem: Problem) -> Choice:
        fits = "depthwise" if problem.is_depthwise else "gemm"
        name = {3: "mixture", 2: "grouped", 5: fits}[problem.batch]
        chosen.add(name)
        return Choice(name, "by batch, for this test")

    monkeypatch.setattr(operator, "choose", by_batch)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        outputs = {BATCHES[0]: compiled(torch.ones(BATCHES[0], 4, 8, 8))}
        with torch.compiler.set_stance("fail_on_recompile"):
            outputs |= {batch: compiled(torch.ones(batch, 4, 8, 8)) for batch in BATCHES[1:]}
    assert chosen == {"mixture", "grouped", "gemm", "depthwise"}
    for batch in BATCHES:  # every example is the same, so are the outputs of all algorithms
        assert_close(outputs[batch][-1], outputs[BATCHES[0]][0], f"batch {batch}", torch.float32)


def test_automatic_dynamic_shapes_need_one_more_compilation_at_most() -> None:
    """With torch's defaults the first batch size is taken for static, and the second one makes it dynamic."""
    network = Network().eval()
    network.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (4, 3):
            network(torch.randn(batch, 4, 8, 8))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (7, 2, 5):
                assert network(torch.randn(batch, 4, 8, 8)).shape == (batch, 5)
    assert all(not key.startswith("_orig_mod") for key in network.state_dict())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_layers_under_autocast_and_in_both_layouts(memory_format: torch.memory_format) -> None:
    layer = CondConv2d(4, 6, 3, padding=1, num_experts=3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(3, 4, 7, 5).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    assert y.stride() == expected.stride()
    assert_close(y, expected, "y")


def test_a_layer_is_one_node_of_the_graph() -> None:
    layer = CondConv2d(4, 6, 3, num_experts=3, router=None, bias=False)
    exported = torch.export.export(layer, (torch.randn(2, 4, 7, 7), torch.rand(2, 3)))
    calls = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert calls == ["condconv.conv2d.default"]


@pytest.mark.parametrize("training", [False, True])
def test_export_with_a_free_batch_size(training: bool) -> None:
    network = Network().train(training)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(network, (torch.randn(3, 4, 8, 8),), dynamic_shapes={"x": {0: batch}})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (1, 2, 5):
        x = torch.randn(size, 4, 8, 8)
        assert_close(loaded(x), network(x), f"batch {size}", torch.float32)


def test_export_with_free_image_size() -> None:
    layer = CondConv2d(4, 6, 3, stride=2, padding="same_tf", num_experts=3)
    height, width = torch.export.Dim("height", min=4, max=512), torch.export.Dim("width", min=4, max=512)
    shapes = {"x": {2: 2 * height, 3: 2 * width}, "routing_weights": None}
    exported = torch.export.export(layer, (torch.randn(2, 4, 12, 16), None), dynamic_shapes=shapes).module()
    for size in ((12, 16), (8, 20)):
        x = torch.randn(2, 4, *size)
        assert_close(exported(x, None), layer(x), f"size {size}", torch.float32)


def test_fake_and_meta_tensors_pass_through() -> None:
    with torch.device("meta"):
        network = Network()
        assert network(torch.empty(3, 4, 8, 8)).shape == (3, 5)
    x = torch.empty(2, 4, 8, 8, device="meta").to(memory_format=torch.channels_last)
    y = network.expand(x, torch.empty(2, 3, device="meta"))
    assert y.device.type == "meta"
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_computes_and_trains_on_its_own() -> None:
    network = Network()
    twin = copy.deepcopy(network)
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(network(x), twin(x))
    with torch.no_grad():
        twin.project.weight.mul_(2)
    assert not torch.equal(network(x), twin(x))
