"""SSD detectors, static against CondConv (router and mixing included): inference with and without NMS, training step.

    python -m benchmarks.networks --preset detectors
    python -m benchmarks.detectors --widths 1.0 --image-size 300 --batch 8

Gate, before anything is timed: class logits, box codes and the gradients of all parameters of the CondConv detector
against the float64 loop over examples; a training step is match, focal loss and smooth L1, backward, SGD with momentum.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gates
from benchmarks.report import Report, Row, add_common_options, origin_mark, output_folder
from benchmarks.timing import time_in_turns
from condconv import CondConv2d
from condconv.ops.registry import REFERENCE
from models import create_detector
from models.detection_losses import detection_losses, match
from models.ssd_network import SSD

STATIC, CONDCONV = "static", "CondConv"
MODES = ("inference, batch 1, no NMS", "inference, batch 1, with NMS", "training step")
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 0.1
"""As for whole networks, see `benchmarks.network_gates`."""
CLASSES = 80
FEW = 2


def settled(width: float, experts: int, image_size: int, device: str) -> SSD:
    """A detector with BatchNorm statistics of random images."""
    torch.manual_seed(0)
    net = create_detector(num_classes=CLASSES, experts=experts, width=width, image_size=image_size, router_gain=1.0)
    net.to(device).to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, image_size, image_size, device=device))
    return net


def gate(net: SSD, image_size: int, device: str) -> float:
    """The largest error of outputs and gradients against the oracle.

    Raises:
        GateFailure: one is too large.
    """
    images = torch.randn(FEW, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)).to(device)
    oracle = copy.deepcopy(net).double()
    for layer in oracle.modules():
        if isinstance(layer, CondConv2d):
            layer.backend = REFERENCE
    expected, actual = _answers(oracle, images.double()), _answers(net, images)
    outputs = ("logits", "codes")
    error = gates.check(actual, {name: expected[name] for name in outputs}, OUTPUT_TOLERANCE)
    gradients = {name: tensor for name, tensor in expected.items() if name not in outputs}
    return max(error, gates.check(actual, gradients, GRADIENT_TOLERANCE))


def _answers(net: SSD, images: Tensor) -> dict[str, Tensor]:
    net.eval()
    logits, codes = net(images)
    named = dict(net.named_parameters())
    rows = list(range(len(images)))
    cotangents = [gates.sparse_cotangent(logits, rows), gates.sparse_cotangent(codes, rows, seed=3)]
    gradients = torch.autograd.grad([logits, codes], list(named.values()), cotangents)
    return {"logits": logits.detach(), "codes": codes.detach(), **dict(zip(named, gradients, strict=True))}


def make_targets(batch: int, image_size: int, device: str) -> list[dict[str, Any]]:
    """Seven boxes an image, as COCO has on average."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(batch, 7, 2, generator=generator) * image_size * 0.6
    boxes = torch.cat([corner, corner + (0.1 + 0.3 * torch.rand(batch, 7, 2, generator=generator)) * image_size], -1)
    labels = torch.randint(0, CLASSES, (batch, 7), generator=generator)
    return [{"boxes": b.to(device), "labels": n.to(device)} for b, n in zip(boxes, labels, strict=True)]


def workloads(net: SSD, image_size: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """A function for each mode."""
    image = torch.randn(1, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    images = image.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    images += 0.1 * torch.randn_like(images)
    targets = make_targets(batch, image_size, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def infer(nms: bool) -> None:
        net.eval()
        with torch.inference_mode():
            outputs = net(image)
            if nms:
                net.detect(outputs)

    def train() -> None:
        net.train()
        losses = detection_losses(*net(images), *match(targets, net.anchors), net.anchors)
        (losses["class"] + losses["box"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return dict(zip(MODES, (lambda: infer(False), lambda: infer(True), train), strict=True))


def measure(width: float, experts: int, image_size: int, batch: int, device: str, budget_s: float) -> Row:
    """Times of both detectors, mode by mode, in turns."""
    nets = {name: settled(width, e, image_size, device) for name, e in ((STATIC, 0), (CONDCONV, experts))}
    row: Row = {"width": width, "experts": experts, "image_size": image_size, "batch": batch}
    row["error_of_gate"] = gate(nets[CONDCONV], image_size, device)
    functions = {name: workloads(net, image_size, batch, device) for name, net in nets.items()}
    row["times"], row["over"] = {}, {}
    for mode in MODES:
        times, notes = time_in_turns({name: functions[name][mode] for name in nets}, device, budget_s / len(MODES))
        row["times"][mode] = {name: timing.as_json() for name, timing in times.items()}
        if notes:
            row.setdefault("notes", {})[mode] = notes
        else:
            row["over"][mode] = times[CONDCONV].over(times[STATIC])
    return row


def render(rows: list[Row]) -> str:
    """A line for each detector and mode; medians in milliseconds."""
    lines = ["Milliseconds (median), SSD on MobileNetV1, CondConv in the backbone by its placement.", ""]
    lines += ["| detector | mode | static | CondConv | CondConv / static |", "|---|---|---:|---:|---:|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['id']} | {row['error']} | | | |")
            continue
        name = f"width {row['width']:g}, E={row['experts']}, {row['image_size']} px{origin_mark(rows, row)}"
        for mode in MODES:
            label = f"{mode}, batch {row['batch']}" if mode == MODES[-1] else mode
            cells = [row["times"][mode].get(each) for each in (STATIC, CONDCONV)]
            numbers = " | ".join("-" if cell is None else f"{cell['median_ms']:.1f}" for cell in cells)
            over = row["over"].get(mode)
            ratio = "-" if over is None else f"{over['ratio']:.2f} ({over['min']:.2f} to {over['max']:.2f})"
            lines.append(f"| {name} | {label} | {numbers} | {ratio} |")
    return "\n".join(lines) + "\n"


def table(
    widths: list[float],
    experts: int,
    image_size: int,
    batch: int,
    device: str,
    seconds: float,
    folder: Path,
    fresh: bool = False,
) -> Report:
    """Measures what is not known yet, writes JSON and Markdown; also called by benchmarks.networks."""
    gates.exact_float32()
    report = Report("detectors", device, folder, render, fresh)

    def bind(width: float) -> tuple[str, Callable[[], Row]]:
        name = f"ssd_mobilenet_v1-w{width:g}-e{experts}-{image_size}px-batch{batch}"
        return name, lambda: measure(width, experts, image_size, batch, device, seconds)

    report.run([bind(width) for width in widths], lambda row: "\n".join(render([row]).splitlines()[4:]))
    print(report.path.with_suffix(".md"))
    return report


def choose(
    widths: list[float] | None, image_size: int | None, batch: int | None, quick: bool, seconds: float | None = None
) -> tuple[list[float], int, int, float]:
    """(widths, image size, batch, seconds for each): what was given, else the paper's, or little for `quick`."""
    usual = ([0.25], 64, 2, 0.2) if quick else ([0.5, 0.75, 1.0], 300, 8, 30.0)
    return widths or usual[0], image_size or usual[1], batch or usual[2], seconds or usual[3]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=float, help="0.5 0.75 1.0")
    parser.add_argument("--image-size", type=int, help="300")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, help="of the training step: 8")
    parser.add_argument("--seconds", type=float, help="for the timing of each width: 30")
    add_common_options(parser)
    args = parser.parse_args(arguments)
    widths, size, batch, seconds = choose(args.widths, args.image_size, args.batch, args.quick, args.seconds)
    table(widths, args.experts, size, batch, args.device, seconds, output_folder(args), args.fresh)


if __name__ == "__main__":
    main()
