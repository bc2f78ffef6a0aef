"""BatchNorm statistics over groups of examples, arranged when the processes of a training know each other."""

from __future__ import annotations

from typing import Literal

import pytorch_lightning as pl

from models.batchnorm import group_batchnorm


class BatchNormGroups(pl.Callback):
    """Computes the training statistics of every BatchNorm of `pl_module.net` over groups of `examples` images.

    Args:
        examples: images per group, smaller or larger than the batch of one device; "all" is the batch of all devices;
            None leaves every device its own statistics.
        batch_size_per_device: see `models.batchnorm.group_batchnorm`, also for the errors.
    """

    def __init__(self, examples: int | Literal["all"] | None, batch_size_per_device: int) -> None:
        self.examples = examples
        self.batch_size_per_device = batch_size_per_device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.examples is not None:
            group_batchnorm(pl_module.net, self.examples, self.batch_size_per_device)
