"""Matching and losses of SSD against small cases computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.detection_losses import NOTHING, box_coder, detection_losses, match

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [30, 30, 40, 40], [60, 60, 70, 70]])


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, Any]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def test_anchors_above_the_threshold_and_the_best_one_of_every_box() -> None:
    # The first box has IoU 1 with anchor 0 and 0.25 with anchor 1; the second at most 1/4 with any, best with anchor 2.
    targets = [target([[0, 0, 10, 10], [35, 35, 40, 40]], [7, 2]), target([], []), target([[0, 0, 12, 12]], [1])]
    classes, boxes = match(targets, ANCHORS)
    assert classes.tolist() == [[7, NOTHING, 2, NOTHING], [NOTHING] * 4, [1, NOTHING, NOTHING, NOTHING]]
    assert boxes[0, 2].tolist() == [35, 35, 40, 40] and boxes[0, 3].tolist() == ANCHORS[3].tolist()
    assert torch.equal(boxes[1], ANCHORS)


def test_a_box_keeps_its_best_anchor_though_another_box_overlaps_that_more() -> None:
    classes, _ = match([target([[0, 0, 20, 20], [0, 0, 19, 19]], [3, 4])], ANCHORS[1:])
    assert classes.tolist() == [[3, NOTHING, NOTHING]]  # both want anchor 1; the one that overlaps it more gets it
    again, _ = match([target([[0, 0, 19, 19], [0, 0, 20, 20]], [4, 3])], ANCHORS[1:])
    assert again.tolist() == classes.tolist(), "whatever their order"


def test_codes_are_scaled_offsets_and_logarithms() -> None:
    code = box_coder.encode_single(torch.tensor([[2.0, 4, 12, 24]]), torch.tensor([[0.0, 0, 10, 10]]))
    expected = [10 * 0.2, 10 * 0.9, 0.0, 5 * math.log(2)]
    assert code[0].tolist() == pytest.approx(expected, abs=1e-5)
    decoded = box_coder.decode_single(code, torch.tensor([[0.0, 0, 10, 10]]))
    torch.testing.assert_close(decoded, torch.tensor([[2.0, 4, 12, 24]]))


def focal(logit: float, positive: bool, alpha: float = 0.75, gamma: float = 2.0) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** gamma * math.log(p) if positive else -(1 - alpha) * p**gamma * math.log(1 - p)


def losses(logits: Tensor, codes: Tensor, targets: list[dict[str, Any]], **options: Any) -> dict[str, float]:
    classes, boxes = match(targets, ANCHORS)
    found = detection_losses(logits, codes, classes, boxes, ANCHORS, **options)
    return {key: float(value) for key, value in found.items()}


def test_the_focal_loss_by_hand() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 4, 3), torch.zeros(2, 4, 4)
    targets = [target([[0, 0, 10, 10], [31, 30, 41, 40]], [2, 0]), target([], [])]
    found = losses(logits, codes, targets)
    wanted = {(0, 0, 2), (0, 2, 0)}
    each = [focal(float(logits[n, a, c]), (n, a, c) in wanted) for n in range(2) for a in range(4) for c in range(3)]
    assert found["class"] == pytest.approx(sum(each) / 2, rel=1e-5)
    # The first box is its anchor; the second is shifted by a tenth: code (1, 0, 0, 0), smooth L1 0.5, over 4 numbers.
    assert found["box"] == pytest.approx(0.5 / 4 / 2, rel=1e-4)
    assert found["matched"] == 1.0


def test_cross_entropy_with_hard_negatives_by_hand() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 2] = 4.0  # the hardest negative
    logits[0, 3, 1] = 1.0
    targets = [target([[0, 0, 10, 10]], [1])]
    positive, hardest = math.log(3), math.log(2 + math.exp(4))
    found = losses(logits, torch.zeros(1, 4, 4), targets, loss="hard_negative", negatives_per_positive=1)
    assert found["class"] == pytest.approx(positive + hardest, rel=1e-5)
    second = math.log(2 + math.e)
    found = losses(logits, torch.zeros(1, 4, 4), targets, loss="hard_negative", negatives_per_positive=2)
    assert found["class"] == pytest.approx(positive + hardest + second, rel=1e-5)


@pytest.mark.parametrize("loss", ["focal", "hard_negative"])
def test_images_without_boxes_have_finite_losses_and_gradients(loss: str) -> None:
    logits, codes = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
    classes, boxes = match([target([], []), target([], [])], ANCHORS)
    found = detection_losses(logits, codes, classes, boxes, ANCHORS, loss=loss)
    (found["class"] + found["box"]).backward()
    assert float(found["box"]) == 0 and torch.isfinite(logits.grad).all() and codes.grad.abs().max() == 0


def test_half_precision_outputs_are_measured_in_float32() -> None:
    logits, codes = torch.randn(1, 4, 3), torch.randn(1, 4, 4)
    targets = [target([[0, 0, 10, 10]], [1])]
    full = losses(logits.bfloat16().float(), codes.bfloat16().float(), targets)
    assert losses(logits.bfloat16(), codes.bfloat16(), targets) == full


def test_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match="unknown detection loss 'ce'"):
        losses(torch.zeros(1, 4, 3), torch.zeros(1, 4, 4), [target([], [])], loss="ce")
