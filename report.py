"""A page about runs, from their plain files: `python report.py runs=outputs`; `python report.py --help` says more."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from reports.comparison import compare
from reports.options import HELP, parse
from reports.page import write_report
from reports.provenance import Options
from reports.runs import ReportError, Run, find_folders, find_sweeps, planned, read_run
from reports.studies import read_studies, write_studies


def report(arguments: list[str], console: Console) -> Path:
    """Make the report that the arguments ask for; returns the path of the page.

    Raises:
        ReportError, OSError: the arguments, or where to read and write; the message says what to do.
    """
    given = parse(arguments)
    first = {key: values[0] for key, values in given.items()}
    roots = [Path(value).expanduser() for value in given["runs"]]
    out = Path(first.get("out", roots[0] / "report")).expanduser()
    notes = Path(first["notes"]).expanduser().read_text(encoding="utf-8") if "notes" in first else ""
    with console.status("looking for runs"):
        folders = list(find_folders(roots))
    if not folders:
        names = ", ".join(map(str, roots))
        raise ReportError(f"There are no runs below {names}: no config.yaml, result.json, metrics.csv or *.wandb.")
    runs = [read_run(folder) for folder in track(folders, f"reading {len(folders)} runs", console=console)]
    sweeps = find_sweeps(roots, folders)
    runs += [run for sweep in sweeps for run in planned(sweep, folders)]
    command = shlex.join(["python", "report.py", *arguments])
    title = first.get("title", f"Runs of {roots[0].absolute().name}")
    options = Options(out, title, notes, command, first.get("links") != "false", sweeps)
    if "studies" in first:
        return report_studies(Path(first["studies"]).expanduser(), runs, roots, options, console)
    comparison = compare(runs, first.get("metric"), first.get("baseline"))
    written = write_report(comparison, options)
    groups, left = len(comparison.rows), len(comparison.left_out)
    console.print(f"runs that count: {len(comparison.runs)}, in {groups} groups; left out: {left}", highlight=False)
    for path in (written[0], written[1], *written[-2:]):
        console.print(f"  {path}", soft_wrap=True, highlight=False, markup=False)
    return written[0]


def report_studies(file: Path, runs: list[Run], roots: list[Path], options: Options, console: Console) -> Path:
    """Make the page of several studies and a report for each; returns the path of the page."""
    written, parts = write_studies(read_studies(file), runs, roots, options)
    for part in parts:
        counted = len(part.comparison.runs) if part.comparison else 0
        console.print(
            f"{part.study.name}: {counted} runs count, {sum(len(m[1].split()) for m in part.missing)} are missing",
            highlight=False,
        )
    for path in written:
        console.print(f"  {path}", soft_wrap=True, highlight=False, markup=False)
    return written[0]


def main() -> None:
    """The command."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(HELP, end="")
        sys.exit(0 if arguments else 2)
    try:
        report(arguments, Console(highlight=False))
    except (ReportError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
