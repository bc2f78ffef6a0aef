"""Compiles the Triton kernels for an H100 (sm_90) without a GPU, and prints what they cost, a JSON line for each.

The launchers themselves run, on CPU tensors and with a driver that only names its target: so signatures,
specialisations of the arguments and constants are the real ones. Nothing is launched and results are meaningless.
`python ahead_of_time.py [full]`: quick compiles bfloat16, channels last, the first tile candidate; full every dtype
and layout and all candidates.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.precompile import compile_only
from condconv.ops.spec import ConvSpec
from condconv.ops.triton import dense, depthwise, pointwise


class Layer(NamedTuple):
    """A layer of a real network, and the options of its call."""

    module: Any
    channels: int
    size: int
    out_channels: int
    kernel: int
    spec: ConvSpec
    forward_options: dict[str, bool]
    backward_options: dict[str, bool]


BOTH = {"fuse_mixing": True}
LAYERS = [
    Layer(pointwise, 192, 7, 1152, 1, ConvSpec(), {}, {}),
    Layer(pointwise, 256, 14, 512, 1, ConvSpec((2, 2)), BOTH, {"fuse_reduction": True}),
    Layer(depthwise, 1152, 7, 1152, 5, ConvSpec((1, 1), (2, 2), groups=1152), {}, {}),
    Layer(depthwise, 240, 56, 240, 3, ConvSpec((2, 2), (1, 1), groups=240), BOTH, BOTH),
    Layer(dense, 128, 14, 128, 3, ConvSpec((1, 1), (1, 1)), {}, {}),
]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (which is where spilled registers go) of a thread, read off the machine code."""
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack_bytes": int(found[2])} if found else {}


def describe(kernel_function: Any, arguments: Any, options: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """What one compiled kernel costs."""
    ptx = kernel.asm["ptx"]
    return {
        "kernel": f"{kernel_function.fn.__module__.rsplit('.', 1)[1]}.{kernel_function.__name__}",
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "dtypes": sorted({str(a.dtype)[6:] for a in arguments if isinstance(a, torch.Tensor)}),
        "constants": {name: value for name, value in options.items() if name.isupper()},
        "warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "cubin_bytes": len(kernel.asm["cubin"]),
        **resources(kernel.asm["cubin"]),
        "instructions": {name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async", ".v4")},
    }


def main(full: bool) -> None:
    compiled: list[Any] = []
    compile_only(compiled, every_candidate=full)
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if full else [torch.bfloat16]
    for layer, dtype, channels_last in itertools.product(LAYERS, dtypes, [True, False] if full else [True]):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.zeros(4, layer.channels, layer.size, layer.size, dtype=dtype).contiguous(memory_format=memory_format)
        shape = (8, layer.out_channels, layer.channels // layer.spec.groups, layer.kernel, layer.kernel)
        weight, routing = torch.zeros(shape), torch.zeros(4, 8)
        y = layer.module.forward(x, routing, weight, layer.spec, 0, **layer.forward_options)
        layer.module.backward(y, x, routing, weight, layer.spec, (True,) * 3, 0, **layer.backward_options)
    distinct = {launch[-1].hash: launch for launch in compiled}
    for launch in distinct.values():
        print(json.dumps(describe(*launch)), flush=True)


if __name__ == "__main__":
    main("full" in sys.argv[1:])
