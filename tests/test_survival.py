"""A run that is killed and resumed equals the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import csv
import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from survival import (
    EPOCHS,
    MIXUP,
    STEPS_PER_EPOCH,
    TINY,
    assert_same_run,
    at_call,
    finish,
    kill,
    read_metrics,
    run,
    start,
)

from condconv import files
from configs.messages import EXIT_REQUEUE
from configs.results import read_result

pytestmark = pytest.mark.forks

BATCH = "data.batch_size_per_device=16"
OFTEN = "callbacks.last.every_n_minutes=0"  # at every place where a checkpoint can be made
NEVER = "callbacks.last.every_n_minutes=null"  # at the ends of epochs alone


def said(folder: Path, rank: int = 0) -> str:
    return (folder / f"log.{rank}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run([*TINY, BATCH, f"paths.run={folder}"], folder / "log") == [0], said(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes, with mixup."""
    folder = tmp_path_factory.mktemp("undisturbed_pair")
    overrides = [
        *TINY,
        MIXUP,
        "data.batch_size_per_device=8",
        "callbacks.batchnorm.examples=all",
        f"paths.run={folder}",
    ]
    assert run(overrides, folder / "log", ranks=2) == [0, 0], said(folder) + said(folder, 1)
    return folder


def killed(overrides: list[str], folder: Path, before: Callable[[int], None], ranks: int = 1) -> None:
    codes = run([*overrides, f"paths.run={folder}"], folder / "log", ranks, before)
    assert -signal.SIGKILL in codes, said(folder)


# Where the last checkpoint can be: in the middle of an epoch, before a validation, between two epochs.
@pytest.mark.parametrize(
    ("method", "call"),
    [("training_step", 7), ("validation_step", 3), pytest.param("training_step", 5, marks=pytest.mark.slow)],
)
def test_killed_and_resumed(method: str, call: int, undisturbed: Path, tmp_path: Path) -> None:
    killed([*TINY, BATCH, OFTEN], tmp_path, at_call(method, call, kill))
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_killed_from_outside_twice(undisturbed: Path, tmp_path: Path) -> None:
    """At whatever moment the signal comes: a part of a row, of a checkpoint, of a step."""
    overrides = [*TINY, BATCH, OFTEN, f"paths.run={tmp_path}"]
    for steps in (3, 8):
        (process,) = start(overrides, tmp_path / "log")
        while process.is_alive() and rows(tmp_path) < steps:
            time.sleep(0.003)
        process.kill()
        assert finish([process]) == [-signal.SIGKILL], said(tmp_path)
        overrides = [f"resume={tmp_path}"]
    assert run(overrides, tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return len(list(csv.reader(path.open(newline="")))) if path.exists() else 0


def test_two_processes_killed_and_resumed(undisturbed_pair: Path, tmp_path: Path) -> None:
    overrides = [*TINY, MIXUP, "data.batch_size_per_device=8", "callbacks.batchnorm.examples=all", OFTEN]
    killed(overrides, tmp_path, at_call("training_step", 7, kill), ranks=2)
    assert run([f"resume={tmp_path}"], tmp_path / "log", ranks=2) == [0, 0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed_pair)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["run_state"]["processes"]
    assert not torch.equal(*(each["rng"]["torch"] for each in saved))  # dropout is each process's own


POINTS = random.Random(20260).sample(range(2, EPOCHS * STEPS_PER_EPOCH + 1), 6)


@pytest.mark.slow
@pytest.mark.parametrize("step", POINTS)
@pytest.mark.parametrize("often", [OFTEN, NEVER, "callbacks.last.every_n_train_steps=3"])
def test_random_kill_points(step: int, often: str, undisturbed: Path, tmp_path: Path) -> None:
    killed([*TINY, BATCH, often], tmp_path, at_call("training_step", step, kill))
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", random.Random(7).sample(range(2, EPOCHS * STEPS_PER_EPOCH + 1), 3))
def test_random_kill_points_on_two_processes(step: int, rank: int, undisturbed_pair: Path, tmp_path: Path) -> None:
    """One process is killed, the other is left to fail in its exchange."""
    overrides = [*TINY, MIXUP, "data.batch_size_per_device=8", "callbacks.batchnorm.examples=all", OFTEN]
    killed(overrides, tmp_path, at_call("training_step", step, kill, rank), ranks=2)
    assert run([f"resume={tmp_path}"], tmp_path / "log", ranks=2) == [0, 0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed_pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ["data.num_workers=2"],  # which have fetched ahead
        ["trainer.accumulate_grad_batches=2"],
        ["trainer.max_steps=9"],
        ["trainer.check_val_every_n_epoch=2"],  # and after the last epoch, the third
        ["+trainer.val_check_interval=2"],
        ["optim=sgd", "model.drop_path_rate=0.3", "model=efficientnet_b0", "trainer.max_epochs=2"],
    ],
    ids=["workers", "accumulation", "max_steps", "validations", "middles", "efficientnet"],
)
def test_killed_with_other_settings(extra: list[str], tmp_path: Path) -> None:
    expected, folder = tmp_path / "expected", tmp_path / "killed"
    for each in (expected, folder):
        each.mkdir()
    overrides = [*TINY, BATCH, OFTEN, *extra]
    assert run([*overrides, f"paths.run={expected}"], expected / "log") == [0], said(expected)
    for step in (4, 3):  # of this process: the second kill is after a resume
        before = at_call("training_step", step, kill)
        given = overrides if step == 4 else [f"resume={folder}"]
        killed(given, folder, before) if step == 4 else run(given, folder / "log", before=before)
    assert run([f"resume={folder}"], folder / "log") == [0], said(folder)
    assert_same_run(folder, expected)


def test_stopped_in_a_validation_within_an_epoch(tmp_path: Path) -> None:
    """The epoch is not over: its other batches come after the resume, and the validation is made once."""
    expected, folder = tmp_path / "expected", tmp_path / "stopped"
    for each in (expected, folder):
        each.mkdir()
    overrides = [*TINY, BATCH, NEVER, "trainer.max_epochs=2", "+trainer.val_check_interval=2"]
    assert run([*overrides, f"paths.run={expected}"], expected / "log") == [0], said(expected)
    before = at_call("validation_step", 2, send(signal.SIGTERM))  # its last batch, so this validation is complete
    assert run([*overrides, f"paths.run={folder}"], folder / "log", before=before) == [EXIT_REQUEUE], said(folder)
    assert "saved at step 2, epoch 1" in said(folder)
    assert run([f"resume={folder}"], folder / "log") == [0], said(folder)
    assert_same_run(folder, expected)


@pytest.mark.slow
def test_a_longer_training_goes_on_in_the_epoch_that_max_steps_ended(tmp_path: Path) -> None:
    """No image of that epoch is left out: at a constant rate the weights are those of a training of that length."""
    expected, folder = tmp_path / "expected", tmp_path / "longer"
    for each, steps in ((expected, 9), (folder, 6)):
        each.mkdir()
        overrides = [*TINY, BATCH, NEVER, "optim.schedule.name=constant", f"trainer.max_steps={steps}"]
        assert run([*overrides, f"paths.run={each}"], each / "log") == [0], said(each)
    saved = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(saved.replace("max_steps: 6\n", "max_steps: 9\n"))
    assert run([f"resume={folder}"], folder / "log") == [0], said(folder)
    found, wanted = (torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in (folder, expected))
    assert found["run_state"]["position"] == {"place": "between batches", "epoch": 2, "batch": 1}
    for key in ("global_step", "lr_schedulers"):
        assert found[key] == wanted[key]
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(undisturbed: Path, tmp_path: Path) -> None:
    killed([*TINY, BATCH, NEVER], tmp_path, at_call("training_step", 2, kill))
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert "no checkpoint yet" in said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def send(number: int) -> Callable[[object], None]:
    return lambda module: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "method", "call", "code"),
    [
        (signal.SIGTERM, "training_step", 6, EXIT_REQUEUE),
        (signal.SIGUSR1, "validation_step", 1, EXIT_REQUEUE),
        pytest.param(signal.SIGINT, "training_step", 4, 130, marks=pytest.mark.slow),  # the last step of an epoch
    ],
)
def test_signals_stop_between_steps(
    number: int, method: str, call: int, code: int, undisturbed: Path, tmp_path: Path
) -> None:
    before = at_call(method, call, send(number))
    assert run([*TINY, BATCH, NEVER, f"paths.run={tmp_path}"], tmp_path / "log", before=before) == [code]
    assert f"python train.py resume={tmp_path}" in said(tmp_path)
    assert read_result(tmp_path)["status"] == "interrupted"
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (6 if call == 6 else 4)  # the step in which the signal came is not lost
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_signal_in_the_last_validation_stops_before_the_test(undisturbed: Path, tmp_path: Path) -> None:
    before = at_call("validation_step", 2 * EPOCHS, send(signal.SIGTERM))  # its last batch
    codes = run([*TINY, BATCH, NEVER, f"paths.run={tmp_path}"], tmp_path / "log", before=before)
    assert codes == [EXIT_REQUEUE], said(tmp_path)
    assert "saved at step 12, after the last epoch" in said(tmp_path)
    assert not any(row.get("test/top1") for row in read_metrics(tmp_path))
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed)
    resumed, whole = read_result(tmp_path), read_result(undisturbed)
    assert resumed["status"] == "finished" and resumed["figures"] == whole["figures"]


def test_a_signal_to_one_process_stops_all_at_the_same_step(undisturbed_pair: Path, tmp_path: Path) -> None:
    overrides = [*TINY, MIXUP, "data.batch_size_per_device=8", "callbacks.batchnorm.examples=all", NEVER]
    before = at_call("training_step", 5, send(signal.SIGTERM), rank=1)
    codes = run([*overrides, f"paths.run={tmp_path}"], tmp_path / "log", 2, before)
    assert codes == [EXIT_REQUEUE, 0], said(tmp_path) + said(tmp_path, 1)  # Lightning kills all if its children fail
    assert run([f"resume={tmp_path}"], tmp_path / "log", ranks=2) == [0, 0], said(tmp_path)
    assert_same_run(tmp_path, undisturbed_pair)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice(module: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    overrides = [*TINY, BATCH, NEVER, f"paths.run={tmp_path}"]
    assert run(overrides, tmp_path / "log", before=at_call("training_step", 2, twice)) == [128 + signal.SIGTERM]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_the_time_limit_stops_and_can_be_resumed(undisturbed: Path, tmp_path: Path) -> None:
    before = at_call("training_step", 3, lambda module: time.sleep(3))
    overrides = [*TINY, BATCH, NEVER, "trainer.max_time=00:00:00:03", f"paths.run={tmp_path}"]
    assert run(overrides, tmp_path / "log", before=before) == [EXIT_REQUEUE], said(tmp_path)
    assert "Time limit (trainer.max_time)" in said(tmp_path)
    assert run([f"resume={tmp_path}", "trainer.max_time=null"], tmp_path / "log") == [0], said(tmp_path)
    assert "trainer.max_time: 00:00:00:03 -> None" in said(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def poison(module: torch.nn.Module) -> None:
    with torch.no_grad():
        next(module.net.parameters()).fill_(float("nan"))


@pytest.mark.parametrize(("every", "step"), [(50, 6), pytest.param(1, 6, marks=pytest.mark.slow)])
def test_nan_stops_before_a_good_checkpoint_is_replaced(every: int, step: int, tmp_path: Path) -> None:
    overrides = [*TINY, BATCH, NEVER, f"callbacks.finite.every_n_steps={every}", f"paths.run={tmp_path}"]
    assert run(overrides, tmp_path / "log", before=at_call("training_step", step, poison)) == [1]
    assert f"The loss is NaN or infinite at step {step} (epoch 2, learning rate " in said(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        assert checkpoint["global_step"] == STEPS_PER_EPOCH
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert read_result(tmp_path)["status"] == "failed"


@pytest.mark.slow
def test_nan_on_one_process_stops_all(tmp_path: Path) -> None:
    before = at_call("training_step", 6, poison, rank=1)
    overrides = [*TINY, "data.batch_size_per_device=8", NEVER, f"paths.run={tmp_path}"]
    assert run(overrides, tmp_path / "log", 2, before) == [1, 1]
    for rank in (0, 1):
        assert "Diverged: The loss is NaN or infinite at step 6" in said(tmp_path, rank)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_stops_all_with_the_last_checkpoint_intact(ranks: int, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        original, calls = files.write_whole, 0

        def write(path: Path, parts: list[bytes], keep: int) -> None:
            nonlocal calls
            calls += 1
            if calls > 3:  # last.ckpt of step 2, best.ckpt and last.ckpt of step 4 are written
                parts = (part for part in full_disk())
            original(path, parts, keep)

        def full_disk() -> Iterator[bytes]:
            yield b"half a checkpoint"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files.write_whole = write

    overrides = [*TINY, "data.batch_size_per_device=8", "callbacks.last.every_n_train_steps=2", f"paths.run={tmp_path}"]
    assert run(overrides, tmp_path / "log", ranks, before) == [1] * ranks
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
    for rank in range(ranks):
        assert f"Cannot write the checkpoint {last}: No space left on device. Training stops at step 6" in said(
            tmp_path, rank
        )
    assert run([f"resume={tmp_path}"], tmp_path / "log", ranks) == [0] * ranks, said(tmp_path)


@pytest.mark.slow
def test_wandb_ends_cleanly_and_goes_on_with_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tiny = [each for each in TINY if not each.startswith("logger")]
    overrides = [*tiny, BATCH, "logger=wandb", "logger.wandb.mode=offline", NEVER, f"paths.run={tmp_path}"]
    before = at_call("training_step", 6, send(signal.SIGTERM))
    assert run(overrides, tmp_path / "log", before=before) == [EXIT_REQUEUE], said(tmp_path)
    name = (tmp_path / "wandb_id").read_text()
    assert run([f"resume={tmp_path}"], tmp_path / "log") == [0], said(tmp_path)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(each.name.endswith(name) for each in runs)
    assert "Traceback" not in said(tmp_path)
