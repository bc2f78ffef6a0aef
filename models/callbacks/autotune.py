"""Measure the backends of CondConv layers before training instead of choosing them by rule."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from condconv import autotune
from models.module import floating_dtype


class Autotune(pl.Callback):
    """Times every backend for each CondConv layer of `pl_module.net` once, at the start of training.

    Measurements are kept in the user's cache folder (`condconv.autotune`); the first process measures for all.

    Args:
        enabled: nothing happens when False.
        image_size: height and width of the images, in pixels.
        batch_size_per_device: images per step and device.
        in_chans: channels of the images.
    """

    def __init__(self, enabled: bool, image_size: int, batch_size_per_device: int, in_chans: int = 3) -> None:
        self.enabled = enabled
        self.size = (batch_size_per_device, in_chans, image_size, image_size)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and print which backend each layer gets."""
        if not self.enabled:
            return
        # Only shape and dtype count.
        images = torch.zeros(self.size, device=pl_module.device, dtype=floating_dtype(pl_module.net))
        if next((p for p in pl_module.net.parameters() if p.dim() == 4), images).is_contiguous(
            memory_format=torch.channels_last
        ):
            images = images.contiguous(memory_format=torch.channels_last)
        training = pl_module.net.training
        with trainer.precision_plugin.forward_context():
            explanation = autotune(pl_module.net.train(), images)
        pl_module.net.train(training)
        if trainer.is_global_zero:
            print(f"autotune, batch {self.size[0]}, {self.size[2]} pixels:\n{explanation}")
