"""float64 for statistics and sums, wherever a tensor is: Apple's GPUs (MPS) do not have it."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type != "mps"


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64: where it is if that device has float64, else on the CPU."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def widest(x: Tensor) -> Tensor:
    """`x` where it is, so that nobody waits for a copy: in float64 if that device has it, else in float32."""
    return x.to(torch.float64 if has_float64(x.device) else torch.float32)
