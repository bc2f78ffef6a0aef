"""Write a report: index.html (one file, nothing loaded from elsewhere), report.md, figures/*.svg and two CSV files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from reports.charts import charts_of, count
from reports.colors import style
from reports.comparison import Comparison, Row, value_of
from reports.configs import config_entries, shortened
from reports.findings import findings
from reports.groups import short_name, show
from reports.notes import render_notes
from reports.provenance import Options, commit_of, hours, provenance
from reports.published import published
from reports.runs import Run
from reports.statistics import Spread
from reports.svg import Chart, standalone
from reports.tables import write_groups, write_runs

TEMPLATES = Path(__file__).with_name("templates")
MOST_FINDINGS = 12
KINDS = {
    "worse": "worse",
    "caution": "caution",
    "unclear": "not shown",
    "single": "one seed",
    "better": "better",
    "cost": "cost",
    "fact": "means",
    "summary": "in short",
}
EXTRAS = {
    "params": "params",
    "madds": "MADDs",
    "images_per_second": "train images/s",
    "seconds_per_epoch": "s/epoch",
    "cpu_seconds_per_epoch": "CPU s/epoch",
    "peak_memory_mb": "peak MB",
}


@dataclass(frozen=True)
class Cell:
    """A cell of the table of results: text, what stands beside it in brackets, what it is sorted by, its colour."""

    text: str
    beside: str = ""
    sort: str = ""
    kind: str = ""


def write_report(comparison: Comparison, options: Options) -> list[Path]:
    """Write all files; returns their paths, the page first."""
    context = build_context(comparison, options)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, keep_trailing_newline=True)
    environment.filters["md"] = markdown_text
    texts = {
        name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("chart.css", "page.css", "page.js")
    }
    css = texts["chart.css"] + texts["page.css"] + Markup(context["colors"])
    notes = render_notes(options.notes, options.out)
    page = environment.get_template("page.html.j2").render(**context, css=css, js=texts["page.js"], notes=notes)
    plain = environment.overlay(autoescape=False).get_template("page.md.j2").render(**context, notes=options.notes)
    (options.out / "figures").mkdir(parents=True, exist_ok=True)
    written = [write_text(options.out / "index.html", page), write_text(options.out / "report.md", plain)]
    for chart in context["charts"]:
        alone = standalone(
            chart, texts["chart.css"] + Markup(context["colors"]), [row.label for row in comparison.rows]
        )
        written.append(write_text(options.out / "figures" / f"{chart.id}.svg", alone))
    written.append(write_runs(options.out / "runs.csv", comparison, options.links))
    written.append(write_groups(options.out / "groups.csv", comparison))
    return written


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    # Undecodable names of files come in as surrogates, which UTF-8 has no place for.
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    os.replace(unfinished, path)
    return path


def markdown_text(value: Any) -> str:
    """Text that Markdown shows as it is, in one line: no markup, no HTML, no new cell of a table."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def build_context(comparison: Comparison, options: Options) -> dict[str, Any]:
    """Everything that the templates show, as text."""
    rows = comparison.rows
    columns = comparison.columns if len(comparison.columns) > 1 else []  # a single one stands in the group's name
    shown = {key: any(getattr(row, key) is not None for row in rows) for key in (*EXTRAS, "train", "best")}
    names = [name for key, name in EXTRAS.items() if shown[key]]
    names += [comparison.train_metric.title] if shown["train"] else []
    names += [f"best {comparison.best_metric.title}"] if shown["best"] else []
    entries = published(comparison)
    charts: list[Chart] = charts_of(comparison)
    return {
        "title": options.title,
        "lead": _lead(comparison),
        "tiles": _tiles(comparison),
        "parts": _parts(comparison),
        "kinds": KINDS,
        "findings": findings(comparison),
        "most_findings": MOST_FINDINGS,
        "metric": comparison.metric,
        "train": comparison.train_metric,
        "best": comparison.best_metric,
        "baseline": comparison.baseline,
        "following": ", ".join(comparison.following[:12]) + (" …" if len(comparison.following) > 12 else ""),
        "columns": [{"key": key, "name": short_name(key, columns)} for key in columns],
        "shown": shown,
        "extra_names": names,
        "rows": [_row(i, row, comparison, shown) for i, row in enumerate(rows)],
        "charts": charts,
        "colors": style([row.group for row in rows]),
        "published_here": [entry for entry in entries if entry.is_ours_here],
        "published_others": [entry for entry in entries if not entry.is_ours_here],
        "left_out": [_left_out(run, options) for run in comparison.left_out],
        "runs": [_run(run, i, row, comparison, options) for i, row in enumerate(rows) for run in row.group.runs],
        **config_entries(rows, options.links),
        "provenance": provenance(comparison, options),
    }


def _lead(comparison: Comparison) -> str:
    models = sorted({show(row.group.settings.get("model.name")) for row in comparison.rows})
    data = sorted({_data_name(row) for row in comparison.rows})
    what = f"{', '.join(models)} on {', '.join(data)}" if comparison.rows else "No run that counts"
    return f"{what}; compared by {comparison.metric.name}, made {datetime.now(timezone.utc):%Y-%m-%d}."


def _data_name(row: Row) -> str:
    """The data set's name; of folders their own name, since the class of the data module says nothing about them."""
    settings = row.group.settings
    named = settings.get("data.dataset") or settings.get("data.name")
    kind = str(settings.get("data._target_", "unknown data")).rsplit(".", 1)[-1].removesuffix("DataModule")
    folder = PurePath(str(settings.get("data.root") or "")).name
    return str(named or (f"{folder} ({kind})" if folder else kind))


def _tiles(comparison: Comparison) -> list[dict[str, str]]:
    runs, rows = comparison.runs, comparison.rows
    seeds = {show(run.seed) for run in runs}
    left = comparison.left_out
    planned = len(comparison.not_started)
    tiles = [("runs that count", str(len(runs))), ("runs left out", str(len(left) - planned))]
    tiles += [("runs not started", str(planned))] if planned else []
    tiles += [("groups", str(len(rows))), ("seeds", str(len(seeds)))]
    tiles.append(("hours of training", f"{hours(runs) + hours(left):.1f}"))
    kinds = [comparison.metric.better(row.difference) for row in rows if row.difference is not None]
    if kinds:
        words = {"worse": f"worse than {comparison.baseline}", "unclear": "no difference shown"}
        words["better"] = f"better than {comparison.baseline}"
        tiles += [(word, str(kinds.count(kind))) for kind, word in words.items()]
    return [{"name": name, "value": value} for name, value in tiles]


def _parts(comparison: Comparison) -> list[tuple[str, str]]:
    parts = [("findings", "What was found")]
    parts += [("results", "Results"), ("figures", "Figures")] if comparison.rows else []
    parts += [("published", "Published figures"), ("left-out", "Left out")]
    parts += [("runs", "Runs"), ("configs", "Configs")] if comparison.rows else []
    return [*parts, ("how", "How it was measured")]


def _row(index: int, row: Row, comparison: Comparison, shown: dict[str, bool]) -> dict[str, Any]:
    metric, found = comparison.metric, row.difference
    value = metric.text(row.value.mean) + (f" ± {metric.text(row.value.sd)}" if row.value.sd is not None else "")
    cells = [Cell(value, sort=repr(row.value.mean))]
    if found is None:
        is_baseline = any(other.baseline is row for other in comparison.rows)
        cells.append(Cell("baseline" if is_baseline else "–" if row.group.is_static else "no partner"))
    else:
        interval = "" if found.low is None else f"[{metric.text(found.low, True)}, {metric.text(found.high, True)}]"
        beside = interval or "one pair"
        partial = f" of {found.n}" if found.n != row.value.n else ""
        cells.append(Cell(metric.text(found.mean, True), beside + partial, repr(found.mean), metric.better(found)))
    writers: dict[str, Callable[[float], str]] = {
        "params": count,
        "madds": count,
        "images_per_second": _amount,
        "seconds_per_epoch": _amount,
        "cpu_seconds_per_epoch": _amount,
        "peak_memory_mb": _amount,
    }
    for key, write in writers.items():
        if shown[key]:
            cells.append(_cost_cell(row, key, write))
    for key, own in (("train", comparison.train_metric), ("best", comparison.best_metric)):
        if shown[key]:
            part: Spread | None = getattr(row, key)
            cells.append(Cell("–") if part is None else Cell(own.text(part.mean), sort=repr(part.mean)))
    many = row.group.columns if len(row.group.columns) > 1 else {}
    settings = [show(value) if key in row.group.settings else "–" for key, value in many.items()]
    return {"index": index, "label": row.label, "settings": settings, "n": row.value.n, "cells": cells}


def _amount(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cost_cell(row: Row, key: str, write: Callable[[float], str]) -> Cell:
    value = getattr(row, key)
    mean = value.mean if isinstance(value, Spread) else value
    if mean is None:
        return Cell("–")
    ratio = row.ratio(key)
    return Cell(write(mean), f"({ratio:.2f} ×)" if ratio is not None else "", repr(mean))


def _link(folder: Path, options: Options, name: str = "") -> str:
    """Relative and percent-encoded; `./` first, so that no folder's name is taken for a scheme."""
    if not options.links:
        return ""
    path = os.path.relpath(folder / name if name else folder, options.out)
    return "./" + quote(path.replace(os.sep, "/"), safe="/", errors="surrogateescape")


def _left_out(run: Run, options: Options) -> dict[str, str]:
    return {
        "name": run.name,
        "seed": "" if run.seed is None else show(run.seed),
        "status": run.status,
        "reason": run.reason if options.links else shortened(run.reason),
        "problems": "; ".join(run.problems),
        "folder": run.folder.name,
        "link": _link(run.folder, options),
    }


def _run(run: Run, index: int, row: Row, comparison: Comparison, options: Options) -> dict[str, Any]:
    value, seconds = value_of(run, comparison.metric), run.number("seconds")
    return {
        "index": index,
        "name": run.name,
        "label": row.label,
        "seed": show(run.seed),
        "value": comparison.metric.text(value),
        "sort": repr(value),
        "minutes": "–" if seconds is None else f"{seconds / 60:.1f}",
        "device": show(run.result.get("device") or "–"),
        "commit": commit_of(run),
        "problems": "; ".join(run.problems),
        "link": _link(run.folder, options, "config.yaml") if (run.folder / "config.yaml").is_file() else "",
    }
