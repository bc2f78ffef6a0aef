"""Which problems the Triton kernels can run. Imports no triton: the registry asks before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from condconv.ops.spec import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 64
MAX_OFFSET = 2**31 - 2**20
"""Offsets inside one example or one expert are 32-bit (with room for a tile past the end), those across them 64-bit."""
MIN_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether triton interprets its kernels on the CPU; it reads the variable when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with torch on Linux; else: pip install triton)"
    return None


@lru_cache(maxsize=1)
def _no_device() -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the Triton kernels need compute capability {MIN_CAPABILITY}, this GPU has {capability}"
    return None


def _common(problem: Problem) -> str | None:
    if problem.device != "cuda" and not interpreted():
        return f"Triton kernels need a CUDA device and the input is on {problem.device!r}"
    missing = _no_triton() or (_no_device() if problem.device == "cuda" else None)
    if missing is not None:
        return missing
    for what, dtype in (("input", problem.dtype), ("weight", problem.weight_dtype)):
        if dtype not in DTYPES:
            return f"the {what} is {dtype} and the Triton kernels know float32, bfloat16 and float16"
    if problem.experts > MAX_EXPERTS:
        return f"{problem.experts} experts, and the Triton kernels hold at most {MAX_EXPERTS} at a time"
    height, width = problem.size_HW
    input_size, output_size = problem.in_channels * height * width, problem.out_channels * problem.positions
    kernel_size = problem.out_channels * problem.in_channels * problem.kernel_RS[0] * problem.kernel_RS[1]
    if max(input_size, output_size, kernel_size // problem.spec.groups) > MAX_OFFSET:
        return f"one example or one expert has more than {MAX_OFFSET} elements"
    return None


def pointwise(problem: Problem) -> str | None:
    """1x1 kernels without padding and groups, any stride."""
    if not problem.spec.is_pointwise(problem.kernel_RS) or problem.spec.groups != 1:
        return "not a pointwise layer (1x1 kernel, no padding, one group)"
    return _common(problem)


def depthwise(problem: Problem) -> str | None:
    """One output channel per input channel, any kernel, stride, padding and dilation."""
    if not problem.is_depthwise:
        return "not a depthwise layer with as many output as input channels"
    return _common(problem)


def dense(problem: Problem) -> str | None:
    """Any kernel and any groups but pointwise and depthwise; groups of few channels waste most of each tile."""
    if problem.spec.groups == 1 and problem.spec.is_pointwise(problem.kernel_RS):
        return "a pointwise layer has one tap: use backend='triton_pointwise'"
    if problem.is_depthwise and problem.in_channels > 1:
        return "a depthwise layer has no matrix product: use backend='triton_depthwise'"
    return _common(problem)
