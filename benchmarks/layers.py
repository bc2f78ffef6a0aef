"""Every CondConv layer shape of every backbone: all backends beside the static convolution, timm's layer, the loop.

    python -m benchmarks.layers
    python -m benchmarks.layers --backbones resnet50 --batch-sizes 1 64 --dtypes bfloat16 --image-size 224 --device cuda

A row is one shape, a cell the median time over that of a static `nn.Conv2d` (`nn.Linear` for a linear layer) of the
same shape, all measured in turns in the same run. "auto" names what `backend="auto"` takes. "bound" is the least time
by bytes or operations (`benchmarks/bounds.py`). What is not within tolerance of the float64 oracle gets no time. An
interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gates, layer_tables, plots
from benchmarks.bounds import Rates, bound_ms, measure_rates
from benchmarks.layer_tables import LOOP, STATIC, TIMM
from benchmarks.peers import PeerMissing, timm_condconv2d
from benchmarks.report import Report, Row, add_common_options, output_folder
from benchmarks.timing import failure, time_in_turns, use_processor_time
from condconv import CondLinear, condconv2d
from condconv.ops.choice import choose
from condconv.ops.registry import BACKENDS, REFERENCE
from condconv.ops.spec import Problem
from condconv.tuning import layer_problems
from models import create_model, list_backbones

BUDGET_S = {False: 0.5, True: 0.05}
"""Seconds of timed rounds for one row, by --quick."""


class Shape(NamedTuple):
    """One layer to be measured; `linear` tells it from a 1x1 convolution."""

    problem: Problem
    linear: bool

    def __str__(self) -> str:
        p = self.problem
        if self.linear:
            return f"{p.in_channels} -> {p.out_channels} linear"
        kind = "depthwise " if p.is_depthwise else f"groups={p.spec.groups} " if p.spec.groups > 1 else ""
        stride = f" stride {p.spec.stride[0]}" if p.spec.stride != (1, 1) else ""
        kernel, size = "x".join(map(str, p.kernel_RS)), "x".join(map(str, p.size_HW))
        return f"{p.in_channels} -> {p.out_channels} {kind}{kernel}{stride} on {size}"


def shapes_of(backbone: str, image_size: int, experts: int) -> Counter[Shape]:
    """The CondConv layers of a network in channels last, and how often each occurs. Found by running it once."""
    network = create_model(backbone, experts=experts).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, image_size, image_size).to(memory_format=torch.channels_last)
    found = layer_problems(network, images)
    return Counter(Shape(problem, isinstance(network.get_submodule(name), CondLinear)) for name, problem in found)


def inputs_of(problem: Problem) -> list[Tensor]:
    """x, routing weights and expert weights as the problem says."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.batch, problem.in_channels, *problem.size_HW, generator=generator)
    kernel = (problem.out_channels, problem.in_channels // problem.spec.groups, *problem.kernel_RS)
    weight = torch.randn(problem.experts, *kernel, generator=generator) / (kernel[1] * kernel[2] * kernel[3]) ** 0.5
    routing = torch.rand(problem.batch, problem.experts, generator=generator)
    format_ = torch.channels_last if problem.channels_last else torch.contiguous_format
    return [
        x.to(problem.device, problem.dtype).contiguous(memory_format=format_),
        routing.to(problem.device),
        weight.to(problem.device, problem.weight_dtype),
    ]


def conditional(shape: Shape, backend: str) -> Callable[..., Tensor]:
    """(x, routing, weight) -> y by one of our backends."""
    spec = shape.problem.spec
    return lambda x, routing, weight: condconv2d(x, routing, weight, None, *spec, backend)


def timm_layer(shape: Shape) -> Callable[..., Tensor]:
    """(x, routing, weight) -> y by timm's layer, which gets our weights as its parameter."""
    p = shape.problem
    layer = timm_condconv2d(
        p.in_channels, p.out_channels, p.kernel_RS, p.spec.stride, p.spec.padding, p.spec.dilation, p.spec.groups,
        False, p.experts,
    )  # fmt: skip
    del layer.weight

    def run(x: Tensor, routing: Tensor, weight: Tensor) -> Tensor:
        layer.weight = weight.flatten(1)
        y: Tensor = layer(x, routing.to(weight.dtype))
        return y

    return run


def static_layer(shape: Shape) -> Callable[..., Tensor]:
    """(x, kernel) -> y by torch."""
    if shape.linear:
        return lambda x, kernel: F.linear(x.flatten(1), kernel.flatten(1))[:, :, None, None]
    return lambda x, kernel: F.conv2d(x, kernel, None, *shape.problem.spec)


def gate(problem: Problem, contender: Callable[..., Tensor], inputs: list[Tensor], oracle: dict[str, Tensor]) -> float:
    """The error of output and gradients on a few examples of the whole batch, against the oracle's.

    Raises:
        GateFailure: it is over the tolerance of the dtype.
    """
    few = gates.few_of(problem.batch)
    leaves = [tensor.clone().requires_grad_(problem.training) for tensor in inputs]
    y = contender(*leaves)
    actual = {"y": y.detach()[few]}
    if problem.training:
        gradients = torch.autograd.grad(y, leaves, gates.sparse_cotangent(y, few))
        actual |= {"dx": gradients[0][few], "drouting": gradients[1][few], "dweight": gradients[2]}
    return gates.check(actual, oracle, gates.TOLERANCE[problem.dtype])


def oracle_of(shape: Shape, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients of a few examples by the loop in float64."""
    few = gates.few_of(shape.problem.batch)
    x, routing, weight = (tensor.double() for tensor in inputs)
    leaves = [tensor.requires_grad_(shape.problem.training) for tensor in (x[few], routing[few], weight)]
    y = conditional(shape, REFERENCE)(*leaves)
    found = {"y": y.detach()}
    if shape.problem.training:
        # Rounded like the gradient that is given in the dtype of the problem.
        grad_y = gates.sparse_cotangent(y, list(range(len(few)))).to(shape.problem.dtype).double()
        found |= dict(zip(("dx", "drouting", "dweight"), torch.autograd.grad(y, leaves, grad_y), strict=True))
    return found


def workload(function: Callable[..., Tensor], inputs: list[Tensor], training: bool) -> Callable[[], object]:
    """A forward pass, with all gradients when training."""
    if not training:

        def inference() -> object:
            with torch.inference_mode():
                return function(*inputs)

        return inference
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        grad_y = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad_y)


def measure(shape: Shape, budget_s: float) -> Row:
    """Gate and time all contenders for one shape."""
    problem, notes = shape.problem, {}
    inputs = inputs_of(problem)
    oracle = oracle_of(shape, inputs)
    contenders: dict[str, Callable[..., Tensor]] = {LOOP: conditional(shape, REFERENCE)}
    for name, backend in BACKENDS.items():
        if backend.supports(problem) is None:
            contenders[name] = conditional(shape, name)
    try:
        contenders[TIMM] = timm_layer(shape)
    except PeerMissing as error:
        notes[TIMM] = str(error)
    kernel = [inputs[0], inputs[2][0].clone()]
    timed = {STATIC: workload(static_layer(shape), kernel, problem.training)}
    errors: dict[str, float] = {}
    for name, contender in contenders.items():
        try:
            errors[name] = gate(problem, contender, inputs, oracle)
            timed[name] = workload(contender, inputs, problem.training)
        except (RuntimeError, ValueError, MemoryError) as error:
            notes[name] = failure(error)
    times, failed = time_in_turns(timed, problem.device, budget_s)
    return {
        "times": {name: timing.as_json() for name, timing in times.items()},
        "errors": errors,
        "notes": notes | failed,
        "auto": choose(problem).backend,
    }


def cases(args: argparse.Namespace, rates: Rates, report: Report) -> list[tuple[str, Callable[[], Row]]]:
    """One case for each distinct shape, dtype, batch size and mode."""
    usage: dict[Shape, dict[str, int]] = {}
    for backbone in args.backbones:
        for shape, count in shapes_of(backbone, args.image_size, args.experts).items():
            usage.setdefault(shape, {})[backbone] = count
    found: list[tuple[str, Callable[[], Row]]] = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        for mode, batch in [(m, b) for b in args.batch_sizes for m in args.modes or default_modes(b)]:
            for shape, backbones in usage.items():
                problem = replace(
                    shape.problem, batch=batch, dtype=dtype, weight_dtype=dtype, device=args.device,
                    training=mode == "training",
                )  # fmt: skip
                this = shape._replace(problem=problem)
                key = {
                    "shape": str(this), "mode": mode, "batch": batch, "dtype": dtype_name, "experts": args.experts,
                    "image_size": args.image_size,
                }  # fmt: skip
                row_id = ", ".join(f"{name} {value}" for name, value in key.items())
                known = report.known(row_id)
                if known is not None:
                    known["backbones"] |= backbones
                facts = {**key, "backbones": backbones, "bound_ms": bound_ms(problem, rates)}

                def run(this: Shape = this, facts: Row = facts) -> Row:
                    try:
                        return facts | measure(this, BUDGET_S[args.quick])
                    except (RuntimeError, ValueError, MemoryError) as error:
                        return facts | {"error": failure(error)}

                found.append((row_id, run))
    return found


def default_modes(batch: int) -> list[str]:
    return ["training"] if batch > 1 else ["inference"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list_backbones(), metavar="NAME", help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="1 16 on a CPU, 1 256 on CUDA")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--modes", nargs="+", choices=["training", "inference"], help="default: inference at batch 1, training above"
    )
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread on the CPU, for a machine that others use too"
    )
    add_common_options(parser)
    args = parser.parse_args(arguments)
    on_cuda = args.device == "cuda"
    if args.processor_time and on_cuda:
        parser.error("--processor-time is for the CPU: use --device cpu")
    args.backbones = args.backbones or (["efficientnet_b0"] if args.quick else list(list_backbones()))
    args.batch_sizes = args.batch_sizes or ([3] if args.quick else [1, 256] if on_cuda else [1, 16])
    args.dtypes = args.dtypes or (["bfloat16"] if on_cuda else ["float32"])
    args.image_size = args.image_size or (32 if args.quick else 224)
    return args


def completed_rates(known: dict[str, Any] | None, device: str, dtypes: list[str]) -> dict[str, Any]:
    """The rates of the table's first run, by which its rows are judged, and those of data types that are new."""
    measured = known["madds_per_s"] if known else {}
    missing = [getattr(torch, name) for name in dtypes if f"torch.{name}" not in measured]
    if known is not None and not missing:
        return known
    new = measure_rates(device, missing).as_json()
    return new if known is None else {**known, "madds_per_s": {**known["madds_per_s"], **new["madds_per_s"]}}


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes JSON, Markdown and plots."""
    args = parse(arguments)
    gates.exact_float32()
    folder = output_folder(args)
    if args.processor_time:
        torch.set_num_threads(1)
        use_processor_time()
    facts = {"clock": "processor" if args.processor_time else "wall"}
    report = Report("layers", args.device, folder, layer_tables.render, args.fresh, facts)
    report.origin["rates"] = completed_rates(report.origin.get("rates"), args.device, args.dtypes)
    report.run(cases(args, Rates(**report.origin["rates"]), report), layer_tables.line)
    for (image_size, dtype, batch, experts, mode), group in layer_tables.groups_of(report.rows).items():
        title = f"CondConv layers, {mode}, batch {batch}, {image_size} px, E={experts}, {dtype}"
        path = report.path.with_name(f"{report.path.stem}-{mode}-{batch}-{image_size}px-E{experts}-{dtype}.svg")
        totals = layer_tables.totals(group)
        if totals:
            plots.bars(path, title, totals)
    print(report.path.with_suffix(".md"))


if __name__ == "__main__":
    main()
