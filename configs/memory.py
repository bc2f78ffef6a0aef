"""Memory of this process: what a run's peak is, and how freed memory serves the next step on a CPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

# <malloc.h> of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """On a machine without a GPU, let the C library keep freed blocks of every size; returns whether it will.

    By default glibc maps each large tensor anew and unmaps it when it dies, so every step pays a page fault for each
    4 KiB of its activations: a quarter to a third of a CPU step of a small network (docs/experiments.md). The process
    then holds its peak memory until it ends. Without glibc (musl, macOS, Windows) nothing happens.
    """
    import torch

    if torch.cuda.is_available():
        return False
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_THRESHOLD, 2**30) and libc.mallopt(_TRIM_THRESHOLD, _LARGEST))


class PeakMemory:
    """The peak of this process from here on, where the system can forget the peak of earlier runs (Linux, CUDA).

    What earlier runs of a sweep freed is given back to the system first.
    """

    def __init__(self) -> None:
        gc.collect()
        libc = _glibc()
        if libc is not None:
            libc.malloc_trim(0)
        self._kind = "peak resident memory of the process"
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: forget VmHWM
        except OSError:
            self._kind += ", runs before in the same process included"
        if _uses_cuda():
            import torch

            torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[str, float | None]:
        """What is measured and how much, in MB (2^20 bytes): PyTorch's CUDA allocator, or resident memory."""
        if _uses_cuda():
            import torch

            return "CUDA allocator peak", torch.cuda.max_memory_allocated() / 2**20
        try:
            # Not getrusage: a process inherits the peak of the one that started it.
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peak_kb = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
            return self._kind, int(peak_kb) / 1024
        except (OSError, StopIteration, ValueError):
            return "unknown", None


def _uses_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _glibc() -> Any:
    """The process's C library if it is glibc: another's mallopt has other numbers."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: no None on Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
