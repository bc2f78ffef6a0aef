"""Small images held in memory as one tensor; a batch is gathered, resized and augmented by a few tensor operations."""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from data.sampling import Batch, ImageDataset, Key, example_seed, split_key


class BatchAugmentation(Protocol):
    """Changes a batch of images, each by its own row of random numbers; needs no generator of its own."""

    num_draws: int

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images uint8 `[N, C, S, S]`, draws float32 `[N, num_draws]` uniform on [0, 1) -> uint8 `[N, C, S, S]`."""


class TensorImages(ImageDataset):
    """Images and labels in memory.

    Args:
        images: uint8 `[M, C, H, W]`, C = 3, or 1 (grey), which is repeated to 3 channels at the end.
        labels: int64 `[M]`.
        image_size: side in pixels to which a batch is resized (bicubic).
        augment: for training, or None.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        image_size: int,
        augment: BatchAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self._draws: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """(image uint8 `[3, S, S]`, label)."""
        images, labels = self.__getitems__([key])
        return images[0], int(labels[0])

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The whole batch at once: DataLoader prefers this over one `__getitem__` per example."""
        pairs = [split_key(key) for key in keys]
        index = torch.tensor([index for _, index in pairs])
        images = self.images[index]
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = [self.image_size, self.image_size]
            images = v2.functional.resize(images, size, v2.InterpolationMode.BICUBIC, antialias=True)
        if self.augment is not None:
            draws = torch.stack([self._epoch_draws(epoch)[index] for epoch, index in pairs])
            images = self.augment(images, draws)
        return images.expand(-1, 3, -1, -1).contiguous(), self.labels[index]

    def collate(self, examples: Batch) -> Batch:
        return examples

    def _epoch_draws(self, epoch: int) -> Tensor:
        """Random numbers of all examples for an epoch, `[M, num_draws]`, kept until the next epoch."""
        if self._draws is None or self._draws[0] != epoch:
            assert self.augment is not None
            generator = torch.Generator().manual_seed(example_seed(self.seed, epoch))
            self._draws = epoch, torch.rand(len(self), self.augment.num_draws, generator=generator)
        return self._draws[1]


class RandomAffine:
    """Small rotation, scaling, shear and shift about the centre; bare corners become zero.

    Args:
        degrees: largest rotation to either side.
        shear_degrees: largest shear to either side.
        scale: largest relative change of size; 0.1 means 0.9 to 1.1.
        shift: largest shift to either side, as a share of the side.
    """

    num_draws = 5

    def __init__(self, degrees: float = 10.0, shear_degrees: float = 8.0, scale: float = 0.1, shift: float = 0.06):
        self.spans = torch.tensor([math.radians(degrees), math.radians(shear_degrees), scale, 2 * shift, 2 * shift])

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        angle, shear, scale, right, down = ((2 * draws - 1) * self.spans).unbind(1)
        cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
        # The map from output to input coordinates, each on -1..1, as affine_grid wants it.
        rows = [cos, cos * tan - sin, right, sin, sin * tan + cos, down]
        theta = torch.stack(rows, 1).view(-1, 2, 3)
        theta[:, :, :2] /= (1 + scale)[:, None, None]
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        warped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return warped.round_().clamp_(0, 255).to(torch.uint8)


class RandomCropFlip:
    """The CIFAR policy: pad with zeros by an eighth of the side, crop at random, flip left-right half of the time."""

    num_draws = 3

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        count, _, size, _ = images.shape
        padding = size // 8
        padded = F.pad(images, (padding, padding, padding, padding))
        down, right = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        along = torch.arange(size)
        columns = torch.where(draws[:, 2:] < 0.5, along.flip(0), along) + right[:, None]
        rows = along + down[:, None]
        example = torch.arange(count)[:, None, None]
        return padded.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
