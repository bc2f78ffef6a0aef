"""When checkpoints are made, and how a training stops between two steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment

from models.callbacks.resuming import ExactResume
from models.checkpoint_files import save
from models.ema import WeightAverageCallback
from models.progress import BEFORE_VALIDATION, BETWEEN_BATCHES, BETWEEN_EPOCHS, is_epoch_complete, position
from models.stopping import Agreement, Stopped, StopRequests, describe


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on: after every epoch, within epochs, and when training has to stop.

    All processes stop and save at the same step. On several processes a validation that has begun is finished first:
    they may have different numbers of batches, so there is no moment between two at which all meet.

    Args:
        dirpath: the folder, `<run>/checkpoints`.
        keep: versions to keep, `last.ckpt`, `last-1.ckpt`, ...; the older ones are for the case that a file is damaged.
        every_n_epochs: a checkpoint after so many epochs. After the last one there is always one.
        every_n_train_steps: one after so many optimiser steps, or None.
        every_n_minutes: one when the last is so old, at the next step, or None.

    Attributes:
        requests: who may ask training to stop; None leaves signals alone. train.py sets it.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        keep: int = 2,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        every_n_minutes: float | None = 15,
    ) -> None:
        for name, value in (
            ("keep", keep),
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"callbacks.last.{name}={value}: expected a whole number of at least 1.")
        if every_n_minutes is not None and every_n_minutes < 0:
            raise ValueError(f"callbacks.last.every_n_minutes={every_n_minutes}: expected a number of at least 0.")
        self.path = Path(dirpath) / "last.ckpt"
        self.keep = keep
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.requests: StopRequests | None = None
        self._saved: tuple[int, str] = (0, BETWEEN_EPOCHS)  # step and place; nothing to save before the first step
        self._saved_s = 0.0
        self._agreement: Agreement | None = None

    @classmethod
    def obey(cls, requests: StopRequests, callbacks: Iterable[Callback]) -> None:
        """Let these requests stop the training that the callbacks belong to."""
        for callback in callbacks:
            if isinstance(callback, cls):
                callback.requests = requests

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if hasattr(writer, "keep"):
            writer.keep[self.path] = self.keep

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agreement = Agreement()
        # A finished epoch that is loaded would only be saved again; a validation that was not made yet will be.
        place = (
            BETWEEN_EPOCHS if trainer.fit_loop.epoch_loop.batch_progress.current.completed == 0 else BEFORE_VALIDATION
        )
        self._saved, self._saved_s = (trainer.global_step, place), time.monotonic()
        if self.requests is not None:
            self.requests.install()  # Lightning has put its own handlers there
            self.requests.deferring = True
            # It would ask the other processes at every step, with a synchronisation of the GPU.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not after the step before: its line of the log is not written by then.
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        stop, overdue = self._ask(trainer)
        if stop or ((self._due(trainer) or overdue) and step != self._saved[0]):
            self._save(trainer, BETWEEN_BATCHES)
        self._stop(trainer, stop)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        stop, overdue = self._ask(trainer, now=True)
        if stop or overdue:
            self._save(trainer, BEFORE_VALIDATION)
        self._stop(trainer, stop)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.world_size == 1 and trainer.state.fn == "fit" and not trainer.sanity_checking and self.requests:
            stop = self.requests.requested()
            if stop:
                self._save(trainer, BEFORE_VALIDATION)
            self._stop(trainer, stop)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            return
        stop, overdue = self._ask(trainer, now=True)
        due = trainer.current_epoch % self.every_n_epochs == 0 or self._due(trainer)
        if stop or overdue or (due and self._saved != (trainer.global_step, BETWEEN_EPOCHS)):
            self._save(trainer, BETWEEN_EPOCHS)
        self._stop(trainer, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop, _ = self._ask(trainer, now=True)  # after the last validation no epoch starts that would ask
        # max_steps may end an epoch in its middle, and a longer training goes on with its other batches.
        place = BETWEEN_EPOCHS if is_epoch_complete(trainer) else BETWEEN_BATCHES
        if self._saved != (trainer.global_step, place):
            self._save(trainer, place)
        self._leave()
        self._stop(trainer, stop, "after the last epoch")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.requests is not None:
            self.requests.deferring = False

    def _due(self, trainer: Trainer) -> bool:
        return self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0

    def _ask(self, trainer: Trainer, now: bool = False) -> tuple[int, bool]:
        """Why to stop (0: do not), and whether a checkpoint is overdue; the same on all processes."""
        assert self._agreement is not None
        request = self.requests.requested() if self.requests is not None else None
        age_s = time.monotonic() - self._saved_s
        overdue = self.every_n_minutes is not None and age_s >= 60 * self.every_n_minutes and trainer.is_global_zero
        stop, save_now = self._agreement.exchange([request or 0, int(overdue)], now)
        return stop, bool(save_now) and trainer.global_step != self._saved[0]

    def _save(self, trainer: Trainer, place: str) -> None:
        start = time.monotonic()
        states = [each for each in trainer.callbacks if isinstance(each, ExactResume)]  # type: ignore[attr-defined]
        for state in states:
            state.place = position(trainer, place)
        try:
            save(trainer, self.path)
        finally:
            for state in states:
                state.place = None
        self._saved, self._saved_s = (trainer.global_step, place), time.monotonic()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "leave_out"):
                callback.leave_out(self._saved_s - start)

    def _stop(self, trainer: Trainer, reason: int | None, place: str | None = None) -> None:
        if not reason:
            return
        assert self.requests is not None and self._agreement is not None
        self._agreement.finish(0)
        if trainer.is_global_zero:
            place = place or f"epoch {trainer.current_epoch + 1}"
            print(
                f"{describe(reason)}: stopped, saved at step {trainer.global_step}, {place}. "
                f"To go on: python train.py resume={self.path.parent.parent}",
                file=sys.stderr,
                flush=True,
            )
            for logger in trainer.loggers:
                if hasattr(logger, "mark_preempted"):
                    logger.mark_preempted()
        raise Stopped(0 if started_by_lightning(trainer) else self.requests.code(reason))


def started_by_lightning(trainer: Trainer) -> bool:
    """Whether this process was started by Lightning in the first one, which ends violently if any of them fails."""
    environment = trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None
    return isinstance(environment, LightningEnvironment) and not trainer.is_global_zero


class BestCheckpoint(ModelCheckpoint):
    """Lightning's choice of the best epochs; a checkpoint that cannot be written, or must not be, stops all processes.

    With `save_top_k` above 1 give the files names: `filename='best-epoch{epoch:03d}'` (Hydra wants the quotes).

    Args:
        mode: whether the largest ("max") or the smallest ("min") value is the best; None: the smallest of a loss.
        options: of Lightning's `ModelCheckpoint`.
    """

    def __init__(self, *, monitor: str | None = None, mode: str | None = None, **options: Any) -> None:
        is_loss = str(monitor).rpartition("/")[2].startswith("loss")
        super().__init__(monitor=monitor, mode=mode or ("min" if is_loss else "max"), **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the first step: an evaluation must have the figure, else the first epoch would end in vain.

        Raises:
            ValueError: it has not.
        """
        super().setup(trainer, pl_module, stage)
        names = getattr(pl_module, "figure_names", ())
        averaged = any(isinstance(each, WeightAverageCallback) for each in trainer.callbacks)  # type: ignore[attr-defined]
        known = [f"{part}/{name}" for part in (("val", "val_ema") if averaged else ("val",)) for name in names]
        if stage != "fit" or self.monitor is None or not names or self.monitor in known:
            return
        asked = f"callbacks.checkpoint.monitor={self.monitor}"
        if self.monitor.startswith("val_ema/") and not averaged:
            instead = self.monitor.replace("val_ema/", "val/")
            raise ValueError(
                f"{asked}: without callbacks.average no averaged weights are evaluated. Add "
                f"callbacks.checkpoint.monitor={instead}"
            )
        raise ValueError(f"{asked}: an evaluation has no such figure. Choose one of: {', '.join(known)}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best epochs so far, also when the run's folder was moved: Lightning would forget them."""
        before, now = str(state_dict.get("dirpath")), str(self.dirpath)

        def follow(path: str) -> str:
            return now + path[len(before) :] if path.startswith(before) else path

        state_dict = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state_dict[key] = follow(state_dict[key])
        state_dict["best_k_models"] = {follow(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        save(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
