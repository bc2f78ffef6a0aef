"""Whatever lies in a folder: it is read, or listed with the reason, and never averaged in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import write_run

from reports.comparison import compare
from reports.metrics import read_metrics
from reports.runs import ReportError, Run, find_folders, find_sweeps, planned, read_run, why_not


def left_out(root: Path) -> dict[str, str]:
    runs = [read_run(folder) for folder in find_folders([root])]
    return {run.folder.name: run.reason for run in compare(runs).left_out}


def test_reasons(tmp_path: Path) -> None:
    write_run(tmp_path, folder="good")
    write_run(tmp_path, folder="failed", status="failed", error="out of memory", seed=2)
    write_run(tmp_path, folder="killed", status="running", seed=3)
    write_run(tmp_path, folder="stopped", status="interrupted", error="SIGTERM", seed=4)
    write_run(tmp_path, folder="nan", top1=float("nan"), seed=5)
    write_run(tmp_path, folder="null", figures={"test/top1": None}, seed=12)
    write_run(tmp_path, folder="figureless", figures={}, seed=6)
    write_run(tmp_path, folder="no result", seed=7)
    (tmp_path / "no result" / "result.json").unlink()
    write_run(tmp_path, folder="half a result", seed=8)
    (tmp_path / "half a result" / "result.json").write_text('{"status": "finished", "figu')
    write_run(tmp_path, folder="no config", seed=9)
    (tmp_path / "no config" / "config.yaml").unlink()
    write_run(tmp_path, folder="half a config", seed=10)
    (tmp_path / "half a config" / "config.yaml").write_text("model: {name: [")
    write_run(tmp_path, folder="a list", seed=11)
    (tmp_path / "a list" / "result.json").write_text("[1, 2]")
    found = left_out(tmp_path)
    parts = {
        "failed": "failed: out of memory",
        "killed": "result.json says running",
        "stopped": "interrupted: SIGTERM",
        "nan": "its test/top1 is not a finite number",
        "null": "its test/top1 is not a finite number",
        "figureless": "has no figure test/top1",
        "no result": "no readable result.json",
        "half a result": "no readable result.json",
        "no config": "no config.yaml",
        "half a config": "config.yaml cannot be read",
        "a list": "no readable result.json",
    }
    assert found.keys() == parts.keys()
    assert [name for name, part in parts.items() if part not in found[name]] == []


def test_jobs_of_a_sweep_without_a_run_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path, folder="experts-0_seed-1")
    jobs = {"experts-0_seed-1": ["seed=1"], "experts-0_seed-2": ["seed=2"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"command": ["train.py", "-m", "name='a b'"], "jobs": jobs}))
    (sweep,) = find_sweeps([tmp_path], [run])
    assert sweep.command == ["train.py", "-m", "name='a b'"]
    (missing,) = planned(sweep, [run])
    assert missing.name == "experts-0_seed-2" and "not started" in why_not(missing)
    (tmp_path / "sweep.json").write_text("[")
    assert find_sweeps([tmp_path], [run])[0].jobs == ()


def test_unexpected_types_in_a_result_are_survived(tmp_path: Path) -> None:
    path = write_run(
        tmp_path, seconds="long", model=[1], best=None, peak_memory_mb=True, versions=3, command="x", epochs=0
    )
    run = read_run(path)
    assert run.number("seconds") is None and run.number("model.params") is None and run.number("peak_memory_mb") is None
    row = compare([run]).rows[0]
    assert row.params is None and row.seconds_per_epoch is None and row.peak_memory_mb is None


def test_truncated_metrics(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "metrics.csv"
    whole, _, problem = read_metrics(path)
    assert problem == "" and len(whole["val/top1"]) == 8 and [x for x, _ in whole["val/top1"]] == list(range(1, 9))
    text = path.read_text()
    for end in range(0, len(text), 23):
        path.write_text(text[:end])
        curves, _, _ = read_metrics(path)
        for metric in ("val/top1", "val/loss"):
            values = dict(whole[metric])
            assert all(values[x] == y for x, y in curves.get(metric, [])), f"half a number was believed at {end}"


def test_metrics_with_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,epoch,val/top1\n0,0,0.5\nx,y,z\n1,1\n2,1,0.6,7,8\n3,2,nan\n\xff\xfe,\x00,\n4,3,0.7\n")
    curves, _, problem = read_metrics(path)
    assert curves["val/top1"] == [(1.0, 0.5), (2.0, 0.6), (4.0, 0.7)]
    assert "lines have missing or extra fields" in problem


def test_a_step_that_a_resume_repeats_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss,val/top1\n0,0,4,\n1,0,100,0.1\n1,0,2,0.3\n")
    curves, _, _ = read_metrics(path)
    assert curves == {"train/loss": [(1.0, 3.0)], "val/top1": [(1.0, 0.3)]}


def test_without_epochs_curves_are_over_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/top1\n10,0.1\n20,0.2\n")
    assert read_metrics(path)[0] == {"val/top1": [(10.0, 0.1), (20.0, 0.2)]}


def test_folders_are_found_once_and_through_links(tmp_path: Path) -> None:
    run = write_run(tmp_path / "real" / "deep")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "config.yaml").write_text("a: 1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    assert [folder.name for folder in find_folders([tmp_path, tmp_path / "real"])] == [run.name]
    assert list(find_folders([run])) == [run]


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no such folder"):
        list(find_folders([tmp_path / "nowhere"]))


def test_config_loading_runs_no_code(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    run = read_run(path)
    assert not (tmp_path / "made").exists() and run.status == "unreadable"


def test_nan_in_json_is_a_number_to_refuse(tmp_path: Path) -> None:
    assert Run(tmp_path, result={"seconds": float("nan")}).number("seconds") is None
