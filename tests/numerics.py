"""One way to compare numbers for all tests: RMS(error) / RMS(reference), tolerances per dtype in one table."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


def assert_close(actual: Tensor, reference: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Fail unless `actual` is `reference` up to the rounding of `dtype` (default: the dtype of `actual`).

    Shapes must agree; NaN and infinity fail unless the reference has them at the same places, which it never should.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    actual64, reference64 = actual.detach().double().cpu(), reference.detach().double().cpu()
    assert actual64.isfinite().all(), f"{name}: {(~actual64.isfinite()).sum()} elements are not finite"
    error = (actual64 - reference64).square().mean().sqrt().item()
    scale = reference64.square().mean().sqrt().item()
    tolerance = TOLERANCE[dtype or actual.dtype]
    assert error <= tolerance * max(scale, 1e-12), f"{name}: RMS error {error:.3e} of {scale:.3e}, over {tolerance:.1e}"
