"""JPEGs that cost a decoder what photos cost it, made from random fields."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

QUALITY = 95
DECAY = 0.89
"""Of the amplitude from one octave to the next; chosen for photos' bytes per pixel (COCO's: 110 kB / 500 x 375)."""


def scene(seed: int, width: int = 500, height: int = 375) -> Tensor:
    """uint8 `[H, W, 3]`: grey and coloured random fields of nine octaves, with some large coloured shapes in front."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    amplitude = 1.0
    for octave in range(1, 10):
        cells = max(2, height * 2**octave // 512), max(2, width * 2**octave // 512)
        grey = torch.randn(1, 1, *cells, generator=generator)
        colour = torch.randn(1, 3, *cells, generator=generator)
        image += amplitude * F.interpolate(grey + 0.4 * colour, (height, width), mode="bicubic")
        amplitude *= DECAY
    for _ in range(6):
        shape = F.interpolate(torch.randn(1, 1, 3, 4, generator=generator), (height, width), mode="bicubic")
        image = torch.where(shape > 0.6, 0.5 * image + torch.randn(1, 3, 1, 1, generator=generator), image)
    image = (image - image.mean()) / image.std()
    return (128 + 55 * image).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def photo(seed: int) -> bytes:
    """One scene as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(scene(seed).numpy()).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def photo_folders(root: Path, photos: list[bytes], copies: int, num_classes: int = 4) -> None:
    """Write root/train and root/val/<class>/*.jpg, each photo so many times for training and once for evaluation."""
    for number, data in enumerate(photos):
        for copy in range(copies):
            folder = root / "train" / f"class{(number + copy) % num_classes}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:04d}_{copy}.jpg").write_bytes(data)
        folder = root / "val" / f"class{number % num_classes}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.jpg").write_bytes(data)
