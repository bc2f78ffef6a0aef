"""What every training module shares: one network, its memory format, optimiser and schedule, its moving average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from condconv.complexity import Complexity, complexity
from models.ema import WeightAverage
from models.optim import keep_settings
from models.schedules import Schedule, StepSchedule

ScheduleMaker = Callable[..., Schedule]


class NetworkModule(pl.LightningModule):
    """A LightningModule around one network; what is learned and measured is the subclass's.

    Args:
        net: images float `[N, 3, H, W]` -> its outputs.
        optimizer: network -> optimiser; None for evaluation alone.
        schedule: (steps_per_epoch=, total_epochs=) -> function from the optimiser step to a factor of the learning
            rate, applied before every optimiser step; None keeps it constant.
        channels_last: memory format of images and kernels; values are the same, CPUs are twice as fast.
        compile: compile the network in place, so that the keys of its weights keep their names.

    Attributes:
        weight_average: the moving average of the weights, where `models.ema.WeightAverageCallback` keeps one; every
            evaluation is then made twice, with the raw weights and with the averaged ones.
        learns_boxes: whether the data must hold boxes, or must not.
        figure_names: what an evaluation logs, without its stage: the names that `monitor` may have.
    """

    learns_boxes = False
    figure_names: tuple[str, ...] = ()

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        schedule: ScheduleMaker | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule
        self.channels_last = channels_last
        self.weight_average: WeightAverage | None = None
        self._counted: dict[int, Complexity] = {}
        if channels_last:
            net.to(memory_format=torch.channels_last)
        if compile:
            net.compile()

    def complexity(self, image_size: int) -> Complexity:
        """`condconv.complexity` of the network on square images, counted once: it takes as long as some steps do.

        Raises:
            ValueError: the network cannot run on such images.
        """
        if image_size not in self._counted:
            self._counted[image_size] = complexity(self.net, image_size)
        return self._counted[image_size]

    def check_data(self, data: Any) -> None:
        """Whether network and data belong together.

        Raises:
            ValueError: a classifier meets boxes, or a detector images without boxes.
        """
        if hasattr(data, "ground_truth") == self.learns_boxes:
            return
        name = getattr(data, "name", type(data).__name__)
        if self.learns_boxes:
            raise ValueError(f"A detector learns from boxes, and data={name} has none: take data=digit_scenes or coco.")
        raise ValueError(
            f"data={name} is for object detection, and this network classifies images: take model=ssd_mobilenet_v1 or "
            f"another model=ssd_..., or other data."
        )

    def forward(self, images: Tensor) -> Any:
        """The network's outputs for normalised images `[N, 3, H, W]` of any floating dtype."""
        images = images.to(floating_dtype(self.net))  # float64 with trainer.precision=64-true
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            raise ValueError("This module was built for evaluation: it has no optimiser.")
        optimizer = self.optimizer(self.net)
        keep_settings(optimizer)
        if self.schedule is None:
            return optimizer
        self.trainer.fit_loop.setup_data()  # which Lightning leaves for later where max_steps is given alone
        total_steps = self.trainer.estimated_stepping_batches
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        factor = self.schedule(steps_per_epoch=steps_per_epoch, total_epochs=total_steps / steps_per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": StepSchedule(optimizer, factor), "interval": "step"},
        }


def floating_dtype(net: nn.Module) -> torch.dtype:
    """The dtype of a network's parameters, which its images must have too."""
    return next((each.dtype for each in net.parameters() if each.is_floating_point()), torch.get_default_dtype())
