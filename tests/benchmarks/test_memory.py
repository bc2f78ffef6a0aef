"""The meter of peak memory, against sizes counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import _peak, peak_bytes
from condconv import condconv2d
from condconv.ops.workspace import workspace

KIB = 1024


def test_what_lives_at_once_counts_and_the_rest_does_not() -> None:
    def step() -> Tensor:
        a = torch.empty(64 * KIB)  # 256 KiB
        b = torch.empty(32 * KIB)  # 128 KiB: both live
        del a
        c = torch.empty(16 * KIB)  # with b: less than before
        return b[0] + c[0]

    assert peak_bytes(step, list, "cpu") == pytest.approx(384 * KIB, abs=KIB)


def test_a_training_step_of_one_layer_counted_by_hand() -> None:
    """With y = relu(W x): y is kept for the backward, beside it comes its gradient; dW stays and does not count."""
    layer = nn.Linear(256, 512, bias=False)
    x, grad_y = torch.randn(64, 256), torch.ones(64, 512)
    gradients: list[Tensor] = []

    def step() -> None:
        layer(x).relu_().backward(grad_y)
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad)
        layer.weight.grad = None

    step()
    bytes_y, bytes_weight = 4 * 64 * 512, 4 * 256 * 512
    assert peak_bytes(step, lambda: gradients, "cpu") == pytest.approx(2 * bytes_y, abs=KIB)
    assert peak_bytes(step, list, "cpu") >= bytes_weight + bytes_y, "not told that dW stays, the meter counts it"


def test_it_sees_inside_custom_operators() -> None:
    """With a workspace as large as all mixed kernels, the grouped backend mixes the whole batch at once."""
    x, routing, weight = torch.randn(32, 16, 4, 4), torch.rand(32, 2), torch.randn(2, 16, 16, 3, 3)
    mixed = 4 * 32 * 16 * 16 * 9

    def forward(workspace_bytes: int) -> None:
        condconv2d(x, routing, weight, padding=1, backend="grouped", workspace_bytes=workspace_bytes)

    # The workspace is made by the first call that needs it; one that was made before would not be seen.
    workspace.buffers.clear()
    small = peak_bytes(lambda: forward(mixed // 16), list, "cpu")
    large = peak_bytes(lambda: forward(2 * mixed), list, "cpu")
    workspace.buffers.clear()
    assert large > mixed > 2 * small


def test_addresses_that_are_used_again() -> None:
    events = [(1, 100), (1, -100), (1, 50), (2, 30), (9, -70), (2, -30)]
    assert _peak(events, set()) == 100
    assert _peak(events, {1}) == 100, "the first tenant of address 1 was released and counts"
    assert _peak(events[2:], {1}) == 30, "the second stays for good and does not"
    assert _peak([(2, 30), (1, 50), (1, -50)], {1}) == 80
