"""The kernels in triton's interpreter: `interpreted.py` in processes of its own, and what holds without triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Case

from condconv import condconv2d
from condconv.ops.triton import ENTRIES, support

ROOT = Path(__file__).resolve().parents[4]
GROUPS = {
    "pointwise and mixing": "test_pointwise or test_offsets or test_mixing or test_batch or test_expert or test_bench",
    "depthwise and dense": "test_depthwise or test_dense or test_options or test_only or test_master or test_nothing",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", GROUPS[group]]
    command.append(str(Path(__file__).with_name("interpreted.py")))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_every_interpreted_test_is_in_one_group() -> None:
    text = Path(__file__).with_name("interpreted.py").read_text()
    tests = [line.split("(")[0][4:] for line in text.splitlines() if line.startswith("def test_")]
    words = [word for expression in GROUPS.values() for word in expression.split(" or ")]
    for test in tests:
        assert sum(word in test for word in words) == 1, test


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_without_a_gpu_the_reason_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = {
        "triton_pointwise": Case(kernel=(1, 1)),
        "triton_depthwise": Case(channels=5, out_channels=5, groups=5),
        "triton_dense": Case(),
    }[name]
    x, routing, weight, _ = made.tensors(torch.float32)
    with pytest.raises(ValueError, match=f"{name}.*CUDA device.*'cpu'"):
        condconv2d(x, routing, weight, groups=made.groups, backend=name)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fp32 = torch.float32
    point, deep = Case(kernel=(1, 1)), Case(channels=5, out_channels=5, groups=5)
    assert "pointwise" in str(support.pointwise(Case().problem(fp32)))
    assert "pointwise" in str(support.pointwise(Case(kernel=(1, 1), padding=(1, 0)).problem(fp32)))
    assert "depthwise" in str(support.depthwise(point.problem(fp32)))
    assert "triton_depthwise" in str(support.dense(deep.problem(fp32)))
    assert "float64" in str(support.pointwise(point.problem(torch.float64)))
    assert "65 experts" in str(support.dense(Case(experts=65).problem(fp32)))
    if importlib.util.find_spec("triton") is not None:
        assert support.pointwise(point.problem(fp32)) is None
        assert support.depthwise(deep.problem(torch.bfloat16)) is None
        assert support.depthwise(deep._replace(kernel=(21, 21), size=(30, 30)).problem(fp32)) is None
        assert support.dense(Case(groups=1).problem(torch.float16)) is None
        too_far = Case().problem(fp32)
        too_far = type(too_far)(**{**too_far.__dict__, "size_HW": (2**15, 2**15)})
        assert "one example" in str(support.dense(too_far))
