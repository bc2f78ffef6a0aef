"""The figures of the final weights: of a validation of these, and not of the last one that happened to be due."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor


class FinalValidation(Callback):
    """Lets the last step of a training be validated, however rarely validations are due.

    `trainer.check_val_every_n_epoch` need not divide the epochs, and `trainer.max_steps` may end one in its middle. The
    validation is made where it would be, within the training, so that the best checkpoint and the loggers have it.

    Attributes:
        validated_step: of the last validation; None before any.
    """

    def __init__(self) -> None:
        self.validated_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_step = state_dict["validated_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validate_last_epoch(trainer)  # which may be resumed in its middle

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validate_last_epoch(trainer)

    def _validate_last_epoch(self, trainer: Trainer) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.check_val_every_n_epoch = 1
            trainer.val_check_batch = batch_idx + 1  # this one

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated_step = trainer.global_step


def final_figures(trainer: Trainer, module: LightningModule, datamodule: Any) -> dict[str, Tensor]:
    """The figures of a fit that has ended, those of its validation of the final weights.

    A training of `max_steps` that was stopped in its last validation has none, as Lightning takes it for complete when
    it is resumed: it is made here.
    """
    last = next((each for each in trainer.callbacks if isinstance(each, FinalValidation)), None)  # type: ignore[attr-defined]
    if trainer.enable_validation and (last is None or last.validated_step != trainer.global_step):
        before = dict(trainer.callback_metrics)
        trainer.validate(module, datamodule=datamodule, verbose=False)
        return before | trainer.callback_metrics
    return dict(trainer.callback_metrics)
