"""Compiling a network's kernels ahead of a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_fills_the_cache_of_triton(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.precompile", "--backbones", "mobilenet_v1", "--image-size", "32"]
    done = subprocess.run([*command, "--batch", "4"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    layers, kernels = map(int, re.findall(r"(\d+) layers, (\d+) kernels", done.stdout)[0])
    compiled = len(list(tmp_path.rglob("*.cubin")))
    assert layers > 0
    assert 0 < compiled <= kernels
