"""What a checkpoint holds besides Lightning's own entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class SavedConfig(Callback):
    """Puts the run's config into every checkpoint, so that a file that was moved still says how it was made.

    Args:
        config: resolved, plain types only: checkpoints load with `weights_only=True`.
        note: called with the trainer at every checkpoint, on every process.
    """

    KEY = "config"

    def __init__(self, config: dict[str, Any], note: Callable[[Trainer], None] | None = None) -> None:
        self.config = config
        self.note = note

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.KEY] = self.config
        # A network that leaves its run (export.py, predict.py) has no data to ask for them.
        checkpoint["class_names"] = list(getattr(trainer.datamodule, "class_names", ()))
        if self.note is not None:
            self.note(trainer)
