"""Transforms shared by the data sets: normalisation by name (on the device) and the ImageNet crops (in the workers)."""

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from timm.data.auto_augment import auto_augment_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from data.decoding import FACTORS, Picture

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
AUGMENTS = ("none", "autoaugment", "autoaugment_v0", "autoaugment_cifar10", "randaugment", "trivialaugment")
TRAIN_CROPS = ("random_resized", "pad")
SCALING_GAP = 2
"""Resizing a JPEG by this much at least after the decoder has scaled it down keeps the result the same to the eye."""

ImageTransform = Callable[[Image.Image | Picture], Tensor]
"""A picture, or Pillow's RGB image -> uint8 `[3, S, S]`."""
Policy = Callable[[Image.Image], Image.Image]
"""Pillow's RGB image -> one of the same size, changed at random."""


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


def switch(what: str, value: bool) -> bool:
    """Returns `value` if it is true or false, else raises a ValueError: "randaugment", say, would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}; this data set has one augmentation, so choose true or false")
    return value


class EvalTransform:
    """The usual single-crop evaluation: shorter side to `floor(image_size / crop_fraction)`, then the centre crop.

    At 224 pixels and 0.875 this is the familiar 256/224, equal to timm's evaluation transform pixel by pixel: it is
    resized by Pillow, whatever decodes it.
    """

    def __init__(self, image_size: int, crop_fraction: float, interpolation: str) -> None:
        if not 0 < crop_fraction <= 1:
            raise ValueError(
                f"crop fraction {crop_fraction}: expected a number above 0 and at most 1 (ImageNet: 0.875)"
            )
        mode = INTERPOLATIONS[choice("interpolation", interpolation, INTERPOLATIONS)]
        resized = math.floor(image_size / crop_fraction)
        self._steps = v2.Compose([v2.Resize(resized, interpolation=mode), v2.CenterCrop(image_size), v2.PILToTensor()])

    def __call__(self, image: Image.Image | Picture) -> Tensor:
        result: Tensor = self._steps(Picture.of(image).image())
        return result


def eval_transform(image_size: int, *, crop_fraction: float = 0.875, interpolation: str = "bicubic") -> EvalTransform:
    """The evaluation crop, see `EvalTransform`."""
    return EvalTransform(image_size, crop_fraction, interpolation)


class TimmAutoAugment:
    """A policy of AutoAugment by timm's code, but with all randomness from torch's default CPU generator.

    Args:
        policy: timm's name of it: "v0" is that of the authors' EfficientNet code (tensorflow/tpu) in timm's version, in
            which the one translation is by a share of the height (40 %) instead of by 225 pixels.
        interpolation: of rotation, shear and translation.
        fill: colour on 0..255 of the corners that these lay bare.
    """

    def __init__(self, policy: str, interpolation: InterpolationMode, fill: Sequence[int]) -> None:
        options = {"interpolation": Image.Resampling[interpolation.name], "img_mean": tuple(fill)}
        self.policy = auto_augment_transform(policy, options)

    def __call__(self, image: Image.Image) -> Image.Image:
        with _python_rng(int(torch.randint(2**62, ()).item())):  # the generator timm draws from, not numpy's
            changed: Image.Image = self.policy(image)
        return changed


@contextmanager
def _python_rng(seed: int) -> Iterator[None]:
    """Seeds Python's global generator inside the block and restores it afterwards.

    For one thread at a time, as torch's default generator is too (`data.sampling.example_rng`): loaders decode in
    processes, not in threads.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


class TrainTransform:
    """Training augmentation of one picture; all randomness is drawn from torch's default CPU generator.

    Cropping, resizing and flipping work on uint8 tensors: antialiased, within a grey level of Pillow's result (a few
    where bicubic overshoots), and several times as fast. The policies (AutoAugment and so on) work on Pillow's images,
    as torchvision and timm have them.

    Args:
        image_size: side of the result in pixels.
        train_crop: "random_resized" (ImageNet: a crop of random area and shape, resized) or "pad" (CIFAR: the whole
            image, padded by an eighth of its side with zeros, and a random crop of it).
        crop_scale, crop_ratio: range of the crop's area (share of the image) and of its width / height.
        horizontal_flip: probability.
        augment: one of `AUGMENTS`, torchvision's policies ("autoaugment" is the ImageNet table of the AutoAugment
            paper) and the one of the authors' EfficientNet code, "autoaugment_v0", see `TimmAutoAugment`.
        randaugment_ops, randaugment_magnitude: for augment="randaugment"; magnitude 0..30.
        random_erasing: probability of erasing a rectangle.
        interpolation: "bicubic" or "bilinear".
        fill: colour on 0..255 of what erasing removes and of the corners that a rotation lays bare; the mean of the
            normalisation makes them zero for the network.
        dct_scaling: let the decoder halve (or quarter, ...) a JPEG of whose crop at least `SCALING_GAP` times
            `image_size` pixels are left then: much faster for large photos, hardly different from resizing all of it.
            Nothing changes where the crop is smaller.
    """

    def __init__(
        self,
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
        dct_scaling: bool = True,
    ) -> None:
        mode = INTERPOLATIONS[choice("interpolation", interpolation, INTERPOLATIONS)]
        _check_range("crop_scale", crop_scale, 1.0)
        _check_range("crop_ratio", crop_ratio, math.inf)
        for name, value in (("horizontal_flip", horizontal_flip), ("random_erasing", random_erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: expected a probability, 0 to 1")
        if randaugment_ops < 1 or not 0 <= randaugment_magnitude <= 30:
            given = f"randaugment_ops {randaugment_ops}, randaugment_magnitude {randaugment_magnitude}"
            raise ValueError(f"{given}: expected at least 1 operation and a magnitude of 0 to 30")
        self.image_size = image_size
        self.interpolation = interpolation
        self.crop_scale, self.crop_ratio = tuple(crop_scale), tuple(crop_ratio)
        self.horizontal_flip = horizontal_flip
        self.dct_scaling = dct_scaling
        self._padded_crop: nn.Module | None = None
        if choice("train_crop", train_crop, TRAIN_CROPS) == "pad":
            self._padded_crop = v2.RandomCrop(image_size, padding=image_size // 8)
        colour = [round(value) for value in fill]
        policies: dict[str, Callable[[], Policy | None]] = {
            "none": lambda: None,
            "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, mode, fill=colour),
            "autoaugment_v0": lambda: TimmAutoAugment("v0", mode, colour),
            "autoaugment_cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, mode, fill=colour),
            "randaugment": lambda: v2.RandAugment(
                randaugment_ops, randaugment_magnitude, interpolation=mode, fill=colour
            ),
            "trivialaugment": lambda: v2.TrivialAugmentWide(interpolation=mode, fill=colour),
        }
        self._policy = policies[choice("augment", augment, AUGMENTS)]()
        self._erase = v2.RandomErasing(random_erasing, value=colour) if random_erasing > 0 else None

    def __call__(self, image: Image.Image | Picture) -> Tensor:
        picture = Picture.of(image)
        pixels = self._random_resized(picture) if self._padded_crop is None else self._padded(picture)
        if self.horizontal_flip > 0 and torch.rand(1).item() < self.horizontal_flip:
            pixels = pixels.flip(-1)
        if self._policy is not None:
            changed = self._policy(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
            pixels = v2.functional.pil_to_tensor(changed)
        if self._erase is not None:
            pixels = self._erase(pixels)
        return pixels.contiguous()

    def _random_resized(self, picture: Picture) -> Tensor:
        size = picture.size
        left, top, width, height = random_box(*size, self.crop_scale, self.crop_ratio)
        factor = 1
        if self.dct_scaling:
            factor = max(f for f in FACTORS if f == 1 or f * SCALING_GAP * self.image_size <= min(width, height))
        pixels = picture.pixels(factor)
        across, down = pixels.shape[2] / size[0], pixels.shape[1] / size[1]  # 1 for what was not scaled
        left, width = round(left * across), max(1, round(width * across))
        top, height = round(top * down), max(1, round(height * down))
        return self._resized(pixels[:, top : top + height, left : left + width])

    def _padded(self, picture: Picture) -> Tensor:
        assert self._padded_crop is not None
        pixels: Tensor = self._padded_crop(self._resized(picture.pixels()))
        return pixels

    def _resized(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if pixels.shape[1:] == size:
            return pixels
        return F.interpolate(pixels[None], size, mode=self.interpolation, antialias=True)[0]


def _check_range(name: str, given: Sequence[float], most: float) -> None:
    if len(given) != 2 or not 0 < given[0] <= given[1] <= most:
        upper = f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} {list(given)}: expected two numbers in order, above 0{upper}")


def random_box(width: int, height: int, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop; draws and result are those of torchvision's RandomResizedCrop."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(scale[0], scale[1]).item()
        aspect = torch.exp(torch.empty(1).uniform_(*log_ratio)).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)).item())
            return int(torch.randint(0, width - w + 1, (1,)).item()), top, w, h
    # The largest centre crop of an allowed shape.
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (width - w) // 2, (height - h) // 2, w, h
