"""A tiny detection data set for tests of networks and modules: bright rectangles on noise, one colour per class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

SIZE = 64
COLOURS = ((255, 40, 40), (40, 255, 40), (40, 40, 255))


def make_scene(index: int, size: int = SIZE) -> tuple[Tensor, dict[str, Any]]:
    """Scene `index`: uint8 `[3, size, size]` and its target; every fourth scene is empty."""
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(0, 60, (3, size, size), generator=generator, dtype=torch.uint8)
    boxes, labels = [], []
    for _ in range(0 if index % 4 == 3 else 1 + index % 2):
        width, height = torch.randint(size // 4, size // 2, (2,), generator=generator).tolist()
        left = int(torch.randint(0, size - width, (), generator=generator))
        top = int(torch.randint(0, size - height, (), generator=generator))
        label = int(torch.randint(0, len(COLOURS), (), generator=generator))
        colour = torch.tensor(COLOURS[label], dtype=torch.uint8)
        image[:, top : top + height, left : left + width] = colour[:, None, None]
        boxes.append([left, top, left + width, top + height])
        labels.append(label)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": index + 1,
        "original_size": (size * 2, size * 3),
    }
    return image, target


def _collate(examples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    return torch.stack([image for image, _ in examples]), [target for _, target in examples]


class Scenes(pl.LightningDataModule):
    """What `data.detection.DetectionDataModule` offers, on `count` scenes."""

    category_ids = (3, 7, 90)
    class_names = ("red", "green", "blue")
    num_classes = 3

    def __init__(self, count: int = 8, batch_size: int = 4, size: int = SIZE) -> None:
        super().__init__()
        self.scenes = [make_scene(index, size) for index in range(count)]
        self.batch_size, self.image_size = batch_size, size
        self.normalize = SimpleNamespace(mean=127.0, std=64.0, to=lambda device: self.normalize)

    def train_dataloader(self) -> Any:
        return self.val_dataloader()

    def val_dataloader(self) -> Any:
        return DataLoader(self.scenes, self.batch_size, collate_fn=_collate)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() - 127.0) / 64.0, batch[1]

    def ground_truth(self) -> dict[str, Any]:
        annotations, images = [], []
        for _, target in self.scenes:
            height, width = target["original_size"]
            images.append({"id": target["image_id"], "height": height, "width": width, "file_name": "none"})
            scale = torch.tensor([width, height, width, height]) / self.image_size
            for box, label in zip((target["boxes"] * scale).tolist(), target["labels"].tolist(), strict=True):
                sides = [box[2] - box[0], box[3] - box[1]]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": target["image_id"],
                        "category_id": self.category_ids[label],
                        "bbox": [*box[:2], *sides],
                        "area": sides[0] * sides[1],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}
