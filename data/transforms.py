"""Transforms shared by the data sets: normalisation by name (on the device) and the ImageNet crops (in the workers)."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

# name -> (mean, standard deviation) of each channel, both on the scale 0..255 of the stored pixels.
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    # The figures every torchvision and timm checkpoint is trained with: (0.485, 0.456, 0.406), (0.229, 0.224, 0.225).
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # CondConv's EfficientNet: (x - 127) / 128 (tensorflow/tpu, models/official/efficientnet).
    "authors": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    # 0..255 onto -1..1, TensorFlow's "Inception" preprocessing.
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}
INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
AUGMENTS = ("none", "autoaugment", "autoaugment_cifar10", "randaugment", "trivialaugment")
TRAIN_CROPS = ("random_resized", "pad")

PilTransform = Callable[[Image.Image], Tensor]


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, for images on 0..255.

    Args:
        name: a key of `NORMALIZATIONS`.

    `forward` takes `[N, 3, H, W]` (or `[3, H, W]`) of uint8, which becomes float32, or of a floating-point dtype on
    the same scale 0..255, which is kept. The memory format (contiguous or channels_last) is kept too.

    Raises:
        ValueError: the name is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = "imagenet") -> None:
        super().__init__()
        mean, std = NORMALIZATIONS[choice("normalisation", name, NORMALIZATIONS)]
        self.name = name
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        dtype = images.dtype if images.is_floating_point() else torch.float32
        # In float32 whatever the result's dtype: bfloat16 cannot even hold the integers above 256.
        normal = images.to(torch.float32).sub(self.mean).div_(self.std)
        return normal.to(dtype)

    def extra_repr(self) -> str:
        return repr(self.name)


def choice(what: str, value: str, allowed: Collection[str]) -> str:
    """Returns `value` if it is one of `allowed`, else raises a ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(allowed)}")
    return value


def eval_transform(image_size: int, *, crop_fraction: float = 0.875, interpolation: str = "bicubic") -> PilTransform:
    """The usual single-crop evaluation: shorter side to `floor(image_size / crop_fraction)`, then the centre crop.

    At 224 pixels and 0.875 this is the familiar 256/224, equal to timm's evaluation transform pixel by pixel.

    Returns:
        PIL RGB image -> uint8 `[3, image_size, image_size]`.
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop fraction {crop_fraction}: expected a number above 0 and at most 1 (ImageNet: 0.875)")
    mode = INTERPOLATIONS[choice("interpolation", interpolation, INTERPOLATIONS)]
    resized = math.floor(image_size / crop_fraction)
    transform: PilTransform = v2.Compose(
        [v2.Resize(resized, interpolation=mode), v2.CenterCrop(image_size), v2.PILToTensor()]
    )
    return transform


def train_transform(
    image_size: int,
    *,
    train_crop: str = "random_resized",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    horizontal_flip: float = 0.5,
    augment: str = "none",
    randaugment_ops: int = 2,
    randaugment_magnitude: int = 9,
    random_erasing: float = 0.0,
    interpolation: str = "bicubic",
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> PilTransform:
    """Training augmentation of one PIL RGB image; all randomness is drawn from torch's default CPU generator.

    Args:
        image_size: side of the result in pixels.
        train_crop: "random_resized" (ImageNet: a crop of random area and shape, resized) or "pad" (CIFAR: the whole
            image, padded by an eighth of its side with zeros, and a random crop of it).
        crop_scale, crop_ratio: range of the crop's area (share of the image) and of its width / height.
        horizontal_flip: probability.
        augment: one of `AUGMENTS`, torchvision's policies.
        randaugment_ops, randaugment_magnitude: for augment="randaugment"; magnitude 0..30.
        random_erasing: probability of erasing a rectangle.
        interpolation: "bicubic" or "bilinear".
        fill: colour on 0..255 of what erasing removes and of the corners that a rotation lays bare; the mean of the
            normalisation makes them zero for the network.

    Returns:
        PIL RGB image -> uint8 `[3, image_size, image_size]`.
    """
    mode = INTERPOLATIONS[choice("interpolation", interpolation, INTERPOLATIONS)]
    steps: list[nn.Module]
    if choice("train_crop", train_crop, TRAIN_CROPS) == "pad":
        size = [image_size, image_size]
        steps = [v2.Resize(size, interpolation=mode), v2.RandomCrop(image_size, padding=image_size // 8)]
    else:
        scale, ratio = tuple(crop_scale), tuple(crop_ratio)
        steps = [v2.RandomResizedCrop(image_size, scale=scale, ratio=ratio, interpolation=mode)]
    if horizontal_flip > 0:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    colour = [round(value) for value in fill]
    choice("augment", augment, AUGMENTS)
    if augment == "autoaugment":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, mode, fill=colour))
    elif augment == "autoaugment_cifar10":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, mode, fill=colour))
    elif augment == "randaugment":
        steps.append(v2.RandAugment(randaugment_ops, randaugment_magnitude, interpolation=mode, fill=colour))
    elif augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=mode, fill=colour))
    steps.append(v2.PILToTensor())
    if random_erasing > 0:
        steps.append(v2.RandomErasing(random_erasing, value=colour))
    transform: PilTransform = v2.Compose(steps)
    return transform
