"""Times the backends on layers of EfficientNet-B0, beside the static convolution, after comparing each with the oracle.

    make bench
    python -m benchmarks.backends --pixels 224 --batch 16 --experts 8 --dtype bfloat16 --device cuda

A row is one layer, a column one backend; a cell is the median time of a training step (forward and all gradients) as a
multiple of the static convolution's, measured in turns in the same run. "refused": not for this backend.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv import condconv2d
from condconv.ops.choice import choose
from condconv.ops.registry import BACKENDS
from condconv.ops.spec import ConvSpec, Problem

# RMS(error) / RMS(reference); a backend beyond it is not timed.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layer(NamedTuple):
    """A convolution with padding k // 2; `reduction` is the stride of its input against the image."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    groups: int
    reduction: int


LAYERS = (
    Layer("expand 1x1, stage 5", 112, 672, 1, 1, 16),
    Layer("depthwise 5x5, stage 5", 672, 672, 5, 672, 16),
    Layer("project 1x1, stage 5", 672, 112, 1, 1, 16),
    Layer("expand 1x1, stage 6", 192, 1152, 1, 1, 32),
    Layer("depthwise 5x5, stage 6", 1152, 1152, 5, 1152, 32),
    Layer("project 1x1, stage 6", 1152, 192, 1, 1, 32),
    Layer("dense 3x3", 192, 192, 3, 1, 32),
)


def inputs_of(layer: Layer, args: argparse.Namespace) -> list[Tensor]:
    """x, routing weights and expert weights on the device, each asking for its gradient."""
    size = max(1, args.pixels // layer.reduction)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = torch.randn(args.batch, layer.in_channels, size, size, **options)
    x = x.to(memory_format=torch.channels_last)
    routing = torch.rand(args.batch, args.experts, device=args.device)
    fan_in = layer.in_channels // layer.groups * layer.kernel**2
    kernel = (args.experts, layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
    weight = torch.randn(kernel, **options) / fan_in**0.5
    return [t.requires_grad_() for t in (x, routing, weight)]


def conditional(layer: Layer, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Output and the three gradients of the sum of its squares."""
    x, routing, weight = inputs
    y = condconv2d(x, routing, weight, padding=layer.kernel // 2, groups=layer.groups, backend=backend)
    return [y, *torch.autograd.grad(y, inputs, y.detach())]


def static(layer: Layer, inputs: list[Tensor]) -> list[Tensor]:
    """The same for one kernel of the layer, the same for all examples."""
    x, kernel = inputs[0], inputs[2].detach()[0].clone().requires_grad_()
    y = F.conv2d(x, kernel, padding=layer.kernel // 2, groups=layer.groups)
    return [y, *torch.autograd.grad(y, [x, kernel], y.detach())]


def error(layer: Layer, inputs: list[Tensor], backend: str) -> float:
    """The largest RMS(error) / RMS(reference) of output and gradients, against the oracle in float64, on 3 examples."""
    few = [t.detach()[:3] if i < 2 else t.detach() for i, t in enumerate(inputs)]
    actual = conditional(layer, [t.clone().requires_grad_() for t in few], backend)
    expected = conditional(layer, [t.double().requires_grad_() for t in few], "reference")
    return max(float(((a - e).norm() / e.norm()).detach()) for a, e in zip(actual, expected, strict=True))


def median_times_ms(functions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median time of each function; they take turns, so that a disturbance of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def row(layer: Layer, names: list[str], args: argparse.Namespace) -> str:
    """One line of the table: correctness first, then times."""
    inputs = inputs_of(layer, args)
    spec = ConvSpec(padding=(layer.kernel // 2,) * 2, groups=layer.groups)
    problem = Problem.of(inputs[0], inputs[2], spec, training=True)
    cells = dict.fromkeys(names, "refused")
    timed: dict[str, Callable[[], object]] = {"static": lambda: static(layer, inputs)}
    for name in names:
        if BACKENDS[name].supports(problem) is None:
            off = error(layer, inputs, name)
            if not off <= TOLERANCE[inputs[0].dtype]:
                sys.exit(f"{name} is wrong on {layer.name}: error {off:.1e}; nothing is timed")
            timed[name] = lambda name=name: conditional(layer, inputs, name)
    times = median_times_ms(timed, args.repeats, args.device)
    cells |= {name: f"{times[name] / times['static']:.2f}" for name in names if name in times}
    size = max(1, args.pixels // layer.reduction)
    head = [layer.name, f"{size}x{size}", f"{times['static']:.2f}"]
    return f"| {' | '.join([*head, *cells.values(), choose(problem).backend])} |"


def setup(args: argparse.Namespace) -> str:
    """Everything that a table must say about its origin."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    on_cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if args.device == "cuda" else on_cpu
    return (
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {device}; batch {args.batch}, {args.pixels} pixels, "
        f"{args.experts} experts, {args.dtype}, channels last; median of {args.repeats}"
    )


def main() -> None:
    """Prints the table in Markdown, ready for docs/experiments.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=32, help="image size (32)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (64)")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device here")
    torch.manual_seed(0)
    # Interpreted on a CPU, Triton kernels would be timed as what they are not.
    names = [name for name in BACKENDS if args.device == "cuda" or not name.startswith("triton")]
    print(f"Command: python -m benchmarks.backends {' '.join(sys.argv[1:])}\nSetup: {setup(args)}\n")
    print(f"| layer | map | static, ms | {' | '.join(names)} | auto |\n|---|---|---:|{'---:|' * len(names)}---|")
    for layer in LAYERS:
        print(row(layer, names, args), flush=True)


if __name__ == "__main__":
    main()
