"""result.json: what a run says about itself while it runs, when it ends well, and when it does not."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY
from hydra import compose, initialize_config_dir

import train as train_module
from condconv.complexity import complexity
from configs.results import RunRecord, read_result, training_speed, write_result
from train import build_network, train

ROOT = Path(__file__).resolve().parents[2]
# Contract with report.py and the sweeps: all of these, always.
KEYS = {
    "status",
    "name",
    "command",
    "overrides",
    "started",
    "ended",
    "seconds",
    "cpu_seconds",
    "epochs",
    "steps",
    "figures",
    "best",
    "model",
    "images_per_second",
    "peak_memory_mb",
    "memory_kind",
    "device",
    "threads",
    "devices",
    "commit",
    "dirty",
    "versions",
    "error",
}


def compose_train(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=[*TINY, *overrides])


def test_a_finished_run_says_everything(tmp_path: Path) -> None:
    cfg = compose_train(f"paths.run={tmp_path}", "trainer.max_epochs=2", "model.drop_rate=0.0")
    figures = train(cfg)
    result = read_result(tmp_path)
    assert result is not None and set(result) >= KEYS
    assert result["status"] == "finished" and result["error"] is None
    assert result["figures"] == figures and "test/top1" in figures
    assert (result["epochs"], result["steps"], result["parts"]) == (2, 6, 1)
    assert result["name"] == "mobilenet_v1-e2-s1" and result["devices"] == 1 and result["threads"] == 1
    assert 0 < result["cpu_seconds"] < 2 * result["seconds"] and result["seconds"] < 300
    assert result["started"] <= result["ended"]
    assert result["best"] == {"val/top1": max(float(r["val/top1"]) for r in rows(tmp_path) if r["val/top1"])}
    net = complexity(build_network(cfg.model, cfg.condconv, 10), 32)
    assert result["model"] == {
        "params": net.params,
        "madds": net.madds,
        "static_params": net.static_params,
        "static_madds": net.static_madds,
    }
    windows = [float(r["speed/images_per_second"]) for r in rows(tmp_path) if r["speed/images_per_second"]]
    assert len(windows) > 1 and result["images_per_second"] == statistics.median(windows[1:])
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert not list(tmp_path.glob("*.tmp"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(75), "interrupted", None),
        (ValueError("the disk is a cheese"), "failed", "the disk is a cheese"),
        (OSError(28, "No space left on device", "/x"), "failed", "/x: No space left on device."),
    ],
)
def test_a_run_that_breaks_off_says_why(
    error: BaseException, status: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fit(self: Any, *arguments: Any, **options: Any) -> None:
        seen.append(read_result(tmp_path))
        raise error

    monkeypatch.setattr(train_module.pl.Trainer, "fit", fit)
    with pytest.raises(type(error)):
        train(compose_train(f"paths.run={tmp_path}"))
    assert seen[0]["status"] == "running" and seen[0]["ended"] is None
    result = read_result(tmp_path)
    assert (result["status"], result["error"]) == (status, message) and result["ended"] is not None


def test_a_resumed_run_adds_up(tmp_path: Path) -> None:
    train(compose_train(f"paths.run={tmp_path}"))
    first = read_result(tmp_path)
    write_result(
        tmp_path, {**first, "status": "running", "seconds": 1000.0, "cpu_seconds": 900.0, "command": ["the", "first"]}
    )
    train(compose_train(f"resume={tmp_path}"))
    result = read_result(tmp_path)
    assert result["status"] == "finished" and result["parts"] == 2
    assert result["seconds"] > 1000.0 and result["cpu_seconds"] > 900.0 and result["command"] == ["the", "first"]
    assert result["started"] == first["started"]


class Saver:
    monitor = "val/top1"
    best_model_score = torch.tensor(0.25)


class Trainer:
    current_epoch = 3
    global_step = 30
    checkpoint_callbacks = (Saver(), object())


def test_a_kill_loses_only_what_no_checkpoint_has(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "run")
    record.note(Trainer())
    result = read_result(tmp_path)
    assert (result["status"], result["epochs"], result["steps"]) == ("running", 3, 30)
    assert result["best"] == {"val/top1": 0.25} and result["seconds"] > 0


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "run")
    record.enabled = False
    record.note(Trainer())
    record.end("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "unheard of"}', "\x00"])
def test_broken_files_are_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path) is None
    assert read_result(tmp_path / "nowhere") is None


def test_figures_without_a_number_are_null(tmp_path: Path) -> None:
    write_result(tmp_path, {"status": "failed", "figures": {"train/loss": float("nan"), "a": [float("inf"), 1.5]}})
    raw = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert raw["figures"] == {"train/loss": None, "a": [None, 1.5]}


def test_speed_of_short_and_broken_logs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert training_speed(path) is None
    path.write_text("step,speed/images_per_second\n0,\n1,50\n")
    assert training_speed(path) == 50.0
    path.write_text("step,speed/images_per_second\n0,1\n1,50\n2,70\n3,60\n")
    assert training_speed(path) == 60.0
