"""Each Triton kernel against its bound: `python -m benchmarks.kernels [--dtype bfloat16] [--only pointwise]`.

The bound of a kernel is the longer of two times: bytes (each input read once, each output written once) over the copy
bandwidth measured here, and operations over the matmul rate measured here. Kernels run on the whole batch, out of
cache; whole calls (`forward`, `backward`) run in chunks, as users run them, and their bound leaves out the mixed
kernels altogether. Times are medians over repetitions with the L2 cleared in between.

A time is printed only for what passed its gate: outputs of a batch of 8 against the float64 oracle, and of the timed
batch against the float64 oracle on some of its examples. Writes benchmarks/results/kernels.{json,md}; the exit code is
1 if a gate failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condconv.ops import reference
from condconv.ops.spec import ConvSpec, is_channels_last

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
GATE_BATCH = 8
FULL_CHECK_EXAMPLES = 4


class Layer(NamedTuple):
    """A CondConv layer of a backbone at 224 pixels."""

    network: str
    kind: str
    channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    experts: int = 8
    batch: int = 256

    @property
    def spec(self) -> ConvSpec:
        groups = self.channels if self.kind == "depthwise" else 1
        padding = (self.kernel - 1) // 2
        return ConvSpec((self.stride, self.stride), (padding, padding), (1, 1), groups)

    @property
    def positions(self) -> int:
        height, width = self.spec.output_size((self.size, self.size), (self.kernel, self.kernel))
        return height * width

    @property
    def weights(self) -> int:
        """P: weights of one expert."""
        return self.out_channels * self.channels // self.spec.groups * self.kernel**2

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        shape = f"{self.channels}->{self.out_channels} k{self.kernel}{stride} @{self.size}"
        return f"{self.network} {self.kind} {shape} N={self.batch} E={self.experts}"


LAYERS = [
    Layer("EfficientNet-B0", "pointwise", 192, 1152, 7),
    Layer("EfficientNet-B0", "pointwise", 80, 480, 14),
    Layer("EfficientNet-B0", "pointwise", 320, 1280, 7),
    Layer("EfficientNet-B0", "pointwise", 672, 112, 14),
    Layer("EfficientNet-B0", "depthwise", 1152, 1152, 7, 5),
    Layer("EfficientNet-B0", "depthwise", 480, 480, 14, 3),
    Layer("EfficientNet-B0", "depthwise", 672, 672, 14, 5, 2),
    Layer("MobileNetV1", "pointwise", 512, 512, 14),
    Layer("MobileNetV1", "pointwise", 512, 512, 14, experts=32),
    Layer("ResNet-50", "dense", 128, 128, 28, 3),
    Layer("ResNet-50", "dense", 512, 512, 7, 3),
    Layer("ResNet-50", "dense", 256, 256, 28, 3, 2),
]


class Ceilings(NamedTuple):
    """What this device does at best, measured, in bytes and operations per second."""

    copy_bandwidth: float
    matmul_rate: float


class Work(NamedTuple):
    """One thing to time, and the least that it has to do."""

    name: str
    run: Callable[[], Any]
    num_bytes: int
    operations: int


class Tensors(NamedTuple):
    """A layer's tensors with random content."""

    x: Tensor
    routing: Tensor
    weight: Tensor
    grad_y: Tensor


def measure_ms(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=80, return_mode="median"))


def ceilings(dtype: torch.dtype) -> Ceilings:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_ms = measure_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    matmul_ms = measure_ms(lambda: a @ b)
    return Ceilings(2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / matmul_ms * 1e3)


def draw(layer: Layer, batch: int, dtype: torch.dtype, channels_last: bool, device: str) -> Tensors:
    generator = torch.Generator(device=device).manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = normal(batch, layer.channels, layer.size, layer.size).to(dtype).contiguous(memory_format=memory_format)
    fan_in = layer.channels // layer.spec.groups * layer.kernel**2
    weight = normal(layer.experts, layer.out_channels, layer.channels // layer.spec.groups, layer.kernel, layer.kernel)
    output_PQ = layer.spec.output_size((layer.size, layer.size), (layer.kernel, layer.kernel))
    grad_y = normal(batch, layer.out_channels, *output_PQ).to(dtype).contiguous(memory_format=memory_format)
    return Tensors(x, normal(batch, layer.experts).sigmoid(), weight / fan_in**0.5, grad_y)


def module_of(layer: Layer) -> Any:
    from condconv.ops.triton import dense, depthwise, pointwise

    return {"pointwise": pointwise, "depthwise": depthwise, "dense": dense}[layer.kind]


def variants(layer: Layer) -> list[tuple[str, dict[str, bool], dict[str, bool]]]:
    """Name, options of forward, options of backward."""
    if layer.kind == "pointwise":
        return [("workspace", {}, {}), ("fused", {"fuse_mixing": True}, {"fuse_reduction": True})]
    if layer.kind == "depthwise":
        return [
            (name, {"fuse_mixing": fuse}, {"fuse_mixing": fuse})
            for name, fuse in (("workspace", False), ("fused", True))
        ]
    return [("workspace", {}, {})]


def calls(layer: Layer, t: Tensors) -> list[Work]:
    """Whole forwards and backwards. Experts are read once, in float32, and their gradients written once."""
    module, element = module_of(layer), t.x.element_size()
    activations = (t.x.numel() + t.grad_y.numel()) * element
    experts = t.weight.numel() * 4
    # A depthwise layer does not run on the matrix units, and its bytes bound it.
    operations = 0 if layer.kind == "depthwise" else 2 * t.x.shape[0] * layer.positions * layer.weights
    work = []
    for name, forward_options, backward_options in variants(layer):

        def forward(options: dict[str, bool] = forward_options) -> Tensor:
            return module.forward(t.x, t.routing, t.weight, layer.spec, 0, **options)

        def backward(options: dict[str, bool] = backward_options) -> tuple[Tensor, ...]:
            return module.backward(t.grad_y, t.x, t.routing, t.weight, layer.spec, (True,) * 3, 0, **options)

        work.append(Work(f"forward, {name}", forward, activations + experts, operations))
        work.append(Work(f"backward, {name}", backward, activations + t.x.nbytes + 2 * experts, 2 * operations))
    return work


def single_kernels(layer: Layer, t: Tensors) -> list[Work]:
    """The kernels of the workspace form one by one, the mixed kernels of the whole batch in memory."""
    from condconv.ops.triton import mix, tiles
    from condconv.ops.triton.launch import Geometry, Strides

    batch, experts, element = t.x.shape[0], layer.experts, t.x.element_size()
    weight = tiles.taps_before_channels(t.weight).view(experts, -1)
    kernel = t.x.new_empty(batch, layer.weights)
    grad_weight, grad_routing = torch.empty_like(weight), torch.zeros_like(t.routing)
    mixed_bytes, expert_bytes = kernel.nbytes, weight.nbytes
    mix_operations = 2 * batch * experts * layer.weights
    mix.mix(t.routing, weight.unsqueeze(1), kernel)
    work = [
        Work(
            "mix",
            lambda: mix.mix(t.routing, weight.unsqueeze(1), torch.empty_like(kernel)),
            mixed_bytes + expert_bytes,
            mix_operations,
        ),
        Work(
            "reduce",
            lambda: mix.reduce(t.routing, weight, kernel, grad_routing, grad_weight, False),
            mixed_bytes + 2 * expert_bytes,
            2 * mix_operations,
        ),
    ]
    if layer.kind == "depthwise":
        return work
    channels_last = is_channels_last(t.x)
    strides = Strides.of(t.x.shape, channels_last), Strides.of(t.grad_y.shape, channels_last)
    forward = tiles.Call(layer.spec, Geometry.of(t.x, t.grad_y, layer.kernel, layer.spec), *strides)
    transposed = tiles.Call(layer.spec, Geometry.of(t.grad_y, t.x, layer.kernel, layer.spec), *strides)
    kernels = module_of(layer).KERNELS
    kernel_nKTC = kernel.view(batch, layer.out_channels, layer.kernel**2, layer.channels)
    y, grad_x = torch.empty_like(t.grad_y), torch.empty_like(t.x)
    grad_kernel = torch.empty_like(kernel_nKTC)
    num_bytes = (t.x.numel() + t.grad_y.numel()) * element + mixed_bytes
    operations = 2 * batch * layer.positions * layer.weights
    products: list[tuple[str, Callable[[], Any]]] = [
        ("forward product", lambda: kernels.forward(t.x, kernel_nKTC, y, forward)),
        ("input gradient", lambda: kernels.input_gradient(t.grad_y, kernel_nKTC, grad_x, transposed)),
        ("kernel gradient", lambda: kernels.kernel_gradient(t.grad_y, t.x, grad_kernel, forward)),
    ]
    return work + [Work(name, run, num_bytes, operations) for name, run in products]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if bool(actual.isfinite().all()) else float("inf")


def oracle(t: Tensors, spec: ConvSpec) -> list[Tensor]:
    x, routing, weight = (v.double().requires_grad_() for v in (t.x, t.routing, t.weight))
    y = reference.condconv2d(x, routing, weight, None, spec)
    return [y.detach(), *torch.autograd.grad(y, (x, routing, weight), t.grad_y.double())]


def gate(layer: Layer, small: Tensors, full: Tensors) -> dict[str, float]:
    """Largest relative error of each variant, over all outputs; memory from `torch.empty` is NaN meanwhile."""
    module, expected = module_of(layer), oracle(small, layer.spec)
    chosen = torch.randperm(full.x.shape[0], device=full.x.device)[:FULL_CHECK_EXAMPLES]
    part = Tensors(full.x[chosen], full.routing[chosen], full.weight, full.grad_y[chosen])
    expected_part = oracle(part, layer.spec)[:3]
    torch.use_deterministic_algorithms(True, warn_only=True)
    errors = {}
    for name, forward_options, backward_options in variants(layer):
        worst = 0.0
        for t, wanted, rows in ((small, expected, slice(None)), (full, expected_part, chosen)):
            y = module.forward(t.x, t.routing, t.weight, layer.spec, 0, **forward_options)
            gradients = module.backward(
                t.grad_y, t.x, t.routing, t.weight, layer.spec, (True,) * 3, 0, **backward_options
            )
            outputs = [y[rows], gradients[0][rows], gradients[1][rows], gradients[2]]
            worst = max(worst, *(relative_error(a, e) for a, e in zip(outputs, wanted, strict=False)))
        errors[name] = worst
    torch.use_deterministic_algorithms(False)
    return errors


def measure(
    layer: Layer, dtype: torch.dtype, channels_last: bool, best: Ceilings, device: str = "cuda"
) -> list[dict[str, Any]]:
    small, full = (draw(layer, n, dtype, channels_last, device) for n in (GATE_BATCH, layer.batch))
    errors = gate(layer, small, full)
    rows = []
    for work in single_kernels(layer, full) + calls(layer, full):
        form = work.name.split(", ")[-1]
        error = errors.get(form, errors["workspace"])
        row: dict[str, Any] = {
            "layer": str(layer),
            "kernel": work.name,
            "error": error,
            "correct": error <= TOLERANCE[dtype],
        }
        if row["correct"]:
            bytes_ms = work.num_bytes / best.copy_bandwidth * 1e3
            operations_ms = work.operations / best.matmul_rate * 1e3
            row |= {"ms": measure_ms(work.run), "bound_ms": max(bytes_ms, operations_ms)}
            row |= {"bound_by": "bytes" if bytes_ms >= operations_ms else "operations"}
            row["share_of_bound"] = row["bound_ms"] / row["ms"]
        rows.append(row)
    return rows


def describe(arguments: argparse.Namespace, best: Ceilings) -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": "python -m benchmarks.kernels " + " ".join(sys.argv[1:]),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "dtype": arguments.dtype,
        "layout": arguments.layout,
        "copy_bandwidth_tb_per_s": best.copy_bandwidth / 1e12,
        "matmul_rate_tops_per_s": best.matmul_rate / 1e12,
    }


def markdown(about: dict[str, Any], rows: list[dict[str, Any]], left_out: list[str]) -> str:
    lines = ["# Triton kernels against their bounds", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [
        "| layer | kernel | error | time, ms | bound, ms | bound by | share of bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (
            f"{row['ms']:.3f} | {row['bound_ms']:.3f} | {row['bound_by']} | {row['share_of_bound']:.0%}"
            if row["correct"]
            else "wrong: not timed | | |"
        )
        lines.append(f"| {row['layer']} | {row['kernel']} | {row['error']:.1e} | {figures} |")
    if left_out:
        lines += ["", "Not run, out of time: " + "; ".join(left_out)]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--layout", choices=["channels_last", "contiguous"], default="channels_last")
    parser.add_argument("--only", default="", help="only layers whose name contains this")
    parser.add_argument("--seconds", type=float, default=150, help="start no further layer after this time")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels", help="path of the results without suffix")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device; there is none here, so nothing was measured.", file=sys.stderr)
        return 2
    started, dtype = time.monotonic(), getattr(torch, arguments.dtype)
    best = ceilings(dtype)
    about, rows, left_out = describe(arguments, best), [], []
    for layer in (layer for layer in LAYERS if arguments.only in str(layer)):
        if time.monotonic() - started > arguments.seconds:
            left_out.append(str(layer))
            continue
        rows += measure(layer, dtype, arguments.layout == "channels_last", best)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(about, rows, left_out)
    arguments.output.with_suffix(".md").write_text(text)
    arguments.output.with_suffix(".json").write_text(
        json.dumps({**about, "rows": rows, "left_out": left_out}, indent=1)
    )
    print(text)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
