"""Experts in bfloat16 and in 8 bits: size, latency at batch 1, change of the output and of the accuracy.

    python -m benchmarks.expert_dtype
    python -m benchmarks.expert_dtype --ckpt outputs/.../checkpoints/last.ckpt      # accuracy on the run's own data

EfficientNet-B0 with 8 experts at 224 pixels, on one CPU thread by default. Latencies are processor time of the
process, in turns: other work on the machine disturbs it less than wall time. A compressed network is only timed when it
computes what its own experts say, converted back to float32.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from benchmarks.report import ROOT, Report, Row, add_common_options, output_folder
from condconv import compress_experts
from condconv.compress import CompressedLayer
from condconv.routing import Router
from models import create_model

STATIC, FP32 = "static", "fp32"
COMPRESSED = ("bf16", "int8")
EXPERTS, ROUTER_GAIN, IMAGES, TOLERANCE = 8, 4.0, 8, 1e-4


def networks() -> dict[str, nn.Module]:
    """The static network, ours, and ours with compressed experts, of the same values."""
    made: dict[str, nn.Module] = {}
    for name, experts in ((STATIC, 0), (FP32, EXPERTS)):
        torch.manual_seed(0)
        made[name] = create_model("efficientnet_b0", experts=experts).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():  # fresh routers answer 0.5 for every image
        for router in (module for module in made[FP32].modules() if isinstance(module, Router)):
            for parameter in router.parameters():
                parameter.mul_(ROUTER_GAIN)
    return made | {dtype: compress_experts(copy.deepcopy(made[FP32]), dtype) for dtype in COMPRESSED}


def size_mb(network: nn.Module) -> float:
    """Parameters and buffers in MB of 10^6 bytes."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def difference(actual: Tensor, reference: Tensor) -> float:
    """Largest error over the largest value."""
    return float((actual - reference).abs().max() / reference.abs().max())


def error_of_arithmetic(compressed: nn.Module, plain: nn.Module, x: Tensor) -> float:
    """How far a network is from one with the same experts in float32: rounding, or a mistake."""
    decoded = copy.deepcopy(plain)
    with torch.no_grad():
        for name, layer in compressed.named_modules():
            if isinstance(layer, CompressedLayer):
                decoded.get_submodule(name).weight.copy_(layer.dequantized())  # type: ignore[operator]
        return difference(compressed(x), decoded(x))


def latencies_ms(made: dict[str, nn.Module], x: Tensor, budget_s: float) -> dict[str, list[float]]:
    """Processor time of a forward of one image, in turns."""
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.inference_mode():
        for network in made.values():
            network(x)
        end = time.monotonic() + budget_s
        while time.monotonic() < end or len(times[FP32]) < 3:
            for name, network in made.items():
                start = time.process_time()
                network(x)
                times[name].append(1e3 * (time.process_time() - start))
    return times


def measure_networks(image_size: int, budget_s: float) -> dict[str, Row]:
    """One row for each of the four networks."""
    made = networks()
    torch.manual_seed(1)
    images = torch.randn(IMAGES, 3, image_size, image_size).to(memory_format=torch.channels_last)
    rows: dict[str, Row] = {name: {"size_mb": size_mb(network)} for name, network in made.items()}
    with torch.inference_mode():
        reference = torch.cat([made[FP32](image[None]) for image in images])
        for dtype in COMPRESSED:
            output = torch.cat([made[dtype](image[None]) for image in images])
            rows[dtype]["difference"] = difference(output, reference)
    for dtype in COMPRESSED:
        error = error_of_arithmetic(made[dtype], made[FP32], images[:1])
        rows[dtype]["error"] = error
        if not error < TOLERANCE:
            del made[dtype]
    for name, times in latencies_ms(made, images[:1], budget_s).items():
        rows[name] |= {"median_ms": statistics.median(times), "min_ms": min(times), "rounds": len(times)}
    return rows


def accuracy(ckpt: Path, dtype: str) -> Row:
    """Top-1 of a run on its own data by eval.py."""
    from eval import evaluate  # brings the whole training stack, which latencies do not need

    override = "null" if dtype == FP32 else dtype
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("eval", [f"ckpt={ckpt.resolve()}", f"expert_dtype={override}", "trainer=cpu"])
    figures = evaluate(cfg)
    return {"top1": figures["top1"], "loss": figures["loss"], "run": ckpt.name}


def render(rows: list[Row]) -> str:
    """Markdown: one line per network, then accuracies."""
    head = "| network | MB | CPU ms, batch 1: median (fastest) | over fp32 | output against fp32 | arithmetic |"
    lines = ["", "EfficientNet-B0, 8 experts. Processor time; differences are largest error over largest value.", ""]
    lines += [head, "|" + "---|" * 6]
    timed = {row["id"]: row for row in rows if "size_mb" in row}
    for name, row in timed.items():
        ms = f"{row['median_ms']:.1f} ({row['min_ms']:.1f})" if "median_ms" in row else "wrong result, not timed"
        ratio = f"{row['median_ms'] / timed[FP32]['median_ms']:.2f}" if "median_ms" in row and FP32 in timed else ""
        change = "".join(f" {row[key]:.1e} |" if key in row else " |" for key in ("difference", "error"))
        lines.append(f"| {name} | {row['size_mb']:.1f} | {ms} | {ratio} |{change}")
    scored = [row for row in rows if "top1" in row]
    if scored:
        lines += ["", f"Accuracy of {scored[0]['run']} by eval.py:", "", "| experts | top-1 | loss |", "|---|---|---|"]
        lines += [f"| {row['id'].split()[-1]} | {row['top1']:.4f} | {row['loss']:.5f} |" for row in scored]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """What the terminal shows of a row."""
    shown = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    return f"{row['id']}: {', '.join(shown)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--ckpt", type=Path, help="a checkpoint of train.py, for the accuracy")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("only the CPU is measured: use --device cpu")
    torch.set_num_threads(args.threads)
    report = Report("expert_dtype", args.device, output_folder(args), render, args.fresh)
    image_size, budget_s = (64, 1.0) if args.quick else (224, 20.0)
    measured = functools.cache(functools.partial(measure_networks, image_size, budget_s))
    cases = [(name, functools.partial(lambda n: measured()[n], name)) for name in (STATIC, FP32, *COMPRESSED)]
    if args.ckpt:
        cases += [(f"top-1 {dtype}", functools.partial(accuracy, args.ckpt, dtype)) for dtype in (FP32, *COMPRESSED)]
    report.run(cases, line)
    print(report.markdown())


if __name__ == "__main__":
    main()
