"""Anchors (default boxes) of SSD, in the conventions of the TensorFlow Object Detection API's `create_ssd_anchors`.

The maps, from the finest to the coarsest, have scales evenly spaced from 0.2 to 0.95 of the image's side. At each
position of a map: a square of its scale, boxes of the other aspect ratios with the same area, and a square of the
geometric mean of its scale and the next one (of the last scale and 1). The finest map has three boxes alone: a square
of half its scale, and the aspect ratios 2 and 1/2 of its scale.

torchvision's `DefaultBoxGenerator` cannot express that finest map, so the boxes are made here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SCALE, MAX_SCALE = 0.2, 0.95
ASPECT_RATIOS = (1.0, 2.0, 1 / 2, 3.0, 1 / 3)

Spec = tuple[tuple[float, float], ...]


def anchor_specs(
    num_maps: int = 6,
    *,
    min_scale: float = MIN_SCALE,
    max_scale: float = MAX_SCALE,
    aspect_ratios: Sequence[float] = ASPECT_RATIOS,
    reduce_lowest: bool = True,
) -> list[Spec]:
    """The boxes of each map as (scale, width over height); scales are fractions of the image's side.

    Args:
        num_maps: feature maps, finest first; at least 2.
        min_scale, max_scale: of the first and the last map, in (0, 1].
        aspect_ratios: width over height of the boxes of each map's own scale.
        reduce_lowest: three boxes in the finest map, as above; otherwise it is like the others.

    Raises:
        ValueError: a number out of its range.
    """
    if num_maps < 2:
        raise ValueError(f"anchors need at least 2 feature maps, got {num_maps}")
    if not 0 < min_scale < max_scale <= 1:
        raise ValueError(f"anchor scales must satisfy 0 < min < max <= 1, got {min_scale} and {max_scale}")
    if not aspect_ratios or any(ratio <= 0 for ratio in aspect_ratios):
        raise ValueError(f"aspect ratios must be positive numbers, got {list(aspect_ratios)}")
    scales = [min_scale + (max_scale - min_scale) * k / (num_maps - 1) for k in range(num_maps)] + [1.0]
    specs: list[Spec] = []
    for k, (scale, following) in enumerate(itertools.pairwise(scales)):
        if k == 0 and reduce_lowest:
            specs.append(((scale / 2, 1.0), (scale, 2.0), (scale, 0.5)))
        else:
            own = tuple((scale, float(ratio)) for ratio in aspect_ratios)
            specs.append((*own, (math.sqrt(scale * following), 1.0)))
    return specs


def make_anchors(specs: Sequence[Spec], map_sizes: Sequence[tuple[int, int]], image_size: int) -> Tensor:
    """All anchors as float32 `[A, 4]`, (x1, y1, x2, y2) in pixels of a square image, not clipped.

    Args:
        specs: of each map, see `anchor_specs`.
        map_sizes: (height, width) of each map.
        image_size: side of the image.

    The order is that of predictions reshaped from `[N, boxes * values, H, W]`: map, row, column, box.
    """
    if len(specs) != len(map_sizes):
        raise ValueError(f"{len(specs)} anchor specifications for {len(map_sizes)} feature maps")
    per_map = []
    for spec, (height, width) in zip(specs, map_sizes, strict=True):
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        centres_HW2 = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1)
        halves_B2 = torch.tensor([(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for scale, ratio in spec]) / 2
        centres_HWB2 = centres_HW2[:, :, None, :].expand(-1, -1, len(spec), -1)
        per_map.append(torch.cat([centres_HWB2 - halves_B2, centres_HWB2 + halves_B2], dim=-1).flatten(0, 2))
    return torch.cat(per_map) * image_size
