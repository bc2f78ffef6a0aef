"""What launchers decide before anything runs; nothing here needs a GPU or the interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from condconv.ops.triton.launch import matmul_precision

NEWER_SETTING = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.skipif(not NEWER_SETTING, reason="fp32_precision came with torch 2.9")
@pytest.mark.parametrize("owner", [torch.backends.cuda.matmul, torch.backends], ids=["matmul", "everywhere"])
def test_tf32_is_allowed_by_the_newer_setting(owner: Any) -> None:
    assert matmul_precision(torch.float32) == "ieee"
    try:
        owner.fp32_precision = "tf32"
        assert matmul_precision(torch.float32) == "tf32"
        assert matmul_precision(torch.bfloat16) == "ieee"
        owner.fp32_precision = "ieee"
        assert matmul_precision(torch.float32) == "ieee"
    finally:
        owner.fp32_precision = "none"


def test_tf32_is_allowed_by_the_older_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert matmul_precision(torch.float32) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert matmul_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
        if NEWER_SETTING:
            torch.backends.cuda.matmul.fp32_precision = "none"
    for allowed, precision in ((True, "tf32"), (False, "ieee")):  # torch 2.8 has no other
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert matmul_precision(torch.float32) == precision
