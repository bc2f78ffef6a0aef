"""A page about runs, from their plain files: `python report.py runs=outputs`; `python report.py --help` says more."""

from __future__ import annotations

import difflib
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from reports.comparison import compare
from reports.page import Options, write_report
from reports.runs import ReportError, find_folders, read_run

HELP = """Compare finished runs: one HTML page that needs no network, Markdown, figures as SVG, and CSV.

  python report.py runs=outputs                                  every run below a folder, each against its static twin
  python report.py runs=multirun/experts out=docs/results/experts links=false notes=notes.md
  python report.py runs=a runs=b baseline=condconv.experts=0,model.width=0.25

  runs=       folder of runs, of a sweep, or of W&B's offline runs; may be given several times
  out=        folder of the report [<runs>/report]: index.html, report.md, figures/, runs.csv, groups.csv
  title=      of the page [from the folder's name]
  metric=     the figure that is compared, such as test/top1, val_ema/top1, val/AP [test/top1, or what the runs have]
  baseline=   settings of one group that all others are compared with [the static twin: same settings but condconv.*]
  notes=      a Markdown file that is shown at the top; its links count from the report's folder
  links=      true|false: links to the runs' folders; false leaves out all absolute paths, for a page to pass on [true]

Runs that failed, did not finish, or repeat another one's settings and seed are listed with the reason and in no mean.
"""
KEYS = ("runs", "out", "title", "metric", "baseline", "notes", "links")


def parse(arguments: list[str]) -> dict[str, list[str]]:
    """`key=value` words by key.

    Raises:
        ReportError: a word is of another form, unknown, given twice, or without a value.
    """
    found: dict[str, list[str]] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1) if equals else [f"runs={word}"]
            hint = f"Did you mean {close[0] if not equals else close[0] + '='}? " if close else ""
            raise ReportError(f"There is no option {word!r}. {hint}Options: {', '.join(f'{k}=' for k in KEYS)}.")
        if not value:
            raise ReportError(f"{key}= needs a value, as in {key}=...; --help says which.")
        if key in found and key != "runs":
            raise ReportError(f"{key}= is given twice; only runs= may be.")
        found.setdefault(key, []).append(value)
    if "runs" not in found:
        raise ReportError("Which runs? Give runs=<folder>, as in: python report.py runs=outputs")
    if found.get("links", ["true"])[0] not in ("true", "false"):
        raise ReportError(f"links={found['links'][0]}: it is true or false.")
    return found


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
    comparison = compare(runs, first.get("metric"), first.get("baseline"))
    command = shlex.join(["python", "report.py", *arguments])
    title = first.get("title", f"Runs of {roots[0].absolute().name}")
    written = write_report(comparison, Options(out, title, notes, command, first.get("links") != "false"))
    groups, left = len(comparison.rows), len(comparison.left_out)
    console.print(f"{len(comparison.runs)} runs in {groups} groups, {left} left out", highlight=False)
    for path in (written[0], written[1], *written[-2:]):
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
