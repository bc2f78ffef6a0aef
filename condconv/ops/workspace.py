"""Memory that the CPU backends use again from call to call: mixed kernels, products, decoded experts."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Workspace(threading.local):
    """One buffer per thread, dtype and use, kept between calls.

    Fresh memory of this size costs more in page faults than the work that is done in it.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, str], Tensor] = {}

    def get(self, numel: int, like: Tensor, use: str) -> Tensor:
        """A flat uninitialised tensor of `numel` elements. On a GPU the caching allocator does this, per stream."""
        if like.device.type != "cpu":
            return like.new_empty(numel)
        key = (like.dtype, use)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            # A buffer made in inference mode (validation) could not be written to in the next training step.
            with torch.inference_mode(False):
                buffer = self.buffers[key] = torch.empty(numel, dtype=like.dtype)
        return buffer[:numel]


workspace = _Workspace()
"""The one that all backends use."""
