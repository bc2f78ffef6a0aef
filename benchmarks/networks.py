"""Whole networks: static, CondConv, and timm's CondConv, in turns in one run; training steps, inference, peak memory.

    python -m benchmarks.networks                       # all: backbones, detectors, latency of one image
    python -m benchmarks.networks --preset targets      # the rows with figures to reach
    python -m benchmarks.networks --preset latency      # the table of benchmarks.latency alone
    python -m benchmarks.networks --preset detectors    # SSD, the table of benchmarks.detectors alone
    python -m benchmarks.networks --backbones resnet18 --batch-sizes 1 64 --image-size 32
    python -m benchmarks.networks --preset targets --autotune   # backends by measurement, not by rule: its own table

A training step is forward, backward, SGD with momentum and zero_grad. "timm" is its `efficientnet_cc_b0_8e` for
EfficientNet-B0 with 8 experts, elsewhere its CondConv2d in the place of ours. Before anything is timed, ours is
compared with the float64 oracle and timm's with ours, outputs and (for training) all gradients. An interrupted run
continues where it was.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import condconv
from benchmarks import detectors, gates, network_tables, plots
from benchmarks.contenders import OURS, STATIC, TIMM, Trio, autocast
from benchmarks.network_gates import gate
from benchmarks.presets import Case, of_backbones, with_targets
from benchmarks.report import Report, Row, add_common_options, output_folder
from benchmarks.timing import failure, time_in_turns
from models import list_backbones

MIN_ROUNDS = {True: 5, False: 3}
"""Rounds that even the slowest contender runs, by whether a row has targets."""


class Networks:
    """The networks of the last case, kept while the next one needs the same: building them takes seconds."""

    def __init__(self, autotune: bool = False) -> None:
        self.autotune = autotune
        self.trio: Trio | None = None

    def of(self, case: Case) -> Trio:
        key = (case.backbone, case.experts, case.device)
        if self.trio is None or self.trio.key != key:
            self.trio = None  # frees the old ones before the new ones are made
            gc.collect()
            self.trio = Trio(*key)
        return self.trio

    def choose_backends(self, case: Case, images: Tensor) -> None:
        """With `autotune`, the backend of each of our layers is the fastest one at this batch, measured anew."""
        if not self.autotune:
            return
        network = self.of(case).networks[OURS].train(case.training)
        with tempfile.TemporaryDirectory() as folder, autocast(case):
            condconv.autotune(network, images, cache=Path(folder) / "autotune.json")


def measure(case: Case, networks: Networks, quick: bool) -> Row:
    """Gate, peak memory and times of all contenders of one case; a contender that fails gets a note, not a time."""
    row: Row = case.as_json()
    try:
        trio = networks.of(case)
        images, labels = case.batch_of_images()
        networks.choose_backends(case, images)
        errors, notes = gate(trio, case, images)
        row |= {"titles": trio.titles, "errors": errors, "notes": notes}
        workloads = {name: trio.workload(name, case, images, labels) for name in trio.names if name not in notes}
        warm_ms: dict[str, float] = {}
        if case.training:
            row["peak_mb"], warm_ms = _peaks(trio, case, workloads, notes)
        min_rounds = MIN_ROUNDS[bool(case.targets)]
        times, failed = time_in_turns(workloads, case.device, case.budget_s, 1 if quick else min_rounds, warm_ms)
        notes |= failed
    except (RuntimeError, ValueError, MemoryError) as error:
        networks.trio = None
        return row | {"error": failure(error)}
    row["times"] = {name: timing.as_json() for name, timing in times.items()}
    row["over"] = {
        f"{a}/{b}": times[a].over(times[b]) for a, b in ((OURS, STATIC), (OURS, TIMM), (TIMM, STATIC))
        if a in times and b in times
    }  # fmt: skip
    return row


def _peaks(
    trio: Trio, case: Case, workloads: dict[str, Callable[[], object]], notes: dict[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Peak memory in MB of a step of each contender, and its milliseconds; what fails is noted and dropped."""
    peak_mb: dict[str, float] = {}
    step_ms: dict[str, float] = {}
    for name in list(workloads):
        try:
            start = time.perf_counter()
            peak_mb[name] = trio.peak_mb(name, case, workloads[name])
            step_ms[name] = 1e3 * (time.perf_counter() - start)
        except (RuntimeError, MemoryError) as error:
            notes[name] = failure(error)
            del workloads[name]
    return peak_mb, step_ms


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """What the options ask for; a case that is in several presets comes once, with its targets."""
    if args.quick:
        backbones, sizes = args.backbones or ["mobilenet_v2"], args.batch_sizes or [2]
        return of_backbones(backbones, args.device, sizes, args.image_size or 32, args.experts, args.dtype, 0.2)
    found: list[Case] = []
    custom = args.backbones or args.batch_sizes or args.image_size
    if args.preset in ("targets", "all") and not custom:
        found += with_targets(args.device)
    if args.preset in ("backbones", "all") or custom:
        sizes = args.batch_sizes or ([1, 256] if args.device == "cuda" else [1, 16])
        backbones = args.backbones or list(list_backbones())
        found += of_backbones(backbones, args.device, sizes, args.image_size or 224, args.experts, args.dtype, 12.0)
    unique: dict[str, Case] = {}
    for case in found:
        unique.setdefault(case.id, case)  # the first one, which may have targets, wins
    # Cases of the same networks stand together.
    order = list(dict.fromkeys((case.backbone, case.experts) for case in found))
    return sorted(unique.values(), key=lambda case: order.index((case.backbone, case.experts)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["all", "targets", "backbones", "latency", "detectors"], default="all")
    parser.add_argument("--backbones", nargs="+", choices=list_backbones(), metavar="NAME", help="instead of a preset")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="1 16 on a CPU, 1 256 on CUDA")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 is autocast (default on CUDA)")
    parser.add_argument(
        "--autotune", action="store_true", help="measure backends first, as condconv.autotune=true does"
    )
    add_common_options(parser)
    args = parser.parse_args(arguments)
    if args.preset == "latency" and args.device != "cpu":
        parser.error("latency is of the CPU: use --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes JSON, Markdown and a plot."""
    args = parse(arguments)
    custom = args.backbones or args.batch_sizes or args.image_size
    if args.preset == "latency":
        latency_table(args)
        return
    if args.preset == "detectors":
        detector_table(args)
        return
    gates.exact_float32()
    table = "networks-autotuned" if args.autotune else "networks"
    report = Report(table, args.device, output_folder(args), network_tables.render, args.fresh)
    networks = Networks(args.autotune)

    def bind(case: Case) -> Callable[[], Row]:
        return lambda: measure(case, networks, args.quick)

    torch.manual_seed(0)
    report.run([(case.id, bind(case)) for case in chosen_cases(args)], network_tables.line)
    for name, groups in network_tables.plotted(report.rows).items():
        plots.bars(report.path.with_name(f"{report.path.stem}-{name.replace(' ', '-')}.svg"), name, groups)
    print(report.path.with_suffix(".md"))
    if args.preset == "all" and not custom and not args.quick:
        detector_table(args)
    if args.preset == "all" and not custom and not args.quick and args.device == "cpu":
        latency_table(args)


def detector_table(args: argparse.Namespace) -> None:
    """SSD, static against CondConv: a table of its own, benchmarks.detectors."""
    given = args.batch_sizes[0] if args.batch_sizes else None
    widths, size, batch, seconds = detectors.choose(None, args.image_size, given, args.quick)
    detectors.table(widths, args.experts, size, batch, args.device, seconds, output_folder(args), args.fresh)


def latency_table(args: argparse.Namespace) -> None:
    """PyTorch and ONNX Runtime, one image, on the CPU: a table of its own, benchmarks.latency."""
    from benchmarks import latency  # needs the extra `export`

    backbones, size, seconds = latency.choose(args.backbones, args.image_size, args.quick)
    latency.table(backbones, args.experts, size, seconds, output_folder(args), args.fresh)


if __name__ == "__main__":
    main()
