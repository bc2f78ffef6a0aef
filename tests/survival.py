"""Real training processes that can be killed: forked from the test's process, which has imported everything already."""

from __future__ import annotations

import csv
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import train as train_module
from models.classification import ClassificationModule

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_EPOCH, EPOCHS = 4, 3
# Everything that draws random numbers or keeps a state; 4 batches of 16 images, 3 epochs: about a second.
TINY = (
    "model=mobilenet_v1",
    "model.width=0.25",
    "model.drop_rate=0.2",
    "condconv.experts=2",
    "condconv.dropout=0.2",
    f"trainer.max_epochs={EPOCHS}",
    f"trainer.limit_train_batches={STEPS_PER_EPOCH}",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=1",
    "data.eval_batch_size_per_device=8",
    "trainer.log_every_n_steps=1",
    "callbacks.summary=null",
    "callbacks.routing.max_batches=1",
    "callbacks.average={_target_: models.ema.WeightAverageCallback, decay: 0.9}",
    "logger=none",
)
MIXUP = "task.batch_transform={_target_: models.mixing.BatchMixer, mixup_alpha: 0.5, seed: 3}"


def compose_train(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@cache
def warm_up() -> None:
    """What a training imports late is imported here, once, and the grammar of configs read: a quarter of its time."""
    for name in ("data.digits", "models.callbacks.batchnorm", "sklearn.datasets", "torchvision.transforms.v2"):
        importlib.import_module(name)
    compose_train(*TINY)


def start(
    overrides: Sequence[str], log: Path, ranks: int = 1, before: Callable[[int], None] | None = None
) -> list[ForkProcess]:
    """Training processes (gloo, if several); `before(rank)` runs first in each of them."""
    warm_up()
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_main, args=(overrides, log, rank, ranks, port, before)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[ForkProcess], timeout_s: float = 240) -> list[int]:
    """Exit codes; a process that a signal ended has its negative number."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def run(overrides: Sequence[str], log: Path, ranks: int = 1, before: Callable[[int], None] | None = None) -> list[int]:
    return finish(start(overrides, log, ranks, before))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(
    overrides: Sequence[str], log: Path, rank: int, ranks: int, port: int, before: Callable[[int], None] | None
) -> None:
    output = os.open(log.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if ranks > 1:  # as Lightning starts its processes
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        rank_zero_only.rank = rank
        overrides = [*overrides, "trainer.accelerator=cpu", "trainer.strategy=ddp", f"trainer.devices={ranks}"]
    code = 0
    try:
        if before is not None:
            before(rank)
        train_module.typed = lambda: list(overrides)  # as on a command line, for what is changed on resuming
        train_module.train(compose_train(*overrides))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def at_call(
    method: str,
    number: int,
    action: Callable[[Any], None],
    rank: int | None = None,
    module: type = ClassificationModule,
) -> Callable[[int], None]:
    """For `before`: do something at the n-th call (from 1) of a step of the module; on one rank, or on all."""

    def install(this: int) -> None:
        original, calls = getattr(module, method), 0

        def counted(self: Any, batch: Any, batch_idx: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and rank in (None, this):
                action(self)
            return original(self, batch, batch_idx)

        setattr(module, method, counted)

    return install


def kill(module: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that a clock writes."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same weights, averages, optimiser, schedule, loops, generators and metrics, bit for bit."""
    for name in ("last.ckpt", "best.ckpt"):
        actual, wanted = (torch.load(each / "checkpoints" / name, weights_only=True) for each in (folder, expected))
        differences: list[str] = []
        keys = [
            "state_dict",
            "optimizer_states",
            "lr_schedulers",
            "weight_average",
            "epoch",
            "global_step",
            "run_state",
        ]
        keys = [key for key in keys if key in wanted]
        _compare({key: actual[key] for key in keys}, {key: wanted[key] for key in keys}, name, differences)
        assert not differences, differences[:10]
    assert read_metrics(folder) == read_metrics(expected)


def _compare(actual: Any, expected: Any, path: str, differences: list[str]) -> None:
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            differences.append(f"{path}: keys {sorted(map(str, actual.keys() ^ expected.keys()))}")
            return
        for key in expected:
            if not str(key).startswith("speed/"):
                _compare(actual[key], expected[key], f"{path}.{key}", differences)
    elif isinstance(expected, list | tuple):
        if len(actual) != len(expected):
            differences.append(f"{path}: length {len(actual)} instead of {len(expected)}")
            return
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            _compare(*pair, f"{path}[{index}]", differences)
    elif isinstance(expected, torch.Tensor):
        if not torch.equal(actual, expected):
            differences.append(f"{path}: tensors differ")
    elif actual != expected and not (actual != actual and expected != expected):
        differences.append(f"{path}: {actual} instead of {expected}")
