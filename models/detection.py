"""Object detection as a LightningModule: the parts of the loss, and COCO's figures over the images of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from models.boxes import Detection
from models.coco_evaluation import FIGURES, CocoFigures, Result, coco_results, evaluate_over_ranks
from models.detection_losses import NOTHING, detection_losses, match
from models.module import NetworkModule, ScheduleMaker
from models.ssd_network import SSD

Batch = tuple[Tensor, list[dict[str, Any]]]
PARTS = ("loss", "loss_class", "loss_box")
STAGES = ("val", "val_ema", "test", "test_ema")
SHOWN = ("AP", "AP50")


class LossPerMatch(Metric):
    """The loss of all batches over all their matched anchors, which does not depend on the batch size as means do."""

    full_state_update = False
    total: Tensor
    matched: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("matched", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, matched: Tensor) -> None:
        """Take in a batch: its loss over its matched anchors (over 1 where there are none), and how many these are."""
        self.total += loss.detach() * matched.clamp(min=1)
        self.matched += matched

    def compute(self) -> Tensor:
        """Over 1 where nothing is matched, as in a batch."""
        return self.total / self.matched.clamp(min=1)


class DetectionModule(NetworkModule):
    """Focal loss or hard negative mining on classes, smooth L1 on boxes; COCO's twelve figures in evaluation.

    The trainer's data module says what is measured: `ground_truth()` and `category_ids`. Every image that an evaluation
    looked at counts once, however many processes there are. With a weight average every evaluation is made twice, with
    the raw weights (`val/...`) and with the averaged ones (`val_ema/...`).

    Args:
        net: the detector; whether it has a background class decides between focal loss and hard negative mining.
        num_classes: of the data.
        optimizer, schedule, channels_last, compile: see `NetworkModule`.
        alpha, gamma: of the focal loss.
        negatives_per_positive: of hard negative mining.
        iou_threshold: from which an anchor is matched to a box.
        class_weight, box_weight: of the parts of the loss.

    Attributes:
        figures: of the last evaluation by stage, for callbacks: the twelve and those of each class.
        results: of the last evaluation by stage, in COCO's format; on the first process.
    """

    net: SSD
    learns_boxes = True
    figure_names = (*FIGURES, *PARTS)

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        *,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        schedule: ScheduleMaker | None = None,
        alpha: float = 0.75,
        gamma: float = 2.0,
        negatives_per_positive: float = 3.0,
        iou_threshold: float = 0.5,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        if not isinstance(net, SSD):
            raise ValueError("Detection needs a detector: model=ssd_mobilenet_v1 or another model=ssd_...")
        super().__init__(net, optimizer=optimizer, schedule=schedule, channels_last=channels_last, compile=compile)
        self.num_classes = num_classes
        self.iou_threshold = iou_threshold
        self.weights = {"class": class_weight, "box": box_weight}
        self.loss_options = {
            "loss": "hard_negative" if net.softmax else "focal",
            "alpha": alpha,
            "gamma": gamma,
            "negatives_per_positive": negatives_per_positive,
        }
        self.means = nn.ModuleDict(
            {f"{stage}_means": nn.ModuleDict({part: LossPerMatch() for part in PARTS}) for stage in STAGES}
        )
        self.figures: dict[str, CocoFigures] = {}
        self.results: dict[str, list[Result]] = {}
        self._found: dict[str, dict[int, list[Result]]] = {}

    def losses(
        self, outputs: tuple[Tensor, Tensor], targets: list[dict[str, Any]], together: bool = False
    ) -> dict[str, Tensor]:
        """`loss`, its parts `loss_class` and `loss_box`, and `matched`, the matched anchors per image.

        Args:
            outputs: of the network.
            targets: of the images.
            together: all processes are here: gradients, which are averaged over them, become those of one large batch.
        """
        classes, boxes = match(targets, self.net.anchors, self.iou_threshold)
        divisor = matched_over_ranks(classes != NOTHING) if together else None
        parts = detection_losses(
            *outputs,
            classes,
            boxes,
            self.net.anchors,
            num_matched=divisor,
            **self.loss_options,  # type: ignore[arg-type]
        )
        total = self.weights["class"] * parts["class"] + self.weights["box"] * parts["box"]
        return {"loss": total, "loss_class": parts["class"], "loss_box": parts["box"], "matched": parts["matched"]}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.losses(self(images), targets, together=True)
        for name, value in losses.items():
            shown = {"prog_bar": name == "loss", "batch_size": len(images)}
            self.log(f"train/{name}", value.detach(), on_step=True, on_epoch=False, **shown)
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Detection]:
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> list[Detection]:
        return self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._measure("val")

    def on_test_epoch_end(self) -> None:
        self._measure("test")

    def _start(self, stage: str) -> None:
        self._found = {stage: {}}
        if self.weight_average is not None:
            self._found[f"{stage}_ema"] = {}

    def _evaluate(self, stage: str, batch: Batch) -> list[Detection]:
        """Take in a batch; returns the detections of the raw weights, or of the averaged ones if they are kept."""
        found = self._look(stage, batch)
        if self.weight_average is not None:
            with self.weight_average.applied(self.net):
                found = self._look(f"{stage}_ema", batch)
        return found

    def _look(self, stage: str, batch: Batch) -> list[Detection]:
        images, targets = batch
        outputs = self(images)
        losses = self.losses(outputs, targets)
        means = self.means[f"{stage}_means"]
        for part in PARTS:
            means[part].update(losses[part], losses["matched"] * len(images))
            self.log(f"{stage}/{part}", means[part], on_step=False, on_epoch=True)
        detections = self.net.detect(outputs)
        category_ids = self.trainer.datamodule.category_ids  # type: ignore[attr-defined]
        for found, target in zip(detections, targets, strict=True):
            self._found[stage][int(target["image_id"])] = coco_results(
                int(target["image_id"]),
                found["boxes"],
                found["scores"],
                found["labels"],
                original_size=tuple(target["original_size"]),
                input_size=(self.net.image_size, self.net.image_size),
                category_ids=category_ids,
            )
        return detections

    def _measure(self, stage: str) -> None:
        """Log the twelve figures; all processes come here together."""
        truth = self.trainer.datamodule.ground_truth  # type: ignore[attr-defined]
        for name in (stage, f"{stage}_ema"):
            if name not in self._found:
                continue
            figures, results = evaluate_over_ranks(truth, self._found[name])
            self.figures[name], self.results[name] = figures, results
            for key in FIGURES:
                # All processes have the same figures. The largest of equal numbers is exact, their mean may be rounded.
                shown = key in SHOWN and name == stage
                self.log(f"{name}/{key}", figures[key], prog_bar=shown, sync_dist=True, reduce_fx="max")
        self._found = {}


def matched_over_ranks(positive: Tensor) -> Tensor:
    """Matched anchors per process, at least 1 in all; with several processes, all of them must come here."""
    count = positive.sum()
    if not (dist.is_available() and dist.is_initialized()):
        return count.clamp(min=1)
    dist.all_reduce(count)
    return count.clamp(min=1) / dist.get_world_size()
