"""What the detection data sets share: the form of a batch and of the truth, and what their modules offer."""

from typing import Any

import torch
from torch import Tensor

from data.base import ImageDataModule
from data.sampling import ImageDataset

# One image's truth: `boxes` float32 [M, 4] (left, top, right, bottom in pixels of the S x S image; M may be 0),
# `labels` int64 [M] (0..num_classes-1), `image_id` int, `original_size` (height, width) of the image file.
Target = dict[str, Any]
DetectionExample = tuple[Tensor, Target]
DetectionBatch = tuple[Tensor, list[Target]]


class DetectionDataset(ImageDataset):
    """Examples are `(image uint8 [3, S, S], target)`; a batch is the stacked images and the list of targets."""

    def collate(self, examples: list[DetectionExample | None]) -> DetectionBatch | None:  # type: ignore[override]
        present = [example for example in examples if example is not None]
        if not present:
            return None
        return torch.stack([image for image, _ in present]), [target for _, target in present]


class DetectionDataModule(ImageDataModule):
    """An `ImageDataModule` whose batches carry boxes.

    Attributes:
        category_ids: COCO's category id of each label.
    """

    category_ids: tuple[int, ...]

    def ground_truth(self) -> dict[str, Any]:
        """The truth about the evaluation images in COCO's format: images, annotations (crowds too), categories."""
        raise NotImplementedError

    def categories(self) -> list[dict[str, Any]]:
        """COCO's list of the classes."""
        return [{"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names, strict=True)]


def make_target(boxes: Tensor, labels: Tensor, image_id: int, original_size: tuple[int, int]) -> Target:
    """A target of plain tensors and ints."""
    return {
        "boxes": torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.as_tensor(labels, dtype=torch.int64),
        "image_id": image_id,
        "original_size": original_size,
    }
