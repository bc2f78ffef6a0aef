"""From what SSD predicts to boxes: scores, decoding, non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from models.detection_losses import box_coder

Detection = dict[str, Tensor]
"""Of one image: `boxes` float `[D, 4]` (x1, y1, x2, y2 in pixels), `scores` `[D]` descending, `labels` int64 `[D]`."""


@dataclass(frozen=True)
class Suppression:
    """What of the predictions becomes a detection; the values of the TensorFlow Object Detection API [seen].

    Attributes:
        score_threshold: smaller scores are dropped. (TensorFlow's 1e-8 keeps everything; nothing below 0.001 is among
            the hundred best of an image.)
        iou_threshold: of two boxes of a class that overlap more, the one with the smaller score is dropped.
        candidates: only so many (anchor, class) pairs of an image, those with the highest scores, are looked at.
        detections: at most so many per image are kept.
    """

    score_threshold: float = 0.001
    iou_threshold: float = 0.6
    candidates: int = 1000
    detections: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1 or not 0 < self.iou_threshold <= 1:
            raise ValueError(f"score_threshold must be in [0, 1) and iou_threshold in (0, 1], got {self}")
        if not 1 <= self.detections <= self.candidates:
            raise ValueError(f"detections must be at least 1 and at most candidates, got {self}")


def class_scores(class_logits: Tensor, softmax: bool) -> Tensor:
    """Scores `[..., C]` of class logits `[..., C]`, or of `[..., 1 + C]` (background first) with softmax."""
    logits = class_logits.float()
    return logits.softmax(-1)[..., 1:] if softmax else logits.sigmoid()


def top_candidates(
    scores_NAC: Tensor, box_codes_NA4: Tensor, anchors_A4: Tensor, image_size: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The (anchor, class) pairs with the highest scores: boxes `[N, K, 4]`, clipped to the image, scores and labels."""
    num_classes = scores_NAC.shape[-1]
    flat = scores_NAC.flatten(1)
    scores_NK, index_NK = flat.topk(min(count, flat.shape[1]), dim=1)
    anchor_NK = torch.div(index_NK, num_classes, rounding_mode="floor")
    codes_NK4 = box_codes_NA4.float().gather(1, anchor_NK[..., None].expand(-1, -1, 4))
    decoded = box_coder.decode_single(codes_NK4.flatten(0, 1), anchors_A4[anchor_NK].flatten(0, 1))
    boxes_NK4 = clip_boxes_to_image(decoded, (image_size, image_size)).view_as(codes_NK4)
    return boxes_NK4, scores_NK, index_NK - anchor_NK * num_classes


def suppress(boxes_NK4: Tensor, scores_NK: Tensor, labels_NK: Tensor, options: Suppression) -> list[Detection]:
    """Class by class non-maximum suppression of each image's candidates, which come in the order of their scores."""
    found = []
    for boxes, scores, labels in zip(boxes_NK4, scores_NK, labels_NK, strict=True):
        count = int((scores > options.score_threshold).sum())
        boxes, scores, labels = boxes[:count], scores[:count], labels[:count]
        kept = batched_nms(boxes, scores, labels, options.iou_threshold)[: options.detections]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found
