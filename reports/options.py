"""The arguments of report.py."""

from __future__ import annotations

import difflib

from reports.runs import ReportError

HELP = """Compare finished runs: one HTML page that needs no network, Markdown, figures as SVG, and CSV.

  python report.py runs=outputs                                  every run below a folder, each against its static twin
  python report.py runs=outputs/sweeps/experts-1a2b3c out=docs/results/experts links=false notes=notes.md
  python report.py runs=a runs=b baseline=condconv.experts=0,model.width=0.25

  runs=       folder of runs, of a sweep, or of W&B's offline runs; may be given several times
  out=        folder of the report [<runs>/report]: index.html, report.md, figures/, runs.csv, groups.csv
  title=      of the page [from the folder's name]
  metric=     the figure that is compared, such as test/top1, val_ema/top1, val/AP [test/top1, or what the runs have]
  baseline=   settings of one group that all others are compared with [the static twin: same settings but condconv.*]
  notes=      a Markdown file that is shown at the top; its links and pictures count from the report's folder
  studies=    a YAML file of several comparisons, one page for all and a report for each: <out>/index.html, <out>.md,
              <out>/<study>/ (docs/reports.md)
  links=      true|false: links to the runs' folders; false leaves out all absolute paths, for a page to pass on [true]

Runs that failed, did not finish, or repeat another one's settings and seed are listed with the reason and in no mean.
"""
KEYS = ("runs", "out", "title", "metric", "baseline", "notes", "studies", "links")


def parse(arguments: list[str]) -> dict[str, list[str]]:
    """`key=value` words by key.

    Raises:
        ReportError: a word is of another form, unknown, given twice, without a value, or does not go with another.
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
    alone = [key for key in ("title", "metric", "baseline") if key in found and "studies" in found]
    if alone:
        raise ReportError(f"{alone[0]}= does not go with studies=: the file of the studies says it.")
    if found.get("links", ["true"])[0] not in ("true", "false"):
        raise ReportError(f"links={found['links'][0]}: it is true or false.")
    return found
