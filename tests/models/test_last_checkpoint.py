"""When LastCheckpoint saves and stops, without a training; tests/test_survival.py has real ones."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.callbacks import ExactResume, LastCheckpoint
from models.progress import BETWEEN_EPOCHS
from models.stopping import Stopped, StopRequests


class Trainer(SimpleNamespace):
    """What the callback looks at."""

    def __init__(self, epoch: int, step: int) -> None:
        progress = SimpleNamespace(current=SimpleNamespace(completed=0))
        loop = SimpleNamespace(batch_progress=progress, _num_ready_batches_reached=lambda: True)
        super().__init__(
            current_epoch=epoch, global_step=step, fit_loop=SimpleNamespace(epoch_loop=loop), loggers=[],
            is_global_zero=True, world_size=1, strategy=None, accumulate_grad_batches=1,
        )  # fmt: skip


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Steps and places of the checkpoints."""
    places: list[tuple[int, str]] = []

    def save(self: LastCheckpoint, trainer: Any, place: str) -> None:
        self._saved = (trainer.global_step, place)
        places.append(self._saved)

    monkeypatch.setattr(LastCheckpoint, "_save", save)
    return places


def started(tmp_path: Path, **options: Any) -> LastCheckpoint:
    callback = LastCheckpoint(tmp_path / "run" / "checkpoints", **options)
    callback.on_train_start(Trainer(0, 0), None)  # type: ignore[arg-type]
    return callback


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_request_of_the_last_validation_is_kept(
    saved_before: bool, saved: list[tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, trainer = started(tmp_path), Trainer(3, 12)
    callback.requests = StopRequests(exit_code=75)
    callback.requests.deferring = True
    callback.requests._note(signal.SIGTERM, None)
    assert "is finished and saved first" in capsys.readouterr().err
    if saved_before:
        callback._saved = (12, BETWEEN_EPOCHS)
    with pytest.raises(Stopped) as stop:
        callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert stop.value.code == 75 and not callback.requests.deferring
    assert saved == ([] if saved_before else [(12, BETWEEN_EPOCHS)])
    said = capsys.readouterr().err
    assert "saved at step 12, after the last epoch" in said and f"resume={tmp_path / 'run'}" in said


def test_without_a_request_the_end_is_saved_and_nothing_is_stopped(
    saved: list[tuple[int, str]], tmp_path: Path
) -> None:
    started(tmp_path).on_train_end(Trainer(3, 12), None)  # type: ignore[arg-type]
    assert saved == [(12, BETWEEN_EPOCHS)]


def test_so_many_steps_count_also_where_an_epoch_ends(saved: list[tuple[int, str]], tmp_path: Path) -> None:
    """Epochs of 4 steps: step 4 is asked about between two epochs, the others before a batch."""
    callback = started(tmp_path, every_n_train_steps=2, every_n_epochs=100)
    for epoch in range(3):
        callback.on_train_epoch_start(Trainer(epoch, 4 * epoch), None)  # type: ignore[arg-type]
        for batch in range(4):
            callback.on_train_batch_start(Trainer(epoch, 4 * epoch + batch), None, None, batch)  # type: ignore[arg-type]
    assert [step for step, _ in saved] == [2, 4, 6, 8, 10]
    assert saved[1] == (4, BETWEEN_EPOCHS)


def test_a_complete_training_that_is_resumed_shows_its_figures() -> None:
    shown: dict[str, Any] = {}
    trainer: Any = SimpleNamespace(
        _logger_connector=SimpleNamespace(_callback_metrics=shown), loggers=[], datamodule=None
    )
    callback = ExactResume()
    place = {"place": BETWEEN_EPOCHS, "epoch": 3, "batch": 0}
    state = {"position": place, "processes": [{}], "shown": {"val/top1": 0.5}, "loggers": []}
    callback.on_load_checkpoint(trainer, None, {"run_state": state})  # type: ignore[arg-type]
    callback.on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert shown == {"val/top1": 0.5}
