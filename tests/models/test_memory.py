"""Freed memory stays with the process: a step after the first costs no page faults for its large tensors."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from models.memory import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16, 2**20)  # 64 MiB: above every threshold that glibc reaches by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
assert keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_tensors_reuse_pages() -> None:
    """In a process of its own, as the setting lasts."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    page = resource.getpagesize()
    assert kept * page < 2**20, (plain, kept)
    assert kept < plain
