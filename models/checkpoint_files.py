"""How checkpoints get to the disk, and what happens to the training if they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from condconv.files import save_sealed


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; the one before is intact."""


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's plug-in that writes checkpoints by `condconv.files`: whole, synced, with their checksum.

    An error is kept in `failure` instead of being raised: only one process writes, and the others must hear of it
    before any of them stops. `save` below tells them.

    Attributes:
        keep: how many versions of a file to keep; 1 for files that are not in here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keep: dict[Path, int] = {}
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.failure = None
        try:
            save_sealed(checkpoint, path, self.keep.get(Path(path), 1))
        except OSError as error:
            self.failure = error


class StateGuard(Callback):
    """A callback that `save` asks, on every process, whether the present state may be saved."""

    def check_state(self, trainer: Trainer) -> None:
        """Raises on all processes if the state must not replace a good checkpoint."""
        raise NotImplementedError


def save(trainer: Trainer, path: str | Path) -> None:
    """Save a checkpoint; every process calls this.

    Raises:
        CheckpointFailed: on all processes, if it could not be written.
        Exception: whatever a `StateGuard` among the callbacks raises.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning adds it to Trainer at run time
        if isinstance(callback, StateGuard):
            callback.check_state(trainer)
    trainer.save_checkpoint(path)
    writer = trainer.strategy.checkpoint_io
    failure = getattr(writer, "failure", None)
    reason = trainer.strategy.broadcast(failure and (failure.strerror or str(failure)))
    if reason is not None:
        before = f" {path} of an earlier step is intact." if Path(path).exists() else ""
        raise CheckpointFailed(
            f"Cannot write the checkpoint {path}: {reason}. Training stops at step {trainer.global_step}.{before} "
            f"Make room (or the folder writable), then go on: python train.py resume={Path(path).parent.parent}"
        )
