"""What a checkpoint needs, besides Lightning's entries, so that a resumed run equals the uninterrupted one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

from models.progress import BEFORE_VALIDATION, BETWEEN_EPOCHS, begin_epoch_anew, set_counters

KEY = "run_state"


class ExactResume(Callback):
    """Saves and restores the position in the epoch, random generators, metrics of the epoch, and loggers.

    Generators and metrics are those of every process. The data need no state of their own: order and augmentation are
    pure functions of (seed, epoch, index), so the data module is told the position (`resume_at`) and its loader starts
    there, however many batches its workers had fetched ahead; torchdata's StatefulDataLoader would save generators
    that nothing here draws from. The same holds for mixup (`models.mixing`).

    A training that starts seeds every process but the first anew: Lightning gives all of them one seed, and they would
    drop the same neurons, paths and routing weights at the same places of their batches.

    Must come before other callbacks that look at the epoch's figures.
    """

    def __init__(self) -> None:
        self.place: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.place is None:  # best.ckpt: nobody resumes from it
            return
        set_counters(checkpoint["loops"], self.place)
        mine = {"rng": random_state(pl_module.device), "metrics": epoch_metrics(trainer, pl_module)}
        shown = {key: float(value) for key, value in trainer.callback_metrics.items()}
        loggers = [logger.checkpoint_state() for logger in trainer.loggers if hasattr(logger, "checkpoint_state")]
        processes = _gather(mine)
        checkpoint[KEY] = {"position": self.place, "processes": processes, "shown": shown, "loggers": loggers}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(KEY)
        if state is None:  # of an earlier version: made at the end of an epoch
            return
        self._loaded = state
        at = state["position"]
        if hasattr(trainer.datamodule, "resume_at"):
            trainer.datamodule.resume_at(at["epoch"], at["batch"])
        for logger, saved in zip(
            [logger for logger in trainer.loggers if hasattr(logger, "restore")], state["loggers"], strict=False
        ):
            logger.restore(saved)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is None:
            draw_apart(trainer.global_rank)
            return
        if self._loaded["position"]["place"] == BETWEEN_EPOCHS:
            begin_epoch_anew(trainer)
        show(trainer, self._loaded["shown"])
        processes = self._loaded["processes"]
        if len(processes) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is of {len(processes)} processes, now there are {trainer.world_size}: random "
                f"generators and the epoch's training metrics start anew."
            )
            self._loaded = None
            draw_apart(trainer.global_rank)
            return
        mine = processes[trainer.global_rank]
        restore_metrics(pl_module, mine["metrics"])
        set_random_state(mine["rng"], pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._loaded is not None:  # where a validation within an epoch is due, Lightning miscounts the resumed step
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None and self._loaded["position"]["place"] == BEFORE_VALIDATION:
            # No training step of this process has told Lightning of these figures.
            modules = dict(pl_module.named_modules())
            for path, saved in self._loaded["processes"][trainer.global_rank]["metrics"].items():
                pl_module.log(saved["name"], modules[path], on_step=False, on_epoch=True, prog_bar=True)
        self._loaded = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:  # of a complete training, which is only evaluated: it did not start again
            show(trainer, self._loaded["shown"])
            self._loaded = None


def show(trainer: Trainer, figures: dict[str, float]) -> None:
    """Let `trainer.callback_metrics` have these figures."""
    trainer._logger_connector._callback_metrics.update({key: torch.tensor(each) for key, each in figures.items()})


def draw_apart(rank: int) -> None:
    """Seed torch's generators by the present seed and the rank; the first process keeps its own, as one alone does."""
    if rank > 0:
        digest = hashlib.blake2b(repr((torch.initial_seed(), "rank", rank)).encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of torch (CPU and, on a GPU, the device's), numpy and python, as plain types."""
    version, internal, gauss = random.getstate()
    name, keys, at, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), at, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore `random_state`; a GPU's generator only on a GPU."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, at, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), at, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def epoch_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What the metric objects of this epoch's training steps have counted, by their path in the module."""
    paths = {id(module): path for path, module in pl_module.named_modules() if isinstance(module, Metric)}
    saved: dict[str, Any] = {}
    for result in trainer.fit_loop.epoch_loop._results.values():
        metric = getattr(result, "value", None)
        if not isinstance(metric, Metric) or id(metric) not in paths or not metric._update_count:
            continue
        states = {name: _copy(getattr(metric, name)) for name in metric._defaults}
        saved[paths[id(metric)]] = {"name": result.meta.name, "updates": metric._update_count, "states": states}
    return saved


def restore_metrics(pl_module: LightningModule, saved: dict[str, Any]) -> None:
    """Restore `epoch_metrics`."""
    modules = dict(pl_module.named_modules())
    for path, entry in saved.items():
        metric = modules[path]
        assert isinstance(metric, Metric)
        for name, value in entry["states"].items():
            setattr(metric, name, _copy(value, metric.device))
        metric._update_count = entry["updates"]
        metric._computed = None


def _copy(value: Any, device: torch.device | str = "cpu") -> Any:
    if isinstance(value, Sequence):
        return [_copy(each, device) for each in value]
    return value.detach().clone().to(device)


def _gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return every
