"""Where the numbers of a report come from: runs, hours, commits, devices, versions, commands, definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.comparison import Comparison
from reports.configs import command_text, shortened
from reports.groups import show
from reports.runs import Run, Sweep


@dataclass(frozen=True)
class Options:
    """How a report is written.

    Attributes:
        out: the folder.
        title: of the page.
        notes: Markdown that stands at the top, written by hand; empty for none.
        command: how the report was made.
        sweeps: found beside the runs; a report names the commands of those that its own runs belong to.
        links: link to the run's folders; without, the page has no path of this machine, and can leave it.
    """

    out: Path
    title: str
    notes: str = ""
    command: str = ""
    links: bool = True
    sweeps: Sequence[Sweep] = ()


def hours(runs: Sequence[Run]) -> float:
    """Training time of the runs together."""
    return sum(run.number("seconds") or 0.0 for run in runs) / 3600


def commit_of(run: Run) -> str:
    """The commit, short, with a + for uncommitted changes."""
    commit = run.result.get("commit")
    return f"{str(commit)[:12]}{'+' if run.result.get('dirty') else ''}" if commit else "–"


def provenance(comparison: Comparison, options: Options) -> list[tuple[str, str]]:
    """Names and values, as the pages list them."""
    runs, left = comparison.runs, comparison.left_out

    def values(key: str) -> str:
        return (
            ", ".join(sorted({show(run.result[key]) for run in runs if run.result.get(key) is not None}))
            or "not recorded"
        )

    versions = sorted({f"{k} {v}" for run in runs for k, v in _dict(run.result.get("versions")).items()})
    ends = sorted(run.ended for run in runs if run.ended)
    folders = {run.folder.parent for run in (*runs, *left)}
    commands = [sweep.command for sweep in options.sweeps if sweep.command and sweep.folder in folders]
    resumed = sum((run.number("parts") or 1) > 1 for run in runs)
    planned = len(comparison.not_started)
    waiting = f", {planned} are planned and not started" if planned else ""
    n = f"{len(runs)} runs count, {len(left) - planned} are left out{waiting}; {resumed} were stopped and resumed"
    return [
        ("runs", n),
        ("training time", f"{hours(runs):.2f} hours of the runs that count, {hours(left):.2f} of those left out"),
        *(("sweep, its last start", command_text(command, options.links)) for command in commands),
        ("ended", f"{ends[0]} to {ends[-1]}" if ends else "not recorded"),
        ("seeds", ", ".join(sorted({show(run.seed) for run in runs})) or "none"),
        ("commits", ", ".join(sorted({commit_of(run) for run in runs})) or "none"),
        ("device", values("device")),
        ("threads", values("threads")),
        ("processes", values("devices")),
        ("memory", values("memory_kind")),
        ("versions", ", ".join(versions) or "not recorded"),
        (
            "groups",
            "runs whose configs differ in seed, name, paths and loggers alone; "
            "a static network's condconv.* settings, and its rates and decay of routers and experts, count for nothing",
        ),
        (
            "figures",
            "of the final weights, unless the figure's name says otherwise; "
            "“best” is chosen on the evaluation images and optimistic",
        ),
        ("intervals", "two-sided 95 % t intervals of differences paired by seed; standard deviations with n − 1"),
        (
            "time",
            "wall time of the training over its epochs, validation included; CPU time of its process, all threads but "
            "not loading processes; images/s are the training's alone",
        ),
        ("this page", options.command if options.links else shortened(options.command)),
    ]


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
