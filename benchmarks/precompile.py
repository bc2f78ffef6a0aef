"""Compile the Triton kernels of whole networks on all CPU cores, before a GPU waits for them one after another.

    python -m benchmarks.precompile --backbones efficientnet_b0 --batch 256 --dtype bfloat16 --weight-dtype float32

The launchers themselves run, on CPU tensors and with a driver that only names its target, so what is compiled is what a
training step of that batch asks for: every tile candidate, in triton's cache on disk. No GPU is used.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import replace
from typing import Any

import torch

from condconv.ops.spec import Problem
from models import list_backbones

HOPPER = 90


def compile_only(compiled: list[Any], capability: int = HOPPER, every_candidate: bool = True) -> None:
    """From now on, in this process, launching means compiling.

    Args:
        compiled: gets (function, arguments, options, compiled kernel) of every launch.
        capability: of the GPU in question, 90 for Hopper.
        every_candidate: all tile candidates, or the first alone.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    class SilentDriver:
        """A GPU in name only."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(SilentDriver())
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self, args, options, kernel))
        return kernel

    def walk(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        candidates = self.prune_configs(options)
        for config in candidates if every_candidate else candidates[:1]:
            self.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_instead, walk


def compile_layer(problem: Problem, workspace_bytes: int) -> int:
    """Compile what a layer's forward and backward launch; returns the number of kernels."""
    from condconv.ops.triton import dense, depthwise, pointwise

    before = len(_compiled)
    format_ = torch.channels_last if problem.channels_last else torch.contiguous_format
    x = torch.zeros(problem.batch, problem.in_channels, *problem.size_HW, dtype=problem.dtype)
    x = x.contiguous(memory_format=format_)
    kernel = (problem.out_channels, problem.in_channels // problem.spec.groups, *problem.kernel_RS)
    weight = torch.zeros(problem.experts, *kernel, dtype=problem.weight_dtype)
    routing = torch.zeros(problem.batch, problem.experts)
    if problem.spec.groups == 1 and problem.spec.is_pointwise(problem.kernel_RS):
        module: Any = pointwise
    else:
        module = depthwise if problem.is_depthwise else dense
    y = module.forward(x, routing, weight, problem.spec, workspace_bytes)
    module.backward(y, x, routing, weight, problem.spec, (True, True, True), workspace_bytes)
    return len({kernel.hash for *_, kernel in _compiled[before:]})


_compiled: list[Any] = []
"""By this process of the pool."""


def _start_process() -> None:
    torch.set_num_threads(1)
    compile_only(_compiled)


def main(arguments: list[str] | None = None) -> None:
    """Compiles in one process per core."""
    from benchmarks.layers import shapes_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list_backbones(), metavar="NAME", default=["efficientnet_b0"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--weight-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--l2-mib", type=int, default=50, help="of the GPU: half of it is the workspace")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    shapes = {shape for name in args.backbones for shape in shapes_of(name, args.image_size, args.experts)}
    problems = {
        replace(
            shape.problem, batch=args.batch, dtype=getattr(torch, args.dtype), training=True,
            weight_dtype=getattr(torch, args.weight_dtype),
        )
        for shape in shapes
    }  # fmt: skip
    workspace_bytes = (args.l2_mib << 20) // 2
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _start_process) as pool:
        counts = pool.starmap(compile_layer, [(problem, workspace_bytes) for problem in problems], chunksize=1)
    print(f"{len(problems)} layers, {sum(counts)} kernels in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
