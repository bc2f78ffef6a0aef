"""Training of SSD: which anchor learns which box, and the two losses.

Conventions of the TensorFlow Object Detection API (ssd_mobilenet_v1_300x300_coco14_sync.config) [seen]: an anchor is
matched to the box that it overlaps most if their IoU is at least 0.5, and every box gets its best anchor whatever the
IoU (of several boxes with the same best anchor, the one that overlaps it most); classification is a focal loss (alpha
0.75, gamma 2) on sigmoids, or cross entropy with hard negative mining (three negatives for each positive); boxes are
learned by smooth L1 on codes scaled by 10, 10, 5, 5, averaged over the four numbers of a code; both losses are divided
by the number of matched anchors of the batch (of all processes).

Letters: `N` images, `A` anchors, `M` boxes of an image, `C` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.ops import box_iou, sigmoid_focal_loss

LOSSES = ("focal", "hard_negative")
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
NOTHING = -1
"""The class target of an anchor that is matched to no box."""
box_coder = BoxCoder(CODE_WEIGHTS)


def match(
    targets: Sequence[Mapping[str, Any]], anchors_A4: Tensor, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """What each anchor has to learn.

    Args:
        targets: of each image, `boxes` float `[M, 4]` (x1, y1, x2, y2 in pixels) and `labels` int64 `[M]`, M may be 0.
        anchors_A4: in the same pixels.
        iou_threshold: from which an anchor is matched to a box.

    Returns:
        Class targets int64 `[N, A]`, `NOTHING` where no box is matched, and boxes `[N, A, 4]`, the anchor itself there.
    """
    matcher = SSDMatcher(iou_threshold)
    classes, boxes = [], []
    for target in targets:
        if len(target["boxes"]) == 0:
            classes.append(torch.full((len(anchors_A4),), NOTHING, device=anchors_A4.device))
            boxes.append(anchors_A4)
            continue
        iou_MA = box_iou(target["boxes"].to(anchors_A4.dtype), anchors_A4)
        found_A = _with_best_anchors(matcher(iou_MA), iou_MA)
        matched_A = found_A >= 0
        index_A = found_A.clamp(min=0)
        classes.append(torch.where(matched_A, target["labels"][index_A], NOTHING))
        boxes.append(torch.where(matched_A[:, None], target["boxes"][index_A].to(anchors_A4.dtype), anchors_A4))
    return torch.stack(classes), torch.stack(boxes)


def _with_best_anchors(found_A: Tensor, iou_MA: Tensor) -> Tensor:
    """The matches with each box on its best anchor; one that several boxes want goes to the one that overlaps it most.

    torchvision's matcher leaves that to the order in which a GPU writes.
    """
    best_M, anchor_M = iou_MA.max(1)
    place_M = torch.empty_like(anchor_M)
    place_M[best_M.argsort(descending=True, stable=True)] = torch.arange(len(anchor_M), device=anchor_M.device)
    first_A = torch.full_like(found_A, len(anchor_M)).scatter_reduce(0, anchor_M, place_M, "amin")
    winners = (first_A[anchor_M] == place_M).nonzero().squeeze(1)
    return found_A.index_put((anchor_M[winners],), winners)


def detection_losses(
    class_logits: Tensor,
    box_codes: Tensor,
    class_targets: Tensor,
    box_targets: Tensor,
    anchors_A4: Tensor,
    *,
    loss: str = "focal",
    alpha: float = 0.75,
    gamma: float = 2.0,
    negatives_per_positive: float = 3.0,
    num_matched: Tensor | None = None,
) -> dict[str, Tensor]:
    """The two parts of the loss, `class` and `box`, and the number of matched anchors per image, `matched`.

    Args:
        class_logits: `[N, A, C]` for the focal loss, `[N, A, 1 + C]` (background first) for "hard_negative".
        box_codes: `[N, A, 4]`.
        class_targets, box_targets: see `match`.
        anchors_A4: the anchors.
        loss: one of `LOSSES`.
        alpha, gamma: of the focal loss; alpha is the weight of a positive, 1 - alpha of a negative.
        negatives_per_positive: of "hard_negative": so many anchors without a box, those with the largest losses, count
            for each one with a box, within an image.
        num_matched: what both parts are divided by; None for the matched anchors of this batch, at least 1.
    """
    exact = torch.promote_types(class_logits.dtype, torch.float32)
    class_logits, box_codes = class_logits.to(exact), box_codes.to(exact)
    positive_NA = class_targets != NOTHING
    if num_matched is None:
        num_matched = positive_NA.sum().clamp(min=1)
    if loss == "focal":
        wanted = F.one_hot(class_targets.clamp(min=0), class_logits.shape[-1]) * positive_NA[..., None]
        class_loss = sigmoid_focal_loss(class_logits, wanted.to(class_logits.dtype), alpha, gamma, reduction="sum")
    elif loss == "hard_negative":
        class_loss = _mined_cross_entropy(class_logits, class_targets, positive_NA, negatives_per_positive)
    else:
        raise ValueError(f"unknown detection loss {loss!r}: choose one of {', '.join(LOSSES)}")
    anchors = anchors_A4.expand_as(box_targets)[positive_NA]
    wanted_codes = box_coder.encode_single(box_targets[positive_NA], anchors)
    box_loss = F.smooth_l1_loss(box_codes[positive_NA], wanted_codes, reduction="sum") / len(CODE_WEIGHTS)
    matched = positive_NA.sum() / len(class_targets)
    return {"class": class_loss / num_matched, "box": box_loss / num_matched, "matched": matched}


def _mined_cross_entropy(logits: Tensor, class_targets: Tensor, positive_NA: Tensor, ratio: float) -> Tensor:
    """Sum of cross entropies over the positives and the hardest negatives of each image (Liu et al., *SSD*, 2016)."""
    labels = class_targets + 1  # 0 is background
    each_NA = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    negative_NA = each_NA.detach().masked_fill(positive_NA, -torch.inf)
    rank_NA = negative_NA.argsort(dim=1, descending=True).argsort(dim=1)
    chosen_NA = rank_NA < (ratio * positive_NA.sum(1, keepdim=True))
    return (each_NA * (positive_NA | (chosen_NA & ~positive_NA))).sum()
