"""Scenes of handwritten digits: where they stand, what is behind and in front of them, drawn with Pillow."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from data.digits import digits_of_part

SPRITE = 64
# From this opacity on (of 255) a pixel is ink: what the boxes enclose.
INK = 96
PLACEMENT_TRIES = 12


class Scene(NamedTuple):
    """`image` uint8 `[S, S, 3]`; `boxes` float32 `[M, 4]`, (left, top, right, bottom); `labels` int64 `[M]`."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class SceneStyle:
    """How scenes look; lengths are shares of the image's side.

    Attributes:
        max_digits: largest number of digits.
        empty: probability of a scene without any digit.
        size: smallest and largest height of a digit; drawn evenly on a logarithmic scale.
        overlap: the largest share of a digit's box that another digit's box may cover.
        clutter: largest number of lines, arcs, ellipses, rectangles and triangles behind the digits.
        contrast: smallest difference of brightness (0..255) between a digit and what is behind it.
        noise: largest standard deviation (0..255) of the pixel noise.
    """

    max_digits: int = 5
    empty: float = 0.06
    size: tuple[float, float] = (0.25, 0.7)
    overlap: float = 0.25
    clutter: int = 5
    contrast: float = 70.0
    noise: float = 8.0

    def __post_init__(self) -> None:
        if self.max_digits < 1:
            raise ValueError(f"max_digits={self.max_digits}: expected at least 1")
        small, large = self.size
        if not 0 < small <= large <= 1:
            raise ValueError(f"size={list(self.size)}: expected two shares of the side, 0 < smallest <= largest <= 1")
        for name in ("empty", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to 1")
        for name, limit in (("clutter", 100), ("contrast", 100), ("noise", 100)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to {limit}")


def compose_scene(seed: int, image_size: int, train: bool, style: SceneStyle) -> Scene:
    """One scene, a pure function of the arguments; digits are of scikit-learn's training or evaluation part."""
    rng = np.random.default_rng(seed)
    canvas = _background(rng, image_size)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(style.clutter + 1)):
        _draw_shape(draw, rng, image_size)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    count = 0 if rng.random() < style.empty else int(rng.integers(1, style.max_digits + 1))
    sprites, classes = _sprites(train)
    for _ in range(count):
        chosen = int(rng.integers(len(sprites)))
        mask = _deformed(sprites[chosen], rng, image_size, style)
        box = _place(canvas, mask, boxes, rng, style)
        if box is not None:
            boxes.append(box)
            labels.append(classes[chosen])
    if rng.random() < 0.3:  # a thin line over everything, as on a form
        _draw_line(draw, rng, image_size, width=max(1, image_size // 150))
    image = _add_noise(np.asarray(canvas), rng, style.noise)
    return Scene(image, np.asarray(boxes, dtype=np.float32).reshape(-1, 4), np.asarray(labels, dtype=np.int64))


@cache
def _sprites(train: bool) -> tuple[list[Image.Image], list[int]]:
    """Each digit as an opacity mask of 64 pixels with crisp edges, cropped to its ink; and the classes."""
    images, labels = digits_of_part(train)
    sprites = []
    for image in images[:, 0].numpy():
        large = Image.fromarray(image).resize((SPRITE, SPRITE), Image.Resampling.BICUBIC)
        crisp = large.point([min(255, max(0, round((value - 90) * 2.6))) for value in range(256)])
        sprites.append(crisp.crop(crisp.getbbox()))
    return sprites, labels.tolist()


def _deformed(sprite: Image.Image, rng: Generator, image_size: int, style: SceneStyle) -> Image.Image:
    """The digit at its size in the scene, a little turned, slanted, wider or narrower, as an opacity mask."""
    low, high = np.log(np.asarray(style.size) * image_size)
    height = float(np.exp(rng.uniform(low, high)))
    width = height * sprite.width / sprite.height * float(np.exp(rng.uniform(-0.2, 0.2)))
    # A "1" is narrow; no digit is wider than it is tall.
    size = max(4, round(min(width, height))), max(6, round(height))
    mask = sprite.resize(size, Image.Resampling.BILINEAR)
    mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR, expand=True)
    opacity = np.asarray(mask) * np.float32(rng.uniform(0.8, 1.0))
    box = _ink(opacity) or (0, 0, *mask.size)
    return Image.fromarray(opacity[box[1] : box[3], box[0] : box[2]].astype(np.uint8))


def _ink(opacity: np.ndarray) -> tuple[int, int, int, int] | None:
    """The smallest box (left, top, right, bottom) around all ink of a mask `[H, W]`; None without any."""
    ink = opacity >= INK
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(
    canvas: Image.Image,
    mask: Image.Image,
    taken: list[tuple[int, int, int, int]],
    rng: Generator,
    style: SceneStyle,
) -> tuple[int, int, int, int] | None:
    """Draws the digit where it covers the others little enough, and returns its box; None where it finds no place.

    A digit may lose up to an eighth of its width and height beyond the image's edge.
    """
    side = canvas.width
    over = mask.width // 8, mask.height // 8
    opacity = np.asarray(mask)
    for _ in range(PLACEMENT_TRIES):
        left = int(rng.integers(-over[0], max(side - mask.width + over[0], 1 - over[0])))
        top = int(rng.integers(-over[1], max(side - mask.height + over[1], 1 - over[1])))
        x, y = max(left, 0), max(top, 0)
        ink = _ink(opacity[y - top : side - top, x - left : side - left])
        if ink is None:
            continue
        box = (x + ink[0], y + ink[1], x + ink[2], y + ink[3])
        if all(_covered(box, other) <= style.overlap for other in taken):
            canvas.paste(_ink_colour(canvas.crop(box), rng, style.contrast), (left, top), mask)
            return box
    return None


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the area of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / max(smaller, 1)


def _ink_colour(behind: Image.Image, rng: Generator, contrast: float) -> tuple[int, int, int]:
    """A colour whose brightness differs enough from what is behind the digit."""
    back = _brightness(behind.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    for _ in range(20):
        colour = _colour(rng)
        if abs(_brightness(colour) - back) >= contrast:
            return colour
    return (0, 0, 0) if back > 127 else (255, 255, 255)


def _brightness(colour: object) -> float:
    red, green, blue = colour  # type: ignore[misc]  # a pixel of an RGB image
    return float(0.299 * red + 0.587 * green + 0.114 * blue)


def _colour(rng: Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(256, size=3).tolist()
    return red, green, blue


def _background(rng: Generator, image_size: int) -> Image.Image:
    """One colour, or a few colours that run into each other."""
    cells = int(rng.choice([1, 2, 3, 5]))
    base = rng.integers(20, 236, size=3)
    colours = base + rng.normal(0, rng.uniform(10, 60), size=(cells, cells, 3))
    small = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    return small.resize((image_size, image_size), Image.Resampling.BILINEAR)


def _draw_shape(draw: ImageDraw.ImageDraw, rng: Generator, image_size: int) -> None:
    kind = rng.integers(5)
    if kind == 0:
        _draw_line(draw, rng, image_size, width=int(rng.integers(1, max(2, image_size // 25))))
        return
    centre, half = rng.uniform(0, image_size, 2), rng.uniform(0.02, 0.2, 2) * image_size
    left, top, right, bottom = (round(value) for value in (*(centre - half), *(centre + half)))
    box, colour = [left, top, right + 1, bottom + 1], _colour(rng)
    width = int(rng.integers(1, max(2, image_size // 40)))
    if kind == 1:
        start = int(rng.integers(360))
        draw.arc(box, start, start + int(rng.integers(60, 270)), fill=colour, width=width)
    elif kind == 2:
        draw.ellipse(box, fill=colour if rng.random() < 0.5 else None, outline=colour, width=width)
    elif kind == 3:
        draw.rectangle(box, fill=colour if rng.random() < 0.5 else None, outline=colour, width=width)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)


def _draw_line(draw: ImageDraw.ImageDraw, rng: Generator, image_size: int, width: int) -> None:
    ends = rng.integers(image_size, size=4).tolist()
    draw.line(ends, fill=_colour(rng), width=width)


@cache
def _noise() -> np.ndarray:
    """Normal numbers to cut from: drawing new ones for every pixel would take longer than all the rest."""
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


def _add_noise(image: np.ndarray, rng: Generator, largest: float) -> np.ndarray:
    strength = np.float32(rng.uniform(0, largest))
    bank, needed = _noise(), image.size
    if needed >= len(bank):
        bank = np.resize(bank, needed + len(bank))
    start = int(rng.integers(len(bank) - needed))
    noisy = image + bank[start : start + needed].reshape(image.shape) * strength
    np.rint(noisy, out=noisy)
    return noisy.clip(0, 255, out=noisy).astype(np.uint8)
