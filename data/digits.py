"""scikit-learn's 1,797 handwritten digits: real images that come with the package, so that anything can be tried."""

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from data.base import ImageDataModule
from data.in_memory import RandomAffine, TensorImages
from data.transforms import switch


class DigitsDataModule(ImageDataModule):
    """8 x 8 grey digits (UCI "Optical recognition of handwritten digits", test part), resized to `image_size`.

    The split is fixed and uses no seed: within each class, in the order of the file, the images at positions 2, 7,
    12, ... are for evaluation (359) and the others for training (1,438). Both parts hold images of the same writers.
    Training images are rotated, scaled, sheared and shifted a little, never flipped.

    Args:
        augment: False trains on the images as they are.
        options: see `ImageDataModule`.
    """

    name = "digits"
    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, *, augment: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.augment = switch("augment (data.augment)", augment)

    def load(self, train: bool) -> TensorImages:
        images, labels = digits_of_part(train)
        augment = RandomAffine() if train and self.augment else None
        return TensorImages(images, labels, self.image_size, augment, self.seed)


def digits_of_part(train: bool) -> tuple[Tensor, Tensor]:
    """The training or the evaluation part: images uint8 `[M, 1, 8, 8]` and labels int64 `[M]`."""
    images, labels = _digits()
    chosen = evaluation_part(labels) != train
    return images[chosen], labels[chosen]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """All images uint8 `[1797, 1, 8, 8]` and labels; read once, as unpacking the text file takes a while."""
    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None].mul(255 / 16)  # stored as 0..16
    return images.round().to(torch.uint8), torch.from_numpy(digits.target).long()


def evaluation_part(labels: Tensor) -> Tensor:
    """Bool `[M]`, true for every fifth example of each class, beginning with its third."""
    part = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        part[torch.nonzero(labels == label).flatten()[2::5]] = True
    return part
