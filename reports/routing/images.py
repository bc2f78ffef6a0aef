"""The images that a routing analysis looks at: in random order, with one label each, and small enough to show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

THUMBNAIL = 64
"""Largest side in pixels of the pictures on contact sheets."""


class Images:
    """Batches (normalised images, one label each) of a data module's evaluation set, in an order that the seed fixes.

    The order is random because folders are read class by class: the first images would all be of few classes, and
    routing would be exchanged within a class.

    Args:
        datamodule: of the project's kind: `val_set`, `make_loader`, `normalize`, `class_names`.
        limit: only the first so many of the order; None for all.
        seed: of the order.
        device: where the network is.
        channels_last: memory format of the images.
    """

    def __init__(
        self, datamodule: Any, limit: int | None, seed: int, device: torch.device, channels_last: bool = False
    ) -> None:
        datamodule.setup("validate")
        self.datamodule, self.device = datamodule, device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.class_names: tuple[str, ...] = tuple(datamodule.class_names)
        self.normalize = datamodule.normalize
        self.available = len(datamodule.val_set)
        self.order = torch.randperm(self.available, generator=torch.Generator().manual_seed(seed)).tolist()[:limit]
        self.batch_size: int = datamodule.eval_batch_size_per_device

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_batches(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def first(self, count: int | None) -> Images:
        """The first so many of these images; None for all."""
        few = copy.copy(self)
        few.order = self.order[:count]
        return few

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images `[N, 3, H, W]`, labels int64 `[N]`, -1 for none), on the device."""
        plain = self.datamodule.make_loader(self.datamodule.val_set, train=False)
        loader: DataLoader[Any] = DataLoader(
            plain.dataset,
            batch_size=self.batch_size,
            sampler=self.order,
            collate_fn=plain.collate_fn,
            num_workers=plain.num_workers,
        )
        for batch in loader:
            plain.dataset.check()  # reports unreadable images, which are left out
            if batch is None:
                continue
            images, targets = self.datamodule.on_after_batch_transfer((batch[0].to(self.device), batch[1]), 0)
            yield images.contiguous(memory_format=self.memory_format), class_labels(targets).to(self.device)


def class_labels(targets: Any) -> Tensor:
    """Labels as they are; of detection targets the class that covers the largest area, -1 where there are no boxes."""
    if isinstance(targets, Tensor):
        return targets
    labels = torch.full((len(targets),), -1)
    for place, target in enumerate(targets):
        boxes = target["boxes"]
        if len(boxes):
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            labels[place] = torch.bincount(target["labels"], weights=areas).argmax()
    return labels


def thumbnails(images: Tensor, normalize: Any) -> Tensor:
    """Normalised images as uint8 `[N, 3, h, w]` on the CPU, at most `THUMBNAIL` pixels wide."""
    pixels = images.float() * normalize.std.to(images.device) + normalize.mean.to(images.device)
    if pixels.shape[-1] > THUMBNAIL:
        pixels = F.interpolate(pixels.contiguous(), size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).cpu()
