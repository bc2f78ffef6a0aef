"""Tables that say where they come from, and that an interrupted run continues.

A report is one JSON file, written after every row, and the Markdown made from it. A row carries its origin: commit,
versions, device, threads. A row that was measured with the present code, versions and machine is not measured again;
rows of another origin stay in the table, marked, until they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED_CODE = ("condconv", "models", "data", "benchmarks/*.py")
MAX_DEATHS = 2
"""So often a row may end the whole process (the kernel does that when memory runs out) before it is given up."""

Row = dict[str, Any]
Json = dict[str, Any]


def device_slug(device: str) -> str:
    """Part of file names: "cpu", or the name of the GPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def origin(device: str) -> Json:
    """What the times of a run hold for. With uncommitted changes, their hash stands beside the commit."""
    changes = _git("status", "--porcelain", "--", *MEASURED_CODE)
    digest = hashlib.sha1((changes + _git("diff", "HEAD", "--", *MEASURED_CODE)).encode()).hexdigest()[:8]
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": digest if changes else False,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in ("torch", "timm", "triton")},
        "python": platform.python_version(),
    }


class Report:
    """The rows of one benchmark on one device.

    Args:
        name: of the benchmark; the files are `<name>-<device>.json` and `.md`.
        device: "cpu" or "cuda".
        folder: where the files go.
        render: makes the Markdown of the rows.
        fresh: forget earlier rows.
        facts: what else the rows of this run hold for; rows of other facts are measured again.
    """

    def __init__(
        self,
        name: str,
        device: str,
        folder: Path,
        render: Callable[[list[Row]], str],
        fresh: bool = False,
        facts: Json | None = None,
    ) -> None:
        self.name, self.render = name, render
        self.path = folder / f"{name}-{device_slug(device)}.json"
        self.data: Json = {"benchmark": name, "origins": [], "rows": [], "running": {}}
        if self.path.exists() and not fresh:
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        now = origin(device) | (facts or {})
        same = [i for i, known in enumerate(self.data["origins"]) if {key: known.get(key) for key in now} == now]
        if not same:
            self.data["origins"].append({**now, "date": time.strftime("%Y-%m-%d"), "commands": []})
        self.origin_index: int = same[0] if same else len(self.data["origins"]) - 1
        # A report can be a part of another's command: benchmarks.networks also makes the table of benchmarks.latency.
        program = Path(sys.argv[0])
        called = program.stem if program.parent.name == "benchmarks" else name
        command = f"python -m benchmarks.{called} {' '.join(sys.argv[1:])}".strip()
        if command not in self.origin["commands"]:
            self.origin["commands"].append(command)

    @property
    def origin(self) -> Json:
        """Of the rows that this run measures; further facts of the run may be added."""
        found: Json = self.data["origins"][self.origin_index]
        return found

    @property
    def rows(self) -> list[Row]:
        found: list[Row] = self.data["rows"]
        return found

    def known(self, row_id: str) -> Row | None:
        """The row, when it was measured with the present code on this machine."""
        return next((r for r in self.rows if r["id"] == row_id and r["origin"] == self.origin_index), None)

    def run(self, cases: Iterable[tuple[str, Callable[[], Row]]], line: Callable[[Row], str]) -> None:
        """Measure what is not known yet, with a bar and one line for every row; write after each."""
        todo = [(row_id, measure) for row_id, measure in cases if self.known(row_id) is None]
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        console = Console(soft_wrap=True, highlight=False)
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            bar = progress.add_task("", total=len(todo))
            for row_id, measure in todo:
                progress.update(bar, description=row_id)
                row = self._measure(row_id, measure)
                console.print(line(row), markup=False)
                progress.advance(bar)
        self.write()

    def _measure(self, row_id: str, measure: Callable[[], Row]) -> Row:
        deaths = self.data["running"].get(row_id, 0)
        if deaths >= MAX_DEATHS:
            row: Row = {"error": f"not run: the process died {deaths} times in this row (out of memory?)"}
            self.data["running"].pop(row_id)
        else:
            self.data["running"][row_id] = deaths + 1
            self.write()
            try:
                row = measure()
            finally:
                # Reached by errors and by Ctrl-C, not when the process is killed.
                self.data["running"].pop(row_id)
        row = {"id": row_id, "origin": self.origin_index, **row}
        load = round(os.getloadavg()[0], 1)
        lowest, highest = self.origin.get("load", (load, load))
        self.origin["load"] = (min(load, lowest), max(load, highest))
        places = [i for i, old in enumerate(self.rows) if old["id"] == row_id]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        """Write both files; the JSON atomically, since the next run reads it."""
        self._drop_unused_origins()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)
        self.path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def _drop_unused_origins(self) -> None:
        used = sorted({row["origin"] for row in self.rows} | {self.origin_index})
        self.data["origins"] = [self.data["origins"][i] for i in used]
        for row in self.rows:
            row["origin"] = used.index(row["origin"])
        self.origin_index = used.index(self.origin_index)

    def markdown(self) -> str:
        """Origins, then the tables."""
        used = sorted({row["origin"] for row in self.rows})
        lines = [f"# {self.name}: {self.path.stem.removeprefix(self.name + '-')}", ""]
        for index in used:
            rows = sum(row["origin"] == index for row in self.rows)
            mark = "" if len(used) == 1 else f" [{index}], {rows} rows"
            lines += [f"Origin{mark}:", "", *(f"- {text}" for text in _origin_lines(self.data["origins"][index])), ""]
        if len(used) > 1:
            lines += ["Rows are marked with their origin.", ""]
        return "\n".join([*lines, self.render(self.rows)])


def _origin_lines(facts: Json) -> list[str]:
    dirty = f" with uncommitted changes ({facts['dirty']})" if facts["dirty"] else ""
    lines = [f"command: `{command}`" for command in facts["commands"]]
    lines.append(f"commit {facts['commit']}{dirty}, {facts['date']}")
    lines.append(f"{facts['device']}; {facts['cpu']}")
    lines.append(", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + f", Python {facts['python']}")
    if "load" in facts:
        lines.append(f"load of the machine, this run included: {facts['load'][0]} to {facts['load'][1]} processes")
    if "clock" in facts:
        lines.append(f"clock: {facts['clock']} time")
    if "rates" in facts:
        rates = facts["rates"]
        arithmetic = ", ".join(f"{r / 1e9:.0f} G multiply-adds/s {d}" for d, r in rates["madds_per_s"].items())
        lines.append(f"measured rates: copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, {arithmetic}")
    return lines


def origin_mark(rows: list[Row], row: Row) -> str:
    """The origin in brackets when the rows do not all have the same one, else nothing."""
    return f" [{row['origin']}]" if len({other["origin"] for other in rows}) > 1 else ""


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see it work; written to outputs/benchmarks"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier results instead of continuing them")
    parser.add_argument("--output", type=Path, help="folder of the results (benchmarks/results)")


def output_folder(args: argparse.Namespace) -> Path:
    """Where the results go; stops when the device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device here")
    folder: Path = args.output or (ROOT / "outputs" / "benchmarks" if args.quick else RESULTS)
    return folder
