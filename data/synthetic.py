"""One random batch, used again and again: measures training speed without any loading."""

from typing import Any

import torch

from data.base import ImageDataModule
from data.sampling import Batch, ImageDataset, ImageLoader, Key


class FixedBatch(ImageDataset):
    """The first images of one random batch, whatever is asked for.

    Args:
        num_examples: the length it pretends to have.
        batch_size: number of images that exist.
        num_classes, image_size, seed: labels uniform on the classes, pixels uniform on 0..255.
    """

    def __init__(self, num_examples: int, batch_size: int, num_classes: int, image_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, 3, image_size, image_size)
        self.images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(num_classes, (batch_size,), generator=generator)
        self.num_examples = num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.images[: len(keys)], self.labels[: len(keys)]

    def collate(self, examples: Batch) -> Batch:
        return examples


class SyntheticDataModule(ImageDataModule):
    """Random images for speed measurements; their labels mean nothing.

    Args:
        num_classes: number of classes.
        num_batches: batches in an epoch of one process, for training and for evaluation.
        options: see `ImageDataModule`.
    """

    name = "synthetic"

    def __init__(
        self, *, num_classes: int = 1000, num_batches: int = 100, image_size: int = 224, **options: Any
    ) -> None:
        super().__init__(image_size=image_size, **options)
        if num_classes < 1 or num_batches < 1:
            raise ValueError(f"synthetic data with {num_classes} classes and {num_batches} batches: expected 1 or more")
        self.num_classes = num_classes
        self.num_batches = num_batches
        self.class_names = tuple(str(label) for label in range(num_classes))

    def load(self, train: bool) -> FixedBatch:
        batch_size = self.batch_size_per_device if train else self.eval_batch_size_per_device
        return FixedBatch(self._length(train), batch_size, self.num_classes, self.image_size, self.seed)

    def make_loader(self, dataset: ImageDataset, train: bool) -> ImageLoader:
        assert isinstance(dataset, FixedBatch)
        dataset.num_examples = self._length(train)  # the first process loaded it when there was no trainer yet
        return super().make_loader(dataset, train)

    def _length(self, train: bool) -> int:
        batch_size = self.batch_size_per_device if train else self.eval_batch_size_per_device
        return self.num_batches * batch_size * self._process()[1]
