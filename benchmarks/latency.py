"""Latency of one image on the CPU: PyTorch eager and compiled, ONNX Runtime float32 and int8, static against CondConv.

    python -m benchmarks.latency
    python -m benchmarks.latency --backbones mobilenet_v1 --image-size 64 --experts 4

Gate: the exporter runs every file back at four batch sizes and refuses one that differs from PyTorch; the compiled
network is compared here. int8 files are calibrated on random images, which is enough to time them, not to use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.report import Report, Row, add_common_options, origin_mark, output_folder
from benchmarks.timing import time_in_turns
from models import create_model, list_backbones
from models.exporting import TOLERANCE, export_onnx, onnx_runner
from models.quantizing import quantize

STATIC, CONDCONV = "static", "CondConv"
KINDS = ("eager", "compiled", "ONNX mixture", "ONNX matmul", "ONNX int8")


def settled(backbone: str, experts: int, image_size: int) -> nn.Module:
    """A network with BatchNorm statistics as after training: without them activations shrink to nothing."""
    torch.manual_seed(0)
    network = create_model(backbone, 1000, experts).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, image_size, image_size))
    return network.eval().to(memory_format=torch.channels_last)


def workloads(network: nn.Module, image: Tensor, folder: Path, threads: int) -> dict[str, Callable[[], object]]:
    """One function for each kind; a static network has one ONNX form alone.

    Raises:
        RuntimeError: the compiled or exported network computes something else.
    """
    compiled = torch.compile(network)
    with torch.inference_mode():  # as it is timed: in another mode it would be compiled anew, and that be timed
        result, expected = compiled(image), network(image)
    if float((result - expected).abs().max()) > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError("the compiled network computes something else")
    size = image.shape[2]
    mixture = export_onnx(network, folder / "mixture.onnx", size, form="mixture").path
    int8 = quantize(mixture, folder / "int8.onnx", [torch.randn(4, 3, size, size) for _ in range(2)])
    files = {"ONNX mixture": mixture, "ONNX int8": int8}
    if getattr(network, "conversion", None) is not None:
        files["ONNX matmul"] = export_onnx(network, folder / "matmul.onnx", size, form="matmul").path
    found: dict[str, Callable[[], object]] = {"eager": lambda: network(image), "compiled": lambda: compiled(image)}
    for kind, path in files.items():
        run = onnx_runner(path, threads)
        found[kind] = lambda run=run: run(image)  # type: ignore[misc]  # bound now, not when it is called
    return found


@torch.inference_mode()
def measure(backbone: str, experts: int, image_size: int, budget_s: float) -> Row:
    """Median times of all kinds of the static network and of its CondConv twin, in turns."""
    image = torch.randn(1, 3, image_size, image_size)
    functions: dict[str, Callable[[], object]] = {}
    with TemporaryDirectory() as folder:
        for name, count in ((STATIC, 0), (CONDCONV, experts)):
            with torch.inference_mode(False), torch.no_grad():
                network = settled(backbone, count, image_size)
                found = workloads(network, image.clone(), Path(folder) / name, torch.get_num_threads())
            functions |= {f"{name} {kind}": function for kind, function in found.items()}
        times, notes = time_in_turns(functions, "cpu", budget_s)
    row: Row = {"backbone": backbone, "experts": experts, "image_size": image_size, "notes": notes}
    return row | {"times": {name: timing.as_json() for name, timing in times.items()}}


def render(rows: list[Row]) -> str:
    """A line for each network, a column for each kind; medians in milliseconds."""
    rounds = [time["rounds"] for row in rows for time in row.get("times", {}).values()]
    number = f"median of {min(rounds)} to {max(rounds)} rounds" if rounds else "median"
    lines = ["", f"Milliseconds for one image ({number}).", "", f"| network | | {' | '.join(KINDS)} |"]
    lines.append("|---|---|" + "---:|" * len(KINDS))
    for row in rows:
        name = f"{row['backbone']}, {row['image_size']} px{origin_mark(rows, row)}" if "times" in row else row["id"]
        for variant in (STATIC, CONDCONV) if "times" in row else ():
            cells = [row["times"].get(f"{variant} {kind}") for kind in KINDS]
            numbers = " | ".join("-" if cell is None else f"{cell['median_ms']:.1f}" for cell in cells)
            label = f"{variant}, {row['experts']} experts" if variant == CONDCONV else variant
            lines.append(f"| {name} | {label} | {numbers} |")
        if "error" in row:
            lines.append(f"| {name} | {row['error']} |{' |' * len(KINDS)}")
    return "\n".join(lines) + "\n"


def table(
    backbones: list[str], experts: int, image_size: int, seconds: float, folder: Path, fresh: bool = False
) -> Report:
    """Measures on the CPU what is not known yet, writes JSON and Markdown; also called by benchmarks.networks."""
    report = Report("latency", "cpu", folder, render, fresh)

    def bind(backbone: str) -> tuple[str, Callable[[], Row]]:
        return f"{backbone}-e{experts}-{image_size}px", lambda: measure(backbone, experts, image_size, seconds)

    report.run([bind(backbone) for backbone in backbones], lambda row: "\n".join(render([row]).splitlines()[5:]))
    print(report.path.with_suffix(".md"))
    return report


def choose(
    backbones: list[str] | None, image_size: int | None, quick: bool, seconds: float | None = None
) -> tuple[list[str], int, float]:
    """(backbones, image size, seconds for each): what was given, else all at full size, or little for `quick`."""
    usual = (["mobilenet_v1"], 32, 0.2) if quick else (list(list_backbones()), 224, 20.0)
    return backbones or usual[0], image_size or usual[1], seconds or usual[2]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list_backbones(), metavar="NAME", help="all")
    parser.add_argument("--image-size", type=int, help="224")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seconds", type=float, help="for the timing of each backbone: 20")
    add_common_options(parser)
    parser.set_defaults(device="cpu")  # also where there is a GPU
    args = parser.parse_args(arguments)
    if args.device != "cpu":
        parser.error("latency is of the CPU: use --device cpu")
    backbones, size, seconds = choose(args.backbones, args.image_size, args.quick, args.seconds)
    table(backbones, args.experts, size, seconds, output_folder(args), args.fresh)


if __name__ == "__main__":
    main()
