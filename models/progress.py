"""Where a training stands, between two batches, before a validation or between two epochs, and Lightning's counters.

Lightning saves its loops' counters at whatever point of a step a checkpoint is made, and guesses from them on loading
what was done already; made at some points, it skips a validation or logs a step under another number (2.6). Here
checkpoints for resuming are made at these places only, and the counters are written so that Lightning goes on exactly
there. Tests compare resumed runs with uninterrupted ones bit for bit at every place.
"""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer

BETWEEN_BATCHES = "between batches"
BEFORE_VALIDATION = "before validation"
WITHIN_EPOCH = "before validation within an epoch"
BETWEEN_EPOCHS = "between epochs"


def position(trainer: Trainer, place: str) -> dict[str, Any]:
    """`epoch` and `batch` come next (0-based); with `BEFORE_VALIDATION` all batches of the epoch are done.

    It becomes `WITHIN_EPOCH` if they are not: `trainer.val_check_interval`, or `trainer.max_steps` which ends here.
    """
    if place == BEFORE_VALIDATION and not is_epoch_complete(trainer):
        place = WITHIN_EPOCH
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    if place == BETWEEN_EPOCHS:
        return {"place": place, "epoch": epochs.processed, "batch": 0}
    # Not `processed`: an epoch in which max_steps ended the training counts as processed too.
    return {"place": place, "epoch": epochs.started - 1, "batch": batches.completed}


def is_epoch_complete(trainer: Trainer) -> bool:
    """Whether the last batch that was trained on is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def set_counters(loops: dict[str, Any], at: dict[str, Any]) -> None:
    """Write the counters of a checkpoint's `loops` so that a training goes on `at` a position."""
    fit = loops["fit_loop"]
    done_epochs, mid_epoch = at["epoch"], at["place"] != BETWEEN_EPOCHS
    for counters in fit["epoch_progress"].values():
        counters.update(ready=done_epochs + mid_epoch, started=done_epochs + mid_epoch)
        counters.update(processed=done_epochs, completed=done_epochs)
    progress = fit["epoch_loop.batch_progress"]
    progress["is_last_batch"] = at["place"] == BEFORE_VALIDATION
    total = progress["total"]["completed"]
    progress["total"].update(ready=total, started=total, processed=total)
    progress["current"].update(dict.fromkeys(progress["current"], at["batch"]))
    # One validation batch that was started and not finished is how Lightning says "validation has to be run".
    validation = fit["epoch_loop.val_loop.batch_progress"]
    begun = int(at["place"] in (BEFORE_VALIDATION, WITHIN_EPOCH))
    for counters in (validation["total"], validation["current"]):
        counters.update(ready=begun, started=begun, processed=0, completed=0)
    validation["is_last_batch"] = False


def begin_epoch_anew(trainer: Trainer) -> None:
    """For a training that goes on between two epochs: nothing is left to be restarted.

    With `max_steps` Lightning believes otherwise, and would count a step that is not made.
    """
    loop = trainer.fit_loop
    for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        each._restarting = False
