"""The peak of a run is its own, and freed memory of a CPU step serves the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import memory
from configs.memory import PeakMemory

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
FAULTS = """
import resource
import torch
from configs.memory import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 2**20)  # 64 MiB: above every threshold that glibc reaches by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
assert keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="glibc without a GPU only")
def test_large_tensors_reuse_pages() -> None:
    """In a process of its own, as the setting lasts."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < 0.25 * plain, "of the page faults of glibc's defaults"


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory is meant here, also where an earlier test has used a GPU."""
    monkeypatch.setattr(memory, "_uses_cuda", lambda: False)


@LINUX
def test_the_peak_is_at_least_what_is_resident() -> None:
    peak_memory = PeakMemory()
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])  # touched, so that it is resident
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    kind, peak = peak_memory.read()
    assert peak is not None and 200 < 0.99 * resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20 <= peak
    assert kind == "peak resident memory of the process"


@LINUX
def test_a_run_does_not_inherit_the_peak_of_the_run_before() -> None:
    """A sweep's jobs share a process."""
    before = PeakMemory()
    block = bytearray(400 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    del block
    large, small = before.read()[1], PeakMemory().read()[1]
    assert large is not None and small is not None
    assert small < large - 300


def test_a_system_that_cannot_forget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "runs before in the same process included" in PeakMemory().read()[0]
