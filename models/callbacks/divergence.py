"""Stops a training whose loss is no number any more, before it can replace a good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from models.callbacks.checkpoints import LastCheckpoint
from models.checkpoint_files import StateGuard

_NONE = 2**62


class Diverged(RuntimeError):
    """The loss or the weights became NaN or infinite."""


class FiniteLoss(StateGuard):
    """Raises `Diverged`, on all processes, after a step whose loss is NaN or infinite.

    The loss of every step is looked at on its own device, without waiting for it; the answer is fetched every
    `every_n_steps` steps and before each checkpoint. Before a checkpoint weights and buffers are looked at too: the
    loss tells of bad weights only one step later.

    Args:
        every_n_steps: optimiser steps between two answers.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None
        self._steps: dict[int, str] = {}  # epoch and learning rate of each step since the last answer
        self._checked_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=pl_module.device)
        self._steps.clear()
        self._checked_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        self._steps[trainer.global_step + 1] = f"epoch {trainer.current_epoch + 1}, learning rate {rate:.3g}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        step = trainer.global_step
        if isinstance(loss, Tensor) and self._first_bad is not None:
            seen = torch.where(torch.isfinite(loss.detach()), _NONE, step)
            torch.minimum(self._first_bad, seen, out=self._first_bad)
        if step % self.every_n_steps == 0 and step != self._checked_step:
            self._check_loss(trainer)

    def check_state(self, trainer: Trainer) -> None:
        self._check_loss(trainer)
        values: list[Tensor] = [*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers()]
        if (average := getattr(trainer.lightning_module, "weight_average", None)) is not None:
            values += average.state_dict()["state_dict"].values()
        good = all_finite(values)
        if _minimum(trainer, int(good)) == 0:
            step = trainer.global_step
            name = _first_bad_name(trainer.lightning_module)
            raise Diverged(
                f"The weights are NaN or infinite after step {step}{self._when(step)}"
                f"{f', first in {name}' if name else ''}. {_advice(trainer)}"
            )

    def _check_loss(self, trainer: Trainer) -> None:
        if self._first_bad is None:
            return
        first = _minimum(trainer, int(self._first_bad))
        if first != _NONE:
            raise Diverged(f"The loss is NaN or infinite at step {first}{self._when(first)}. {_advice(trainer)}")
        self._checked_step = trainer.global_step
        self._steps = {step: words for step, words in self._steps.items() if step >= trainer.global_step}

    def _when(self, step: int) -> str:
        """In brackets; the trainer may be in a later epoch by now. Nothing of steps before a resume."""
        return f" ({self._steps[step]})" if step in self._steps else ""


def all_finite(values: list[Tensor]) -> bool:
    """Whether no floating-point tensor holds NaN or infinity; one synchronisation for all of them."""
    answers = [torch.isfinite(value.detach()).all() for value in values if value.is_floating_point()]
    return bool(torch.stack([answer.to(answers[0].device) for answer in answers]).all()) if answers else True


def _first_bad_name(module: nn.Module) -> str | None:
    named = [*module.named_parameters(), *module.named_buffers()]
    return next((name for name, value in named if not all_finite([value])), None)


def _minimum(trainer: Trainer, value: int) -> int:
    """The smallest of the processes' values."""
    if trainer.world_size == 1:
        return value
    shared = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
    return int(shared)


def _advice(trainer: Trainer) -> str:
    paths = [Path(each.path) for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)]  # type: ignore[attr-defined]
    place = "".join(f"The last good checkpoint is untouched: {path}. " for path in paths if path.exists())
    return f"Training stops. {place}Usual remedies: a smaller optim.lr, longer warm-up, trainer.gradient_clip_val=1."
