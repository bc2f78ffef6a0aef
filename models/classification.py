"""Image classification as a LightningModule: what is learned, how it is measured, how the steps are scheduled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from models.module import NetworkModule, ScheduleMaker

Batch = tuple[Tensor, Tensor]
STAGES = ("train", "val", "val_ema", "test", "test_ema")
FIGURES = ("top1", "top5", "loss")


class ClassificationModule(NetworkModule):
    """Cross entropy on one network; top-1, top-5 and loss on validation and test images.

    With a weight average (`models.ema.WeightAverageCallback`) every evaluation is made twice, with the raw weights
    (`val/...`) and with the averaged ones (`val_ema/...`).

    Args:
        net: images float `[N, 3, H, W]` -> logits `[N, num_classes]`.
        num_classes: at least 2; top-5 is top-`num_classes` where there are fewer than 5.
        optimizer, schedule, channels_last, compile: see `NetworkModule`.
        activation_checkpointing: keep the activations between blocks only and compute the others again in the backward
            pass: less memory for a third more work. Running statistics of BatchNorm move twice in each step.
        label_smoothing: of the training loss only; reported validation losses are plain cross entropies.
        batch_transform: changes a training batch on the device, (images, labels, num_classes, position) -> (images,
            labels or class probabilities `[N, num_classes]`): the place for `models.mixing.BatchMixer`. The position
            is (epoch, batch, rank), so that what it draws can depend on that alone and is the same after a resume.
    """

    figure_names = FIGURES

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        *,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        schedule: ScheduleMaker | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
        activation_checkpointing: bool = False,
        compile: bool = False,
        batch_transform: Callable[[Tensor, Tensor, int, tuple[int, ...]], Batch] | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"Classification needs at least 2 classes, the data has {num_classes}.")
        if activation_checkpointing:
            if not hasattr(net, "set_grad_checkpointing"):
                raise ValueError(f"task.activation_checkpointing: {type(net).__name__} has no blocks to do it with.")
            net.set_grad_checkpointing(True)
        super().__init__(net, optimizer=optimizer, schedule=schedule, channels_last=channels_last, compile=compile)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.batch_transform = batch_transform
        self.metrics = nn.ModuleDict({f"{stage}_metrics": _stage_metrics(num_classes) for stage in STAGES})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        targets = labels
        if self.batch_transform is not None:
            position = (self.current_epoch, batch_idx, self.global_rank)
            images, targets = self.batch_transform(images, labels, self.num_classes, position)
        logits = self(images)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(
            wide,
            targets.to(wide.dtype) if targets.is_floating_point() else targets,
            label_smoothing=self.label_smoothing,
        )
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True, batch_size=len(images))
        if targets is labels:
            self._measure("train", logits.detach(), labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        self._measure(stage, self(images), labels)
        if self.weight_average is not None:
            with self.weight_average.applied(self.net):
                self._measure(f"{stage}_ema", self(images), labels)

    def _measure(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to the stage's figures, which Lightning logs and resets at the end of the epoch."""
        logits = logits.float()
        metrics = self.metrics[f"{stage}_metrics"]
        metrics["top1"].update(logits, labels)
        self.log(f"{stage}/top1", metrics["top1"], on_step=False, on_epoch=True, prog_bar=True)
        if stage != "train":
            metrics["top5"].update(logits, labels)
            metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            self.log(f"{stage}/top5", metrics["top5"], on_step=False, on_epoch=True)
            self.log(f"{stage}/loss", metrics["loss"], on_step=False, on_epoch=True)


def _stage_metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro", validate_args=False),
            "loss": MeanMetric(nan_strategy="disable"),
        }
    )
