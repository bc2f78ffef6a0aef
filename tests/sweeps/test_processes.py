"""Sweeps as users start them, in processes of their own: killed and started again, distributed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.results import read_result
from sweeps.jobs import state_on_disk

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model=mobilenet_v1",
    "model.width=0.25",
    "condconv.experts=2",
    "trainer.limit_val_batches=1",
    "data.batch_size_per_device=8",
    "callbacks.routing=null",
    "test=false",
    "logger=none",
]


def sweep(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "-m", *TINY, f"sweep_dir={folder}", *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_stopped_goes_on(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = sweep(folder, "seed=1,2", "trainer.max_epochs=20", "trainer.limit_train_batches=2")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = folder / "seed-1" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last.exists(), process.communicate()[0]
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command again" in out
    assert state_on_disk(folder / "seed-1") == "unfinished" and state_on_disk(folder / "seed-2") == "new"
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed-1 running  goes on from its checkpoint" in done.stdout
    results = [read_result(folder / f"seed-{seed}") for seed in (1, 2)]
    assert [result["status"] for result in results] == ["finished"] * 2
    assert [(result["epochs"], result["steps"]) for result in results] == [(20, 40)] * 2
    assert [result["parts"] for result in results] == [2, 1]


@pytest.mark.slow
def test_a_distributed_job_has_one_folder(tmp_path: Path) -> None:
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    command = sweep(tmp_path / "sweep", "seed=1", *ddp, "trainer.max_epochs=1", "trainer.limit_train_batches=2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "sweep" / "job")
    assert result["status"] == "finished" and result["devices"] == 2
    assert [path.parent.name for path in tmp_path.rglob("config.yaml")] == ["job"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]
