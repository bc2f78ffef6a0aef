"""Which networks are measured at which sizes, and the figures that were asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PEAK_MEMORY_TARGET = 1.15
"""Ours over static, of a training step, for every backbone."""
PEAK_MEMORY_OVER_TIMM = {"resnet50": 0.6}


@dataclass(frozen=True)
class Case:
    """One row: a network, a size, a mode; `targets` are the largest ratios (ours / static, ours / timm) asked for."""

    backbone: str
    experts: int
    training: bool
    image_size: int
    batch: int
    dtype: str = "float32"
    device: str = "cpu"
    budget_s: float = 12.0
    targets: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def mode(self) -> str:
        return "training" if self.training else "inference"

    @property
    def id(self) -> str:
        return f"{self.backbone} E={self.experts} {self.mode} {self.image_size}px batch {self.batch} {self.dtype}"

    def as_json(self) -> dict[str, object]:
        """The fields of a row that say what was measured."""
        return {
            "backbone": self.backbone,
            "experts": self.experts,
            "mode": self.mode,
            "image_size": self.image_size,
            "batch": self.batch,
            "dtype": self.dtype,
            "targets": self.targets,
        }

    def batch_of_images(self) -> tuple[Tensor, Tensor]:
        """Random images in channels last and labels of 1000 classes."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.image_size, self.image_size, generator=generator)
        labels = torch.randint(1000, (self.batch,), generator=generator)
        return images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)


def with_targets(device: str) -> list[Case]:
    """The rows of the table of figures to reach, for this kind of device."""
    if device == "cuda":
        targets = {"efficientnet_b0": 1.15, "mobilenet_v1": 1.2, "mobilenet_v2": 1.2, "resnet50": 1.25}
        return [Case(n, 8, True, 224, 256, "bfloat16", "cuda", 20.0, (t, 0.5)) for n, t in targets.items()]
    return [
        Case("efficientnet_b0", 8, True, 32, 64, budget_s=15.0, targets=(1.9, 0.18)),
        Case("efficientnet_b0", 8, True, 64, 64, budget_s=15.0, targets=(2.1, 0.35)),
        Case("efficientnet_b0", 8, True, 224, 16, budget_s=30.0, targets=(1.2, 0.95)),
        Case("efficientnet_b0", 8, False, 224, 1, budget_s=6.0, targets=(1.15, 0.9)),
        Case("resnet50", 8, True, 224, 16, budget_s=45.0, targets=(1.3, 0.8)),
        Case("mobilenet_v1", 32, True, 224, 16, budget_s=24.0, targets=(1.5, 0.7)),
    ]


def of_backbones(
    backbones: list[str],
    device: str,
    batch_sizes: list[int],
    image_size: int,
    experts: int,
    dtype: str,
    budget_s: float,
) -> list[Case]:
    """Inference at every batch size, training at those above 1, which BatchNorm needs.

    A row of `with_targets` is that row, with its targets and rounds: both are written to the same table.
    """
    known = {case.id: case for case in with_targets(device)}
    cases = [
        Case(name, experts, training, image_size, batch, dtype, device, budget_s if training else budget_s / 3)
        for name in backbones
        for training in (True, False)
        for batch in batch_sizes
        if batch > 1 or not training
    ]
    return [known.get(case.id, case) for case in cases]
