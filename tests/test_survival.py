"""A run that is killed and resumed equals the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from survival import EPOCHS, MIXUP, STEPS_PER_EPOCH, TINY, assert_same_run, at_call, kill, run, start

EVERY_STEP = "callbacks.last.every_n_train_steps=1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run([*TINY, "data.batch_size_per_device=16", f"paths.run={folder}"], folder / "log") == [0]
    return folder


# Every place where a checkpoint can be the last one: in the middle of an epoch, at its end, in a validation.
@pytest.mark.parametrize(("method", "call"), [("training_step", 7), ("validation_step", 3), ("training_step", 5)])
def test_killed_and_resumed(method: str, call: int, undisturbed: Path, tmp_path: Path) -> None:
    often = ["callbacks.last.every_n_minutes=0"]
    code = run(
        [*TINY, "data.batch_size_per_device=16", *often, f"paths.run={tmp_path}"],
        tmp_path / "log",
        before=at_call(method, call, kill),
    )
    assert code == [-signal.SIGKILL]
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], (tmp_path / "log.0.log").read_text()
    assert_same_run(tmp_path, undisturbed)
