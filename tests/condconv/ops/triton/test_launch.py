"""What launchers decide before anything runs; nothing here needs a GPU or the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from condconv.ops.triton import dense, pointwise, pointwise_gradient
from condconv.ops.triton.launch import matmul_precision, pruner

MATMUL = torch.backends.cuda.matmul
NEWER_SETTING = hasattr(MATMUL, "fp32_precision")


@pytest.fixture
def nothing_is_set() -> Iterator[None]:
    """No precision of products, neither before nor after: an older setting would go before the one for everything."""

    def forget() -> None:
        torch.set_float32_matmul_precision("highest")
        if NEWER_SETTING:
            MATMUL.fp32_precision = torch.backends.fp32_precision = "none"

    forget()
    yield
    forget()


@pytest.mark.skipif(not NEWER_SETTING, reason="fp32_precision came with torch 2.9")
@pytest.mark.parametrize("owner", [MATMUL, torch.backends], ids=["matmul", "everywhere"])
@pytest.mark.usefixtures("nothing_is_set")
def test_tf32_is_allowed_by_the_newer_setting(owner: Any) -> None:
    assert matmul_precision(torch.float32) == "ieee"
    owner.fp32_precision = "tf32"
    assert matmul_precision(torch.float32) == "tf32"
    assert matmul_precision(torch.bfloat16) == "ieee"
    owner.fp32_precision = "ieee"
    assert matmul_precision(torch.float32) == "ieee"


@pytest.mark.usefixtures("nothing_is_set")
def test_tf32_is_allowed_by_the_older_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    assert matmul_precision(torch.float32) == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert matmul_precision(torch.float32) == "ieee"
    for allowed, precision in ((True, "tf32"), (False, "ieee")):  # torch 2.8 has no other
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert matmul_precision(torch.float32) == precision


EXTENTS = {"ROWS": "rows", "COLUMNS": "columns", "INNER": "inner"}
TILES = {
    "pointwise product": pointwise.PRODUCT_TILES,
    "pointwise gradient": pointwise_gradient.GRADIENT_TILES,
    "dense product": dense.PRODUCT_TILES,
    "dense gradient": dense.GRADIENT_TILES,
}


def fitting(tiles: Sequence[tuple[int, ...]], sizes: tuple[int, ...], dtype: torch.dtype) -> list[list[int]]:
    """Rows, columns and summed elements of the tiles that are left for a problem of these sizes."""
    configs = [triton.Config(dict(zip(EXTENTS, t, strict=False)), num_warps=t[3], num_stages=t[4]) for t in tiles]
    arguments = {"source": torch.empty(1, dtype=dtype), **dict(zip(EXTENTS.values(), sizes, strict=True))}
    return [list(config.kwargs.values()) for config in pruner(EXTENTS)(configs, arguments, PRECISION="ieee")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_every_problem_has_a_tile_that_fits(tiles: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    sizes = (1, 10, 16, 24, 32, 49, 192, 1024)
    for problem in itertools.product(sizes, repeat=3):
        left = fitting(tiles, problem, dtype)
        assert left, problem
        for tile in left:
            rows, columns, _ = tile
            assert all(block >= 16 for block in tile), "tl.dot takes no less"
            assert all(block < 2 * max(size, 17) for block, size in zip(tile, problem, strict=True)), (tile, problem)
            assert dtype != torch.float32 or rows * columns <= 64 * 64, (tile, problem)


def test_where_no_tile_fits_the_smallest_stays() -> None:
    assert fitting([(128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 64, 4, 3)], (8, 8, 8), torch.float32) == [
        [64, 64, 64]
    ]
