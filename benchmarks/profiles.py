"""Where the time of a step goes: milliseconds by kind of work, static and ours side by side.

    python -m benchmarks.profiles                                  # the rows of benchmarks.networks with targets
    python -m benchmarks.profiles --backbones resnet18 --batch-sizes 16 --image-size 224 --modes inference

torch's profiler times every operator; `benchmarks/work.py` says what each belongs to. Steps of the two take turns, and
of each the fastest step is shown, the one that was disturbed least. Gate: our logits and the gradients of all
parameters against the float64 oracle. Runs on the CPU. An interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gates, work
from benchmarks.contenders import OURS, STATIC, Trio
from benchmarks.network_gates import gate
from benchmarks.presets import Case, with_targets
from benchmarks.report import Report, Row, add_common_options, origin_mark, output_folder
from benchmarks.timing import failure, time_once_ms
from models import list_backbones

CONTENDERS = (STATIC, OURS)
ROUNDS = {"training": 5, "inference": 20}


def profile_step(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by kind of work; what passes between operators is a kind of its own."""
    with work.labelled(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        total_ms = 1e3 * (time.perf_counter() - start)
    found = work.milliseconds(profiler.events() or [])
    found[work.BETWEEN] = max(0.0, total_ms - sum(found.values()))
    return found


def measure(case: Case, rounds: int) -> Row:
    """Gate and profile static and ours; also the time of a step without the profiler."""
    row: Row = case.as_json()
    try:
        trio = Trio(case.backbone, case.experts, case.device, peer=False)
        images, labels = case.batch_of_images()
        errors, notes = gate(trio, case, images)
        row["errors"] = errors
        if OURS in notes:
            return row | {"error": notes[OURS]}
        steps = {name: trio.workload(name, case, images, labels) for name in CONTENDERS}
        kinds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        plain_ms: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for step in steps.values():
            step()
        for _ in range(rounds):
            for name, step in steps.items():
                plain_ms[name].append(time_once_ms(step, case.device))
                kinds[name].append(profile_step(step))
    except (RuntimeError, ValueError, MemoryError) as error:
        return row | {"error": failure(error)}
    row["rounds"] = rounds
    row["plain_ms"] = {name: min(times) for name, times in plain_ms.items()}
    row["work_ms"] = {name: min(found, key=lambda one: sum(one.values())) for name, found in kinds.items()}
    return row


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The rows with targets, or what the options ask for."""
    if not (args.backbones or args.quick):
        return with_targets("cpu")
    size, batches = args.image_size or (32 if args.quick else 224), args.batch_sizes or ([2] if args.quick else [16])
    return [
        Case(name, args.experts, mode == "training", size, batch)
        for name in args.backbones or ["mobilenet_v2"]
        for mode in args.modes
        for batch in batches
    ]


def line(row: Row) -> str:
    """For the terminal."""
    if "error" in row:
        return f"{row['id']}: {row['error']}"
    totals = {name: sum(row["work_ms"][name].values()) for name in CONTENDERS}
    return f"{row['id']}: static {totals[STATIC]:.1f} ms, ours {totals[OURS]:.1f} ms, profiled"


def render(rows: list[Row]) -> str:
    """One table for each step."""
    lines = [
        "Milliseconds of one step by kind of work, under torch's profiler: of each network the fastest of the steps,",
        "which took turns. `more`: what ours needs beyond static, in percent of static's step. `without profiler`: the",
        "fastest step alone.",
    ]
    for row in rows:
        lines += ["", f"## {row['id']}{origin_mark(rows, row)}", ""]
        lines += [str(row["error"])] if "error" in row else _table(row)
    return "\n".join(lines) + "\n"


def _table(row: Row) -> list[str]:
    ours, static = row["work_ms"][OURS], row["work_ms"][STATIC]
    totals = {OURS: sum(ours.values()), STATIC: sum(static.values())}
    lines = ["| kind of work | static, ms | share | ours, ms | share | more |", "|---|---:|---:|---:|---:|---:|"]
    for kind in work.KINDS:
        a, b = static.get(kind, 0.0), ours.get(kind, 0.0)
        if max(a / totals[STATIC], b / totals[OURS]) >= 0.002:
            shares = f"{a:.1f} | {a / totals[STATIC]:.1%} | {b:.1f} | {b / totals[OURS]:.1%}"
            lines.append(f"| {kind} | {shares} | {(b - a) / totals[STATIC]:+.1%} |")
    more = totals[OURS] / totals[STATIC] - 1
    lines.append(f"| all | {totals[STATIC]:.1f} | 100 % | {totals[OURS]:.1f} | 100 % | {more:+.1%} |")
    plain = row["plain_ms"]
    more = plain[OURS] / plain[STATIC] - 1
    lines.append(f"| without profiler | {plain[STATIC]:.1f} | | {plain[OURS]:.1f} | | {more:+.1%} |")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["targets"], default="targets", help="the rows with figures to reach")
    parser.add_argument(
        "--backbones", nargs="+", choices=list_backbones(), metavar="NAME", help="instead of the preset"
    )
    parser.add_argument("--modes", nargs="+", choices=["training", "inference"], default=["training"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="16")
    parser.add_argument("--image-size", type=int, help="224")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="steps of each network; default 5 of training, 20 of inference")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    add_common_options(parser)
    args = parser.parse_args(arguments)
    if args.device != "cpu":
        parser.error("profiles are of the CPU: use --device cpu")
    for name in ("rounds", "threads", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes JSON and Markdown."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report("profiles", args.device, output_folder(args), render, args.fresh)

    def bind(case: Case) -> Callable[[], Row]:
        def run() -> Row:
            gc.collect()
            return measure(case, args.rounds or (1 if args.quick else ROUNDS[case.mode]))

        return run

    torch.manual_seed(0)
    gates.exact_float32()
    report.run([(case.id, bind(case)) for case in chosen_cases(args)], line)
    print(report.path.with_suffix(".md"))


if __name__ == "__main__":
    main()
