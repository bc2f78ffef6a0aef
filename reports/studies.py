"""Several studies of one question on one page, each a comparison with a report of its own; what was not run is said.

A file lists the studies (`read_studies`; docs/results/cifar10/studies.yaml is one). The page is written as Markdown,
and the HTML page is made of the same text, so the two cannot differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from reports.charts import difference_text
from reports.comparison import Comparison, Row, compare, pairs_of
from reports.findings import KINDS as ORDER
from reports.findings import Finding, findings, interval_text
from reports.groups import duplicate_of
from reports.notes import render_notes
from reports.page import KINDS, TEMPLATES, build_context, markdown_text, write_report, write_text
from reports.provenance import Options, hours, provenance
from reports.runs import FINISHED, ReportError, Run
from reports.statistics import Difference, paired_difference

FIGURES = ("effects",)
TOGETHER = "All of these together, averaged by seed"
ANALYSIS = Path("analysis") / "index.md"
FITTED = "The training images are fitted better"
"""How the finding begins that stands on the page beside the differences; the others are in a study's own report."""


@dataclass(frozen=True)
class Study:
    """One comparison of the page.

    Attributes:
        name: of its folder.
        title, question: shown.
        runs: names of runs without their seeds, folders below the root, as in "experts/experts-8".
        baseline: see `reports.comparison.compare`; None for each group's static twin.
        figures: names of the charts that are shown.
        seeds: that its runs should have, if not those of the page.
    """

    name: str
    title: str
    question: str
    runs: tuple[str, ...]
    baseline: str | None = None
    figures: tuple[str, ...] = FIGURES
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Target:
    """What is aimed at: in each of some studies, a gain of so many experts, with its interval above zero."""

    experts: int
    points: float
    studies: tuple[str, ...]


@dataclass(frozen=True)
class Studies:
    """A file of studies: what the page is called and says, the seeds that every study should have, the studies."""

    title: str
    lead: str
    seeds: tuple[int, ...]
    studies: tuple[Study, ...]
    target: Target | None = None


@dataclass
class Part:
    """A study with what was found of it.

    Attributes:
        missing: (name, seeds, how they stand) of the runs that are not finished.
        context: what the templates of a report show, empty if nothing was run.
        sentences: its main findings, each with its rank.
    """

    study: Study
    comparison: Comparison | None = None
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    sentences: list[tuple[int, Finding]] = field(default_factory=list)

    @property
    def charts(self) -> list[Any]:
        by_name = {chart.id: chart for chart in self.context.get("charts", ())}
        return [by_name[name] for name in self.study.figures if name in by_name]


def read_studies(path: Path) -> Studies:
    """Read a file of studies.

    Raises:
        ReportError: something in it is missing or not known.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        studies = tuple(
            Study(name, **{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()})
            for name, entry in content["studies"].items()
        )
        target = content.get("target")
        found = Target(target["experts"], target["points"], tuple(target["studies"])) if target else None
        return Studies(content["title"], content["lead"], tuple(content["seeds"]), studies, found)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ReportError(f"{path} is no file of studies: {type(error).__name__}: {error}") from error


def select(
    study: Study,
    seeds: Sequence[int],
    of_name: Mapping[str, Mapping[str, Run]],
    duplicates: Mapping[str, Sequence[Run]],
    known: Collection[str] = (),
) -> Part:
    """The part of a study, with its runs compared.

    Args:
        seeds: that every group should have if the study names none; what there is of others counts too.
        of_name: name without seed -> seed -> run.
        duplicates: name without seed -> finished runs that do not count, with the reason: they are listed.
        known: names of runs that an earlier study of the page has: without a run of its own, a study was not run.
    """
    part = Part(study)
    fresh = [name for name in study.runs if name not in known]
    for name in fresh or study.runs:
        states: dict[str, list[str]] = {}
        for seed in dict.fromkeys([*map(str, study.seeds or seeds), *of_name.get(name, {})]):
            run = of_name.get(name, {}).get(seed)
            if run is None or run.status == "not started":
                states.setdefault("not run", []).append(seed)
            elif run.status != FINISHED:
                states.setdefault(f"not finished ({run.status})", []).append(seed)
        part.missing += [(name, ", ".join(which), state) for state, which in states.items()]
    finished = {name: [run for run in of_name.get(name, {}).values() if run.status == FINISHED] for name in study.runs}
    if not any(finished[name] for name in fresh or study.runs) or sum(map(bool, finished.values())) < 2:
        return part
    runs = [run for found in finished.values() for run in found]
    part.comparison = compare(runs, None, study.baseline if _has_baseline(runs, study.baseline) else None)
    part.comparison.left_out += [run for name in study.runs for run in duplicates.get(name, ())]
    old = {run.folder for name in study.runs if name in known for run in finished[name]} if fresh else set()
    told = [row.label for row in part.comparison.rows if {run.folder for run in row.group.runs} <= old]
    part.sentences = _sentences(part.comparison, told)
    return part


def _sentences(comparison: Comparison, told: Collection[str]) -> list[tuple[int, Finding]]:
    """One sentence for all groups of the same verdict, but those in `told`; and whether training images gained more.

    The rank is lower for what speaks against the experts, also where they are the baseline.
    """
    metric, by_kind = comparison.metric, dict[tuple[int, str], list[str]]()
    for row in comparison.rows:
        if row.difference is None or row.label in told:
            continue
        kind = metric.better(row.difference)
        reverse = row.group.is_static and row.baseline is not None and not row.baseline.group.is_static
        meaning = {"worse": "better", "better": "worse"}.get(kind, kind) if reverse else kind
        by_kind.setdefault((ORDER.index(meaning), kind), []).append(f"{row.label}: {difference_text(metric, row)}")
    unit = "points of " if metric.is_share else ""
    found = [
        (rank, Finding(kind, f"{'; '.join(each)} ({unit}{metric.name} to {comparison.baseline}, 95 % intervals)."))
        for (rank, kind), each in by_kind.items()
    ]
    return found + [(ORDER.index(f.kind), f) for f in findings(comparison) if f.text.startswith(FITTED)]


def _has_baseline(runs: Sequence[Run], baseline: str | None) -> bool:
    try:
        compare(runs, None, baseline)
    except ReportError:  # none of its runs is finished
        return False
    return True


def by_name(runs: Sequence[Run], roots: Sequence[Path]) -> tuple[dict[str, dict[str, Run]], dict[str, list[Run]]]:
    """(name without seed -> seed -> the run that counts, name without seed -> finished runs that do not).

    Names count from the first of the roots that a run lies in, so several roots may hold one name: a finished run goes
    before one that is not, and of two finished ones the one that ended last counts, as elsewhere.
    """
    found: dict[str, dict[str, Run]] = {}
    duplicates: dict[str, list[Run]] = {}
    for run in sorted(runs, key=_standing, reverse=True):
        root = next((root for root in roots if run.folder.is_relative_to(root)), None)
        if root is None:
            continue
        name, _, seed = run.folder.relative_to(root).as_posix().rpartition("_seed-")
        counted = found.setdefault(name, {}).setdefault(seed, run)
        if counted is not run and run.status == FINISHED:
            run.reason = duplicate_of(counted, run)
            duplicates.setdefault(name, []).append(run)
    return found, duplicates


def _standing(run: Run) -> tuple[bool, bool, str]:
    """Larger for what says more about a job: a run that finished, one that was started, the one that ended last."""
    return run.status == FINISHED, run.status != "not started", run.ended


def write_studies(
    studies: Studies, runs: Sequence[Run], roots: Sequence[Path], options: Options
) -> tuple[list[Path], list[Part]]:
    """Write a report for each study that has runs, and the page of all of them: `<out>/index.html` and `<out>.md`.

    Args:
        runs: everything below `roots`.
        options: of the page; its notes are Markdown whose links count from the folder `out`.
    """
    (of_name, duplicates), known = by_name(runs, roots), set[str]()
    parts = []
    for study in studies.studies:
        part = select(study, studies.seeds, of_name, duplicates, known)
        known |= set(study.runs)
        if part.comparison is not None:
            folder, title = options.out / study.name, f"{studies.title}: {study.title}"
            own = replace(options, out=folder, title=title, notes=study.question)
            part.context = build_context(part.comparison, own)
            write_report(part.comparison, own)
        parts.append(part)
    used = [run for name in known for run in of_name.get(name, {}).values()]
    together = compare(used)
    together.left_out += [run for name in known for run in duplicates.get(name, ())]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True, autoescape=False)
    environment.filters["md"] = markdown_text
    sentences = [(rank, part, finding) for part in parts for rank, finding in part.sentences]
    target = target_lines(studies, parts)
    context = {
        "studies": studies,
        "parts": parts,
        "sentences": sorted(sentences, key=lambda sentence: sentence[0]),
        "kinds": KINDS,
        "target": target,
        "together": bool(target) and target[-1][0].startswith(TOGETHER),
        "hours": f"{hours(used):.1f}",
        "provenance": provenance(together, options),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "notes": options.notes,
        "analysis": _analysis(options.out),
    }
    template = environment.get_template("studies.md.j2")
    plain = template.render(**context, base=f"{options.out.name}/", page=f"{options.out.name}/index.html")
    body = render_notes(template.render(**context, base="", page=""), options.out)
    css = Markup("".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("chart.css", "page.css")))
    page = environment.overlay(autoescape=True).get_template("studies.html.j2")
    html = page.render(title=studies.title, css=css, body=body)
    return [write_text(options.out / "index.html", html), write_text(options.out.with_suffix(".md"), plain)], parts


def _analysis(out: Path) -> str:
    """The text of the routing analysis that lies beside the page, up to its pictures; empty if there is none."""
    page = out / ANALYSIS
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return text.partition("\n## ")[0].partition("\n")[2].strip()


def target_lines(studies: Studies, parts: Sequence[Part]) -> list[tuple[str, str, str]]:
    """(study, "met", "missed", "not shown" or "not run", the figures) for each study that the target names.

    And for all of them together, if more than one was run.
    """
    target, lines = studies.target, []
    if target is None:
        return []
    found: list[tuple[Comparison, Row]] = []
    for part in (part for part in parts if part.study.name in target.studies):
        comparison = part.comparison
        rows = [row for row in comparison.rows if row.group.experts == target.experts] if comparison else []
        row = next((row for row in rows if row.difference is not None), None)
        if comparison is None or row is None or row.difference is None:
            lines.append((part.study.title, "not run", "no pair of runs"))
            continue
        found.append((comparison, row))
        figures = f"{row.label}: {interval_text(comparison.metric, row.difference)}"
        lines.append((part.study.title, _verdict(row.difference, target), figures))
    if (together := averaged_by_seed(found)) is not None:
        name = f"{TOGETHER} ({len(found)} studies)"
        lines.append((name, _verdict(together, target), interval_text(found[0][0].metric, together)))
    return lines


def _verdict(found: Difference, target: Target) -> str:
    above = found.low is not None and found.low > 0
    met = above and found.mean >= target.points
    return "met" if met else "not shown" if found.high is None or found.high >= target.points else "missed"


def averaged_by_seed(found: Sequence[tuple[Comparison, Row]]) -> Difference | None:
    """One difference for each seed that all studies have a pair of: its mean over the studies.

    Runs of one seed see the images in one order, whatever the network, so pairs of one seed are not independent, and
    the interval is over seeds. None for fewer than two studies, without a seed that all have, or if they compare
    different figures.
    """
    if len(found) < 2 or len({each.metric for each, _ in found}) > 1:
        return None
    pairs = [pairs_of(row, row.baseline, each.metric) for each, row in found if row.baseline is not None]
    common = sorted(set.intersection(*(set(each) for each in pairs)))
    return paired_difference([(_mean(pairs, seed, 0), _mean(pairs, seed, 1)) for seed in common])


def _mean(pairs: Sequence[Mapping[str, tuple[float, float]]], seed: str, place: int) -> float:
    return statistics.fmean(each[seed][place] for each in pairs)
