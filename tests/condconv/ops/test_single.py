"""One example: its kernel is mixed in blocks of experts that are added up."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from oracle import Case, assert_all_close, oracle, run

from condconv.ops import single

LAYERS = [
    Case(batch=1, padding=(1, 1)),
    Case(batch=1, kernel=(1, 1), experts=8),
    Case(batch=1, channels=6, out_channels=6, groups=6, kernel=(5, 5), padding=(2, 2), size=(2, 2)),
    Case(batch=1, experts=1),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_any_number_of_products_gives_the_oracles_answer(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "SMALLEST_BLOCK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for channels_last in (False, True):
        tensors = case.tensors(channels_last=channels_last)
        assert_all_close(run(tensors, case.spec, "single"), oracle(tensors, case.spec), torch.float64)


@pytest.mark.parametrize("block", [1, 10, 1 << 18])
def test_experts_of_another_dtype_are_added_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "SMALLEST_BLOCK", 0)
    monkeypatch.setattr(single, "BLOCK", block)
    weight, routing = torch.randn(4, 37).bfloat16(), torch.rand(4)
    assert_close(single.mix(routing, weight), routing.double() @ weight.double(), "mixed kernel", torch.float32)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_mixes_half_precision_experts_in_float32(weight_dtype: torch.dtype) -> None:
    """As a product does, above the size from which experts are added one by one and below."""
    for size in (single.SMALLEST_BLOCK + 3, 5):
        weight = torch.randn(4, size).to(weight_dtype)
        routing = torch.rand(4)
        mixed = single.mix(routing, weight)
        assert mixed.dtype == torch.float32
        assert_close(mixed, (routing.double() @ weight.double()), "mixed kernel", torch.float32)
