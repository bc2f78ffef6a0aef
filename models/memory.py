"""Memory of CPU training: what a step freed serves the next one instead of going back to the system."""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of every size for this process; returns whether it understood.

    By default glibc maps each large tensor anew and unmaps it when it dies, so every step pays a page fault for each
    4 KiB of its activations: a quarter to a third of a CPU step of a small network (docs/experiments.md). The process
    then holds its peak memory until it ends. Elsewhere than with glibc (musl, macOS, Windows) nothing happens.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  another C library's mallopt has other numbers
        return bool(libc.mallopt(_MMAP_THRESHOLD, 2**30) and libc.mallopt(_TRIM_THRESHOLD, _LARGEST))
    except (AttributeError, OSError, TypeError):  # TypeError: no None on Windows
        return False
