"""Runs made small and portable for git: what a report says of the copies is what it says of the runs."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from run_folders import write_run

from reports.collect import collect, collect_analysis, thinned
from reports.comparison import compare
from reports.metrics import read_metrics
from reports.runs import ReportError, find_folders, read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed in (1, 2):
        for experts in (0, 8):
            write_run(root / "experts", experts, seed, 0.6 + 0.01 * experts, folder=f"experts-{experts}_seed-{seed}")
        more = {"condconv.dropout": 0.1, "resume": None, "data.root": f"{tmp_path}/elsewhere/images"}
        write_run(root / "other", 8, seed, folder=f"experts-8_seed-{seed}", overrides=more, error=f"see {root}/other/x")
    write_run(root / "experts", 8, 3, status="interrupted", folder="experts-8_seed-3")
    sweep = {"command": ["train.py", f"sweep_dir={root}/experts"], "jobs": {}, "fixed": [f"data.root={tmp_path}/x"]}
    (root / "experts" / "sweep.json").write_text(json.dumps(sweep))
    return root


def test_copies_hold_no_path_of_this_machine(runs: Path, tmp_path: Path) -> None:
    copied, unfinished = collect(runs, tmp_path / "out")
    assert len(copied) == 6 and unfinished == ["experts/experts-8_seed-3"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"config.yaml", "metrics.csv", "result.json", "sweep.json"}
    assert [path for path in files if str(tmp_path) in path.read_text()] == []
    config = yaml.safe_load((tmp_path / "out" / "other" / "experts-8_seed-1" / "config.yaml").read_text())
    assert config["data"]["root"] == "images" and config["paths"]["run"] == "other/experts-8_seed-1"


def test_a_report_of_the_copies_is_the_same(runs: Path, tmp_path: Path) -> None:
    collect(runs, tmp_path / "out")
    own, copies = ([read_run(folder) for folder in find_folders([root])] for root in (runs, tmp_path / "out"))
    one, other = compare(own), compare(copies)
    assert [(row.value, row.difference) for row in one.rows] == [(row.value, row.difference) for row in other.rows]
    assert len(one.rows) == 3 and one.rows[1].difference is not None and one.rows[1].difference.n == 2
    (runs / "experts" / "experts-0_seed-1" / "analysis").mkdir()
    (runs / "experts" / "experts-0_seed-1" / "analysis" / "metrics.csv").write_text("step\n")
    assert list(find_folders([runs])) == [run.folder for run in own], "an analysis is no run"
    finished = [run for run in own if run.status == "finished"]
    for run, copy in zip(finished, copies, strict=True):
        for name, points in run.curves.items():
            assert [x for x, _ in points] == [x for x, _ in copy.curves[name]]
            assert [y for _, y in points] == pytest.approx([y for _, y in copy.curves[name]], rel=1e-4)


def test_one_line_for_each_epoch(tmp_path: Path) -> None:
    lines = [
        "step,epoch,train/loss,val/top1,speed/images_per_second,routing/a/entropy,lr-SGD/weight",
        "9,0,2.0,,100,,0.1", "10,,,,300,0.9,0.1", "19,0,1.0,0.5,,,0.1", "29,1,0.5,0.6,200,,0.1", "30,,,,,0.8,",
    ]  # fmt: skip
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "thin.csv").write_text(thinned(tmp_path / "metrics.csv"))
    with (tmp_path / "thin.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[0]["train/loss"] == "1.5" and rows[0]["speed/images_per_second"] == "200"
    assert (rows[0]["routing/a/entropy"], rows[1]["routing/a/entropy"]) == ("", "0.8")
    assert "lr-SGD/weight" not in rows[0]
    assert read_metrics(tmp_path / "thin.csv")[0]["val/top1"] == [(1.0, 0.5), (2.0, 0.6)]


def test_what_was_collected_stays_and_later_runs_replace_it(runs: Path, tmp_path: Path) -> None:
    collect(runs, tmp_path / "out")
    assert collect(runs, tmp_path / "out")[0] == []
    sweep = runs / "experts" / "sweep.json"
    for job in ("experts-0_seed-1", "experts-0_seed-9"):  # of two machines, say, each with jobs of its own
        sweep.write_text(json.dumps(json.loads(sweep.read_text()) | {"jobs": {job: []}}))
        collect(runs, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "experts" / "sweep.json").read_text())["jobs"]) == 2
    result = runs / "experts" / "experts-0_seed-1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"ended": "2027-01-01T00:00:00+00:00"}))
    for path in (runs / "other" / "experts-8_seed-1").iterdir():
        path.unlink()
    assert collect(runs, tmp_path / "out")[0] == ["experts/experts-0_seed-1"]
    assert (tmp_path / "out" / "other" / "experts-8_seed-1" / "result.json").is_file()


def test_copies_among_the_runs_are_refused(runs: Path) -> None:
    with pytest.raises(ReportError, match="lies in runs="):
        collect(runs, runs / "out")
    with pytest.raises(ReportError, match="there is no such folder"):
        collect(runs / "nothing", runs.parent / "out")


def test_a_routing_analysis(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "analysis"
    folder.mkdir(parents=True)
    rng = random.Random(1)
    noise = Image.frombytes("RGB", (64, 64), bytes(rng.randrange(256) for _ in range(3 * 64 * 64)))
    noise.save(folder / "by_depth.png")
    noise.save(folder / "top_images_classifier.png")  # images of somebody's data set: they stay behind
    (folder / "by_depth.svg").write_text("<svg/>")
    (folder / "layers.csv").write_text("a,b\n")
    (folder / "metrics.csv").write_text("a,b\n")
    (folder / "embedding.csv").write_text("x" * 100_000)
    text = f"# Routing of x\n\n- Made in {tmp_path}/run.\n\n## Depth\n\nWords.\n\n![](by_depth.png)\n\n"
    text += "## Images of the experts\n\nMore words.\n\n![](top_images_classifier.png)\n\n## Numbers\n\n"
    text += "[layers.csv](layers.csv), [embedding.csv](embedding.csv)\n"
    (folder / "index.md").write_text(text)
    written = collect_analysis(folder, tmp_path / "out")
    assert {path.name for path in written} == {"index.md", "by_depth.png", "layers.csv"}
    assert (tmp_path / "out" / "by_depth.png").stat().st_size < (folder / "by_depth.png").stat().st_size / 2
    page = (tmp_path / "out" / "index.md").read_text()
    assert page.count("## ") == 2 and "![](by_depth.png)" in page and "top_images" not in page
    assert "[layers.csv](layers.csv)" in page and "embedding" not in page and str(tmp_path) not in page
    with pytest.raises(ReportError, match=r"there is no index\.md; python eval.py ckpt=... analysis=routing"):
        collect_analysis(tmp_path, tmp_path / "out")


def test_the_command(runs: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "reports.collect", f"runs={runs}", f"out={tmp_path / 'out'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "copied 6 finished runs" in done.stdout and "1 are not finished" in done.stdout
    assert subprocess.run(words[:3], cwd=ROOT, capture_output=True, text=True).returncode == 2
