"""Geometry, taps that can matter, layouts, and the description of a problem."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from numerics import assert_close
from oracle import Case
from torch.nn import functional as F

from condconv.ops.spec import (
    ConvSpec,
    Problem,
    crop_to_live_taps,
    is_channels_last,
    live_taps,
    memory_format_of,
    mixing_dtype,
)

SIZES = list(itertools.product((1, 2, 3, 7), (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 2, 4), (1, 2, 3)))
"""(size, kernel, stride, padding, dilation) in one dimension."""


def fits(size: int, kernel: int, padding: int, dilation: int) -> bool:
    return size + 2 * padding >= dilation * (kernel - 1) + 1


def test_output_size_is_that_of_torch() -> None:
    for size, kernel, stride, padding, dilation in SIZES:
        if fits(size, kernel, padding, dilation):
            spec = ConvSpec((stride, 1), (padding, 0), (dilation, 1))
            y = F.conv2d(torch.empty(1, 1, size, 3), torch.empty(1, 1, kernel, 2), None, *spec)
            assert spec.output_size((size, 3), (kernel, 2)) == tuple(y.shape[2:])


def test_cropping_to_live_taps_is_exact() -> None:
    """Same output, same size; and a tap outside the crop never meets the map, so that its gradient is zero."""
    for size, kernel, stride, padding, dilation in SIZES:
        if not fits(size, kernel, padding, dilation):
            continue
        x = torch.randn(1, 1, size, 1, dtype=torch.float64)
        weight = torch.randn(1, 1, 1, kernel, 1, dtype=torch.float64, requires_grad=True)
        spec = ConvSpec((stride, 1), (padding, 0), (dilation, 1))
        full = F.conv2d(x, weight[0], None, *spec)
        live, cropped, where = crop_to_live_taps(weight, (size, 1), spec)
        message = f"{size=} {kernel=} {stride=} {padding=} {dilation=}"
        assert_close(F.conv2d(x, live[0], None, *cropped), full, message, torch.float64) if full.any() else None
        assert live.shape[3] <= kernel, message
        (grad,) = torch.autograd.grad(full.sum(), weight)
        outside = torch.ones(kernel, dtype=torch.bool)
        outside[where[0]] = False
        assert not grad.flatten()[outside].any(), message


@pytest.mark.parametrize(
    ("size", "kernel", "padding", "stride", "expected"),
    [
        (1, 5, 2, 1, 1),  # one live tap in each direction
        (2, 5, 2, 1, 3),  # nine of 25
        (7, 5, 2, 1, 5),
        (1, 3, 1, 2, 1),
        (1, 7, 3, 1, 1),
        (3, 7, 3, 1, 5),
        (2, 4, 3, 2, 2),  # dilation 2: one live tap, and a dead one before it that keeps the padding symmetric
    ],
)
def test_number_of_live_taps(size: int, kernel: int, padding: int, stride: int, expected: int) -> None:
    dilation = 2 if kernel == 4 else 1
    spec = ConvSpec((stride, stride), (padding, padding), (dilation, dilation))
    for taps in live_taps((size, size), (kernel, kernel), spec):
        assert taps.stop - taps.start == expected


def test_a_full_kernel_is_not_copied() -> None:
    weight = torch.randn(2, 3, 4, 3, 3)
    live, spec, where = crop_to_live_taps(weight, (7, 7), ConvSpec(padding=(1, 1)))
    assert live.data_ptr() == weight.data_ptr()
    assert spec == ConvSpec(padding=(1, 1))
    assert where == (slice(0, 3), slice(0, 3))


def test_layouts_are_told_apart() -> None:
    x = torch.empty(2, 3, 5, 4)
    assert not is_channels_last(x)
    assert is_channels_last(x.to(memory_format=torch.channels_last))
    one_pixel = torch.empty(2, 3, 1, 1)
    assert not is_channels_last(one_pixel)
    assert is_channels_last(torch.empty(2, 3, 1, 1, memory_format=torch.channels_last))
    assert memory_format_of(one_pixel) == torch.contiguous_format
    assert memory_format_of(x.to(memory_format=torch.channels_last)) == torch.channels_last
    assert not is_channels_last(x[:, :, ::2])
    assert not is_channels_last(x[:1].expand(2, -1, -1, -1))
    assert not is_channels_last(torch.empty(2, 1, 5, 4)) and not is_channels_last(torch.empty(2, 1, 1, 1))
    assert is_channels_last(torch.empty(2, 1, 5, 4, memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_mixing_is_never_below_float32(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert mixing_dtype(*(torch.empty(1, dtype=dtype) for dtype in dtypes)) == expected


def test_a_problem_describes_its_tensors() -> None:
    case = Case(batch=2, size=(5, 9), kernel=(5, 3), padding=(2, 1), stride=(2, 1), experts=4)
    problem = case.problem(torch.bfloat16, channels_last=True)
    assert problem.batch == 2
    assert problem.experts == 4
    assert (problem.in_channels, problem.out_channels) == (5, 7)
    assert problem.dtype == problem.weight_dtype == torch.bfloat16
    assert problem.channels_last
    assert problem.device == "cpu"
    assert problem.output_PQ == (3, 9)
    assert problem.positions == 27
    assert problem.kernel_size == 7 * 5 * 5 * 3
    assert not problem.is_depthwise
    assert Case(channels=4, out_channels=4, groups=4).problem().is_depthwise
    assert not Case(channels=4, out_channels=8, groups=4).problem().is_depthwise


def test_kernel_size_counts_live_taps_only() -> None:
    case = Case(channels=4, out_channels=4, groups=4, kernel=(5, 5), padding=(2, 2), size=(2, 2))
    assert case.problem().kernel_size == 4 * 9


def test_problems_are_keys() -> None:
    one, other = Case().problem(), Case().problem()
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != Case(experts=4).problem()
    x, _, weight, _ = Case().tensors()
    assert Problem.of(x, weight, Case().spec, training=False) != one
