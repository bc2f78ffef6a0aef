"""Pictures of detections: boxes with class and score on images, and many images on one sheet."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_SIDE = 240
"""Smaller images are enlarged by a whole number, or names and scores would cover them."""
TRUTH = (255, 255, 255)


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of `[3, H, W]` on 0..255 (uint8, or floats, which are rounded and clipped)."""
    return Image.fromarray(pixels.detach().float().round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def draw_detections(
    image: Image.Image,
    found: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    truth: Mapping[str, Any] | None = None,
    min_score: float = 0.3,
) -> Image.Image:
    """A copy of the image with the boxes whose score is at least `min_score`, and the true boxes in thin white.

    Args:
        image: in whose pixels the boxes are.
        found: `boxes` `[D, 4]` (x1, y1, x2, y2), `scores`, `labels`.
        class_names: by label; where there is none, the label's number.
        truth: `boxes` and `labels`.
        min_score: of the boxes that are drawn.
    """
    factor = max(1, math.ceil(SMALLEST_SIDE / min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(11, min(canvas.size) // 26))
    line = max(2, min(canvas.size) // 150)
    if truth is not None:
        for box in truth["boxes"].tolist():
            draw.rectangle([value * factor for value in box], outline=TRUTH, width=1)
    order = found["scores"].argsort()  # the best on top
    for box, score, label in zip(*(found[key][order].tolist() for key in ("boxes", "scores", "labels")), strict=True):
        if score < min_score:
            continue
        colour = class_colour(label)
        left, top, right, bottom = (value * factor for value in box)
        draw.rectangle([left, top, max(left, right), max(top, bottom)], outline=colour, width=line)
        name = class_names[label] if label < len(class_names) else str(label)
        _caption(draw, (left, top), f"{name} {score:.2f}", colour, font, canvas.size)
    return canvas


def sheet(images: Sequence[Image.Image], columns: int = 4, gap: int = 6) -> Image.Image:
    """All images on one white page, row by row; each cell is as large as the largest image."""
    columns = max(1, min(columns, len(images)))
    width, height = (max(image.size[side] for image in images) + gap for side in (0, 1))
    page = Image.new("RGB", (columns * width + gap, math.ceil(len(images) / columns) * height + gap), "white")
    for index, image in enumerate(images):
        page.paste(image, (gap + index % columns * width, gap + index // columns * height))
    return page


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright colour of its own for every class: hues by the golden ratio, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def _caption(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: Any,
    size: tuple[int, int],
) -> None:
    """Black text on the box's colour, above the box where there is room, and never outside the image."""
    width, height = draw.textlength(text, font=font) + 4, font.size + 3
    left = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    top = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle([left, top, left + width, top + height], fill=colour)
    draw.text((left + 2, top), text, fill="black", font=font)
