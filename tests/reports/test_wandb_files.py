"""Offline folders of W&B as the installed wandb writes them, whole and damaged."""

from __future__ import annotations

import builtins
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import CONFIG, write_run

from reports.comparison import compare
from reports.runs import find_folders, read_run, why_not


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that wandb itself recorded, with a config longer than a block of its log."""
    import wandb

    root = tmp_path_factory.mktemp("wandb run")
    config = {**CONFIG, "long": "x" * 100_000}
    run = wandb.init(mode="offline", dir=str(root), project="p", name="<b>name</b>", config=config)
    for epoch in range(3):
        run.log(
            {"epoch": epoch, "val/top1": 0.2 * epoch, "train/loss": 2.0 - epoch, "trainer/global_step": 10 * epoch + 9}
        )
    run.log({"epoch": 3, "test/top1": 0.4, "model/params": 1000, "speed/images_per_second": 50.0})
    run.summary.update({"result/seconds": 120.0, "result/peak_memory_mb": 900.0, "result/status": "finished"})
    run.finish()
    folder = next(root.rglob("offline-run-*"))
    deadline = time.monotonic() + 20
    while why_not(read_run(folder)) and time.monotonic() < deadline:  # its own process writes the end later
        time.sleep(0.05)
    return folder


def test_a_finished_run_counts(offline: Path) -> None:
    folders = list(find_folders([offline.parent.parent]))
    assert folders == [offline], "and not a second time through latest-run"
    run = read_run(offline)
    assert why_not(run) == "" and run.problems == []
    assert run.name == "<b>name</b>"
    assert run.config["model"]["name"] == "mobilenet_v1" and len(run.config["long"]) == 100_000
    assert run.curves["val/top1"] == [(1.0, 0.0), (2.0, 0.2), (3.0, 0.4)]
    assert run.figures["test/top1"] == 0.4
    assert run.number("model.params") == 1000 and run.number("images_per_second") == 50.0
    assert run.number("seconds") == 120.0 and run.number("peak_memory_mb") == 900.0 and run.number("epochs") == 3
    assert [row.label for row in compare([run]).rows] == ["static"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_log_is_a_run_that_did_not_finish(offline: Path, tmp_path: Path, share: float) -> None:
    content = next(offline.glob("*.wandb")).read_bytes()
    (tmp_path / "run-x.wandb").write_bytes(content[: int(share * len(content))])
    assert why_not(read_run(tmp_path)) != ""


def test_a_resumed_run_is_one_run(offline: Path, tmp_path: Path) -> None:
    name = next(offline.glob("*.wandb")).name
    content = (offline / name).read_bytes()
    for second, kept in (("1", len(content) // 2), ("2", len(content))):
        part = tmp_path / f"offline-run-2026010{second}-abc"
        part.mkdir()
        (part / name).write_bytes(content[:kept])
    (run,) = [read_run(folder) for folder in find_folders([tmp_path])]
    assert run.folder.name == "offline-run-20260102-abc" and why_not(run) == ""
    assert len(run.curves["val/top1"]) == 3


def test_a_damaged_log_is_said(offline: Path, tmp_path: Path) -> None:
    content = bytearray(next(offline.glob("*.wandb")).read_bytes())
    content[500] ^= 255
    (tmp_path / "run-x.wandb").write_bytes(content)
    run = read_run(tmp_path)
    assert why_not(run) and "wrong checksum" in run.problems[0]


def test_plain_files_beside_it_win(offline: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, top1=0.77)
    (run / "wandb").mkdir()
    (run / "wandb" / "offline-run-1-x").symlink_to(offline)
    assert list(find_folders([tmp_path])) == [run]
    assert read_run(run / "wandb" / "offline-run-1-x").figures["test/top1"] == 0.77


def test_without_wandb_it_says_what_is_needed(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("wandb"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install wandb" in why_not(read_run(offline))
