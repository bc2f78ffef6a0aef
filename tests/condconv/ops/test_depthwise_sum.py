"""A grouped convolution from a depthwise one with a channel multiplier: the worked example, and a block of ResNeXt."""

from __future__ import annotations

import torch
from numerics import assert_close
from oracle import Case

from condconv import condconv2d
from condconv.ops.registry import BACKENDS


def test_the_worked_example() -> None:
    """Input 0..7, two groups of four channels, all weights 1: every output of a group is the sum of its inputs.

    Summed over the last axis instead, the known mistake, the outputs would be 0, 4, 8, ...
    """
    x = torch.arange(8.0).view(1, 8, 1, 1)
    y = condconv2d(x, torch.ones(1, 1), torch.ones(1, 8, 4, 1, 1), groups=2, backend="depthwise_sum")
    assert y.flatten().tolist() == [6.0, 6.0, 6.0, 6.0, 22.0, 22.0, 22.0, 22.0]


def test_a_block_of_resnext() -> None:
    """Many groups, stride 2, as many outputs as inputs: equal to the native grouped convolution per example."""
    case = Case(batch=3, channels=32, out_channels=32, groups=8, stride=(2, 2), padding=(1, 1), size=(9, 9))
    x, routing, weight, _ = case.tensors(torch.float32)
    summed, native = (BACKENDS[name].forward(x, routing, weight, case.spec, 0) for name in ("depthwise_sum", "grouped"))
    assert_close(summed, native, "y")
