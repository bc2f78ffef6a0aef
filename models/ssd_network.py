"""SSD on the feature maps of any backbone, static or CondConv (Liu et al., *SSD*, 2016).

Conventions of the TensorFlow Object Detection API's `ssd_mobilenet_v1` [seen in its public configs and code]: the maps
of strides 16 and 32 (of MobileNetV1, the 11th and the 13th pointwise convolution), four further maps, each from a 1x1
convolution to half its channels and a 3x3 convolution with stride 2, and on every map a 1x1 convolution that predicts
classes and one that predicts boxes. Channels of the further maps follow the backbone's width. docs/detection.md has the
table of MADDs.

Letters: `N` images, `A` anchors, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.anchors import anchor_specs, make_anchors
from models.boxes import Detection, Suppression, class_scores, suppress, top_candidates

EXTRA_CHANNELS = (512, 256, 256, 128)
MIN_CHANNELS = 16
PRIOR = 0.01
"""Score of every class before training: with sigmoids, as in the API's focal-loss configs (a bias of -4.6)."""


class ExtraMap(nn.Sequential):
    """The next, coarser map: 1x1 to half the channels, 3x3 with stride 2, each with BatchNorm and ReLU6."""

    def __init__(self, in_channels: int, channels: int, width: float, norm: partial[nn.Module]) -> None:
        half, full = (max(MIN_CHANNELS, int(count * width)) for count in (channels // 2, channels))
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, half, 1, bias=False)
        self.reduce_norm = norm(half)
        self.reduce_act = nn.ReLU6(inplace=True)
        self.down = nn.Conv2d(half, full, 3, stride=2, padding=1, bias=False)
        self.down_norm = norm(full)
        self.down_act = nn.ReLU6(inplace=True)


class Predictor(nn.Module):
    """Class logits and box codes of one map, by 1x1 convolutions."""

    def __init__(self, in_channels: int, num_boxes: int, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.classes = nn.Conv2d(in_channels, num_boxes * num_outputs, 1)
        self.boxes = nn.Conv2d(in_channels, num_boxes * 4, 1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, H * W * boxes, outputs]` and `[N, H * W * boxes, 4]`."""
        return _by_anchor(self.classes(x_NCHW), self.num_outputs), _by_anchor(self.boxes(x_NCHW), 4)


class SSD(nn.Module):
    """Images float `[N, 3, S, S]` -> class logits `[N, A, C]` (`[N, A, 1 + C]` with softmax) and box codes `[N, A, 4]`.

    Args:
        backbone: a network of timm with `forward_intermediates`; what follows the last map used is cut off.
        num_classes: without the background.
        image_size: side S of the images in pixels, for which the anchors are made.
        width: multiplier of the channels of the further maps.
        softmax: a background class and softmax, for training with hard negative mining, instead of sigmoids.
        strides: of the maps taken from the backbone.
        num_maps: in all; 2 to len(strides) + 4.
        suppression: how predictions become detections.
        anchors: arguments of `models.anchors.anchor_specs`.

    Attributes:
        anchors: float `[A, 4]` (x1, y1, x2, y2 in pixels of S x S images); not saved with the weights.

    Raises:
        ValueError: the backbone has no maps of these strides, or a number is out of its range.
    """

    anchors: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_size: int = 300,
        *,
        width: float = 1.0,
        softmax: bool = False,
        strides: Sequence[int] = (16, 32),
        num_maps: int = 6,
        suppression: Suppression | None = None,
        anchors: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be an int of at least 1, got {num_classes!r}")
        self.num_classes, self.image_size, self.softmax = num_classes, image_size, softmax
        self.suppression = suppression or Suppression()
        extra = num_maps - len(strides)
        if not 0 <= extra <= len(EXTRA_CHANNELS):
            low, high = len(strides), len(strides) + len(EXTRA_CHANNELS)
            raise ValueError(f"with maps of strides {list(strides)}, num_maps must be {low} to {high}, got {num_maps}")
        self.map_indices, channels = _cut(backbone, strides)
        self.backbone = backbone
        specs = anchor_specs(num_maps, **(anchors or {}))
        norm = _norm_like(backbone)
        extras = []
        for count in EXTRA_CHANNELS[:extra]:
            extras.append(ExtraMap(channels[-1], count, width, norm))
            channels.append(extras[-1].down.out_channels)
        outputs = num_classes + softmax
        predictors = [Predictor(c, len(spec), outputs) for c, spec in zip(channels, specs, strict=True)]
        self.head = nn.ModuleDict({"extras": nn.ModuleList(extras), "predictors": nn.ModuleList(predictors)})
        self.head.apply(partial(_initialize, prior=None if softmax else PRIOR))
        sizes = self._map_sizes(image_size)
        self.register_buffer("anchors", make_anchors(specs, sizes, image_size), persistent=False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The feature maps that anchors are on, finest first."""
        forward: Any = self.backbone.forward_intermediates
        maps: list[Tensor] = forward(images, indices=self.map_indices, intermediates_only=True)
        for extra in self.head["extras"]:  # type: ignore[attr-defined]  # a ModuleList
            maps.append(extra(maps[-1]))
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box codes, in the order of `anchors`."""
        predictors: Any = self.head["predictors"]
        found = [predictor(x) for predictor, x in zip(predictors, self.maps(images), strict=True)]
        logits, codes = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        if codes.shape[1] != len(self.anchors):
            size = "x".join(map(str, images.shape[2:]))
            raise ValueError(
                f"images of {size} pixels, but the anchors were made for {self.image_size}: set image_size"
            )
        return logits, codes

    def detect(self, outputs: tuple[Tensor, Tensor], suppression: Suppression | None = None) -> list[Detection]:
        """Boxes, scores and labels (0 to C - 1) of each image, the highest score first."""
        options = suppression or self.suppression
        logits, codes = outputs
        scores = class_scores(logits, self.softmax)
        candidates = top_candidates(scores, codes, self.anchors, self.image_size, options.candidates)
        return suppress(*candidates, options)

    @torch.no_grad()
    def _map_sizes(self, image_size: int) -> list[tuple[int, int]]:
        """(height, width) of the maps, from a forward pass; statistics of BatchNorm stay as they are."""
        training = {module: module.training for module in self.modules()}
        weight = next(self.parameters())
        self.eval()
        sizes = [(x.shape[2], x.shape[3]) for x in self.maps(weight.new_zeros(1, 3, image_size, image_size))]
        for module, mode in training.items():
            module.training = mode
        return sizes


def _cut(backbone: nn.Module, strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices and channels of the last maps of these strides; what is not needed for them is removed."""
    info: Any = getattr(backbone, "feature_info", None)
    if not info or not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{type(backbone).__name__} does not tell timm's feature maps: choose another backbone")
    maps = [(each["reduction"], each["num_chs"]) for each in (info.info if hasattr(info, "info") else info)]
    last = {reduction: index for index, (reduction, _) in enumerate(maps)}
    missing = [stride for stride in strides if stride not in last]
    if missing or not strides or list(strides) != sorted(set(strides)):
        raise ValueError(f"the backbone has maps of strides {list(last)}, so strides={list(strides)} is not possible")
    indices = [last[stride] for stride in strides]
    if hasattr(backbone, "prune_intermediate_layers"):
        backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
    return indices, [maps[index][1] for index in indices]


def _norm_like(backbone: nn.Module) -> partial[nn.Module]:
    """BatchNorm with the epsilon and momentum of the backbone's."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            return partial(nn.BatchNorm2d, eps=module.eps, momentum=module.momentum)
    return partial(nn.BatchNorm2d)


def _initialize(module: nn.Module, prior: float | None) -> None:
    if isinstance(module, ExtraMap):
        for name, layer in (("reduce", module.reduce), ("down", module.down)):
            draw_layer(layer, name, prior)
    elif isinstance(module, Predictor):
        draw_layer(module.classes, "classes", prior)
        draw_layer(module.boxes, "boxes", prior)


def draw_layer(layer: nn.Module, name: str, prior: float | None) -> None:
    """He et al.'s initial values for further maps (the API: N(0, 0.03)), N(0, 0.01) for predictors, and the prior."""
    assert isinstance(layer, nn.Conv2d)
    if layer.bias is None:
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        return
    nn.init.normal_(layer.weight, 0.0, 0.01)
    is_classes = name.rpartition(".")[2] == "classes"
    nn.init.constant_(layer.bias, -math.log((1 - prior) / prior) if is_classes and prior else 0.0)


def _by_anchor(y_NKHW: Tensor, values: int) -> Tensor:
    """`[N, boxes * values, H, W]` -> `[N, H * W * boxes, values]`."""
    return y_NKHW.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values))
