"""The page of several studies: their tables, what is aimed at, what was not run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import write_run

import report as command
from reports.runs import ReportError
from reports.studies import read_studies

ROOT = Path(__file__).resolve().parents[2]
FILE = """
title: Does it pay?
lead: A lead with `code`.
seeds: [1, 2, 3]
target: {experts: 8, points: 0.3, studies: [experts, backbone]}
studies:
  experts: {title: Experts, question: 'More?', runs: [experts/e-0, experts/e-8], figures: [effects, curve-val-top1]}
  backbone: {title: Backbone, question: 'Another?', runs: [backbone/e-0, backbone/e-8]}
  dropout:
    title: Dropout
    question: Less?
    runs: [experts/e-0, experts/e-8, dropout/e-8]
    baseline: condconv.experts=8,condconv.dropout=0
"""


def make(runs: Path, out: Path, *more: str, file: str = FILE) -> tuple[str, str, str]:
    """The page as Markdown and as HTML, and what was said."""
    studies = runs.parent / "studies.yaml"
    studies.write_text(file)
    console = Console(file=io.StringIO(), width=200)
    page = command.report([f"runs={runs}", f"out={out}", f"studies={studies}", "links=false", *more], console)
    return out.with_suffix(".md").read_text(), page.read_text(), console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed, gain in ((1, 0.010), (2, 0.012), (3, 0.011)):
        write_run(root / "experts", 0, seed, 0.6, folder=f"e-0_seed-{seed}", cpu_seconds=80.0)
        write_run(root / "experts", 8, seed, 0.6 + gain, folder=f"e-8_seed-{seed}", cpu_seconds=120.0)
    overrides = {"condconv.dropout": 0.1}
    write_run(root / "dropout", 8, 2, 0.55, folder="e-8_seed-2", overrides=overrides)
    write_run(root / "dropout", 8, 1, 0.55, folder="e-8_seed-1", overrides=overrides, status="interrupted")
    return root


def test_the_page_says_what_was_found_and_what_was_not_run(runs: Path, tmp_path: Path) -> None:
    plain, page, said = make(runs, tmp_path / "out")
    assert re.search(r"\| Experts \| \*\*met\*\* \| 8 experts: \+1.10 points \(95 % interval \+0.85 to \+1.35", plain)
    assert "| Backbone | **not run** |" in plain
    assert "backbone/e-0 (seeds 1, 2, 3) not run; backbone/e-8 (seeds 1, 2, 3) not run" in plain
    assert "dropout/e-8 (seeds 3) not run" in plain and "dropout/e-8 (seeds 1) not finished (interrupted)" in plain
    assert "CPU s/epoch" in plain and "15 (1.50 ×)" in plain
    assert "experts: 6 runs count, 0 are missing" in said and "backbone: 0 runs count, 6 are missing" in said
    assert plain.index("**one seed** (Dropout)") < plain.index("**better** (Experts)"), "bad news first"
    assert plain.count("**better**") == 1, "the groups of an earlier study are not told again"
    for name in ("experts/index.html", "experts/figures/curve-val-top1.svg", "dropout/report.md"):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "backbone").exists()
    links = re.findall(r"\]\(([^)]+)\)", plain)
    assert len(links) >= 5 and all((tmp_path / link).exists() for link in links)
    assert page.count("data:image/svg+xml;base64,") == plain.count(".svg)") and "<script" not in page
    local = re.findall(r'href="([^"]+)"', page)
    assert local and all((tmp_path / "out" / link).is_file() for link in local)
    assert str(tmp_path) not in plain + page


def test_experts_as_the_baseline_are_judged_the_other_way_round(runs: Path, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for name, top1 in (("small", 0.5), ("large", 0.7)):
            width = {"model.width": 0.5 if name == "small" else 0.7}
            write_run(runs / "wide", 0, seed, top1 + 0.001 * seed, folder=f"{name}_seed-{seed}", overrides=width)
    own = "runs: [experts/e-8, wide/small, wide/large], baseline: condconv.experts=8"
    plain, _, _ = make(runs, tmp_path / "out", file=f"{FILE}  wide: {{title: Wide, question: Q, {own}}}\n")
    places = [plain.index(f"(Wide): static, width {width}") for width in (0.7, 0.5)]
    assert places[0] < plain.index("(Experts)") < places[1], "larger static networks that win speak against experts"
    assert re.search(r"\*\*better\*\* \(Wide\): static, width 0.7: \+\d+", plain)


def test_a_target_is_missed_only_where_the_interval_says_so(runs: Path, tmp_path: Path) -> None:
    """+1.1 points, between 0.85 and 1.35."""
    for points, verdict in ((1.0, "met"), (1.2, "not shown"), (2.0, "missed")):
        plain, _, _ = make(runs, tmp_path / "out", file=FILE.replace("points: 0.3", f"points: {points}"))
        assert f"| Experts | **{verdict}** |" in plain


def test_the_studies_of_a_target_are_averaged_by_seed(runs: Path, tmp_path: Path) -> None:
    """Experts gain 1.0, 1.2, 1.1 points; the other backbone 2.0 and 0.0 with the first two seeds: 1.5 and 0.6."""
    assert "averaged by seed" not in make(runs, tmp_path / "one")[0]
    for seed, gain in ((1, 0.02), (2, 0.0), (4, 0.9)):
        for experts in (0, 8):
            top1 = 0.5 + gain * (experts > 0)
            write_run(
                runs / "backbone", experts, seed, top1, folder=f"e-{experts}_seed-{seed}", overrides={"model.width": 2}
            )
    plain, _, _ = make(runs, tmp_path / "out")
    # The t quantile of one degree of freedom is 12.706, so half the interval is 12.706 x 0.45.
    figures = "+1.05 points (95 % interval −4.67 to +6.77, n = 2)"
    assert f"| All of these together, averaged by seed (2 studies) | **not shown** | {figures} |" in plain
    assert "no part of" in plain


def test_a_finished_run_is_not_replaced_by_another_root(runs: Path, tmp_path: Path) -> None:
    """Neither by a job that is only planned there, nor by a run that failed, nor by one that ended earlier."""
    other = tmp_path / "other" / "experts"
    write_run(other, 8, 1, 0.9, folder="e-8_seed-1", ended="2026-01-30T00:00:00+00:00")
    write_run(other, 8, 2, 0.9, folder="e-8_seed-2", status="failed", ended="2026-02-01T00:00:00+00:00")
    (other / "sweep.json").write_text(json.dumps({"command": [], "jobs": {"e-8_seed-3": {}, "e-8_seed-4": {}}}))
    plain, _, said = make(runs, tmp_path / "out", f"runs={tmp_path / 'other'}")
    assert "8 experts: +1.10 points" in plain and "experts: 6 runs count, 1 are missing" in said
    assert "experts/e-8 (seeds 4) not run" in plain, "planned, and nowhere else"
    report = (tmp_path / "out" / "experts" / "report.md").read_text()
    left_out = report.split("## Left out")[1].split("\n## ")[0]
    assert left_out.count("| e-8") == 1
    assert re.search(r"duplicate of \S+e-8\\_seed-1 \(other figures\), which ended later and counts", left_out)
    # The other way round, the run of the second root ended last.
    plain, _, _ = make(tmp_path / "other", tmp_path / "again", f"runs={runs}")
    assert "8 experts: +1.10 points" in plain


def test_a_study_names_the_sweeps_of_its_own_runs_alone(runs: Path, tmp_path: Path) -> None:
    for name in ("experts", "dropout"):
        content = {"command": ["train.py", "-m", f"sweep={name}"], "jobs": {}}
        (runs / name / "sweep.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    plain, _, _ = make(runs, out)
    experts, dropout = ((out / name / "report.md").read_text() for name in ("experts", "dropout"))
    assert all("sweep=experts" in text for text in (plain, experts, dropout))
    assert "sweep=dropout" in plain and "sweep=dropout" in dropout and "sweep=dropout" not in experts


def test_nothing_run_yet(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "experts", 0, 1, folder="e-0_seed-1", status="running")
    plain, _, _ = make(tmp_path / "runs", tmp_path / "out")
    assert "Nothing was run" in plain and plain.count("**Not run.**") == 4
    assert "experts/e-0 (seeds 1) not finished (running)" in plain


def test_notes_stand_on_the_page(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("## Limits\n\nWritten by *hand*.\n")
    plain, page, _ = make(runs, tmp_path / "out", f"notes={tmp_path / 'notes.md'}")
    assert "Written by *hand*." in plain and "Written by <em>hand</em>." in page


def test_the_routing_analysis_beside_the_page(runs: Path, tmp_path: Path) -> None:
    plain, _, _ = make(runs, tmp_path / "out")
    assert re.search(r"## Routing of the best network\n\n\*\*Not run", plain)
    (tmp_path / "out" / "analysis").mkdir()
    (tmp_path / "out" / "analysis" / "index.md").write_text(
        "# Routing of x\n\n- 3 dead.\n\n## Pictures\n\n![](a.png)\n"
    )
    plain, page, _ = make(runs, tmp_path / "out")
    assert "\n- 3 dead.\n" in plain and "a.png" not in plain and "](out/analysis/index.md)" in plain
    assert 'href="analysis/index.md"' in page


def test_wrong_files_and_options_are_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is no file of studies: KeyError: 'title'"):
        make(runs, tmp_path / "out", file="studies: {}")
    with pytest.raises(ReportError, match=r"is no file of studies: TypeError: .*'run'"):
        make(runs, tmp_path / "out", file=FILE.replace("'More?', runs", "'More?', run"))
    with pytest.raises(ReportError, match="metric= does not go with studies="):
        make(runs, tmp_path / "out", "metric=val/top1")


def test_each_seed_of_an_upcycled_network_is_in_one_group(tmp_path: Path) -> None:
    for seed in (1, 2):
        for experts in (0, 8):
            pretrained = {"pretrained": f"experts/e-0_seed-{seed}/checkpoints/last.ckpt"}
            write_run(tmp_path / "runs" / "up", experts, seed, folder=f"e-{experts}_seed-{seed}", overrides=pretrained)
    text = "title: T\nlead: L\nseeds: [1]\nstudies: {up: {title: Up, question: Q, runs: [up/e-0, up/e-8]}}\n"
    plain, _, _ = make(tmp_path / "runs", tmp_path / "out", file=text)
    assert re.search(r"\| 8 experts \| 2 \| [\d.]+ ± [\d.]+ \| \+0.00", plain)


def test_a_study_may_have_seeds_of_its_own(runs: Path, tmp_path: Path) -> None:
    own = FILE.replace("runs: [backbone/e-0, backbone/e-8]", "runs: [backbone/e-0, backbone/e-8], seeds: [11]")
    plain, _, _ = make(runs, tmp_path / "out", file=own)
    assert "backbone/e-0 (seeds 11) not run; backbone/e-8 (seeds 11) not run" in plain
    assert "dropout/e-8 (seeds 3) not run" in plain, "the others have those of the page"


def test_the_studies_of_cifar10_are_those_of_the_sweeps() -> None:
    studies = read_studies(ROOT / "docs" / "results" / "cifar10" / "studies.yaml")
    folders = {name.partition("/")[0] for study in studies.studies for name in study.runs}
    sweeps = {path.stem for path in (ROOT / "configs" / "sweep" / "cifar10").glob("*.yaml")}
    assert folders == sweeps - {"backbones"}  # of the full protocol
    assert studies.target is not None
    assert set(studies.target.studies) <= {study.name for study in studies.studies}
