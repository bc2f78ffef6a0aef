"""A detector as one function from images to detections, in plain tensor operations with a dynamic batch.

Runtimes differ in their NMS operators, and torchvision's gives each image its own number of boxes. Here the best
candidates of every image (a fixed number) suppress each other by a fixed number of matrix products instead:

    kept_0 = all;   kept_{t+1}(j) = no i before j that is kept_t overlaps j, of the same class, too much

After t rounds every candidate whose chain of suppressions (a kills b, which would kill c, ...) is shorter than t is
decided as greedy NMS decides it; chains as long as `ROUNDS` do not occur among real detections, and an exported file is
compared with torchvision's NMS before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.boxes import Suppression, class_scores, top_candidates
from models.ssd_network import SSD

OUTPUTS = ("boxes", "scores", "labels")
CANDIDATES = 300
"""Of an image; fewer than in evaluation, as their overlaps with each other are all computed."""
ROUNDS = 32
NOTHING = -1


class DetectorFunction(nn.Module):
    """Images `[N, 3, S, S]` -> boxes `[N, D, 4]` in pixels, scores `[N, D]` descending, labels int64 `[N, D]`.

    D is the detector's limit of detections per image; what is missing has score 0, label -1 and a box of zeros.
    """

    def __init__(self, detector: SSD) -> None:
        super().__init__()
        self.detector = detector
        self.options = export_suppression(detector)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, codes = self.detector(images)
        scores = class_scores(logits, self.detector.softmax)
        net, options = self.detector, self.options
        boxes, scores, labels = top_candidates(scores, codes, net.anchors, net.image_size, options.candidates)
        kept = keep(boxes, labels, options.iou_threshold) & (scores > options.score_threshold)
        best, index = torch.where(kept, scores, 0.0).topk(min(options.detections, scores.shape[1]), dim=1)
        there = best > 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * there[..., None]
        return boxes, best, torch.where(there, labels.gather(1, index), NOTHING)


class ReferenceFunction(DetectorFunction):
    """The same by `SSD.detect`, with torchvision's NMS: what an exported file is compared with."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.detector.detect(self.detector(images), self.options)
        count = self.options.detections
        boxes = images.new_zeros(len(found), count, 4)
        scores = images.new_zeros(len(found), count)
        labels = torch.full((len(found), count), NOTHING)
        for row, each in enumerate(found):
            number = len(each["scores"])
            boxes[row, :number], scores[row, :number] = each["boxes"], each["scores"]
            labels[row, :number] = each["labels"]
        return boxes, scores, labels


def export_suppression(detector: SSD) -> Suppression:
    """The detector's own rules, with `CANDIDATES` at most."""
    own = detector.suppression
    pairs = len(detector.anchors) * detector.num_classes
    candidates = min(own.candidates, CANDIDATES, pairs)
    return Suppression(own.score_threshold, own.iou_threshold, candidates, min(own.detections, candidates))


def keep(boxes_NK4: Tensor, labels_NK: Tensor, iou_threshold: float) -> Tensor:
    """Which candidates, best first, survive greedy suppression within their class: bool `[N, K]`."""
    left, top, right, bottom = boxes_NK4.unbind(-1)
    width = (torch.minimum(right[:, :, None], right[:, None]) - torch.maximum(left[:, :, None], left[:, None])).clamp(0)
    height = (torch.minimum(bottom[:, :, None], bottom[:, None]) - torch.maximum(top[:, :, None], top[:, None])).clamp(
        0
    )
    shared = width * height
    area = (right - left) * (bottom - top)
    overlaps = shared > iou_threshold * (area[:, :, None] + area[:, None] - shared)
    same = labels_NK[:, :, None] == labels_NK[:, None]
    order = torch.arange(boxes_NK4.shape[1], device=boxes_NK4.device)
    beats_NKK = (overlaps & same & (order[:, None] < order[None])).to(boxes_NK4.dtype)
    kept_NK = torch.ones_like(left)
    for _ in range(ROUNDS):
        kept_NK = (torch.matmul(kept_NK[:, None], beats_NKK).squeeze(1) == 0).to(boxes_NK4.dtype)
    return kept_NK > 0


def detection_difference(outputs: Sequence[Tensor], reference: Sequence[Tensor], iou_threshold: float) -> float:
    """Largest difference of detections that belong together; infinite if one has no partner in the other list.

    Detections are partners if label and, nearly, score and box agree, wherever they stand in their lists: scores that
    agree to rounding may come in another order. Such a pair may also suppress each other the other way round, so a
    detection without a partner is let pass if one of the other list with nearly the same score overlaps it that much,
    or if it is the last.
    """
    worst = 0.0
    for (boxes, scores, labels), (boxes2, scores2, labels2) in zip(
        zip(*outputs, strict=True), zip(*reference, strict=True), strict=True
    ):
        first, second = (
            (b[s > 0], s[s > 0], n[s > 0]) for b, s, n in ((boxes, scores, labels), (boxes2, scores2, labels2))
        )
        for ours, theirs in ((first, second), (second, first)):
            worst = max(worst, _one_way(ours, theirs, iou_threshold))
    return worst


def _one_way(ours: Sequence[Tensor], theirs: Sequence[Tensor], iou_threshold: float, near: float = 1e-3) -> float:
    boxes, scores, labels = ours
    boxes2, scores2, labels2 = theirs
    if not len(scores) or not len(scores2):
        return float("inf") if len(scores) and float(scores.max()) > near else 0.0
    size = max(1.0, float(boxes2.abs().max()))
    error = (scores[:, None] - scores2[None]).abs()
    other = labels[:, None] != labels2[None]
    apart = (boxes[:, None] - boxes2[None]).abs().amax(-1) / size
    best = torch.maximum(error, apart).masked_fill(other, torch.inf).amin(1)
    swapped = ((box_iou(boxes, boxes2) > iou_threshold - 0.01) & ~other & (error < near)).any(1)
    last = scores < scores2.min() + near
    counted = best[~((best > near) & (swapped | last))]
    return float(counted.max()) if len(counted) else 0.0
