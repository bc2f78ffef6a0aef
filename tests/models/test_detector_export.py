"""Exported detectors: their suppression is greedy NMS, and a file with other detections is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from models import create_detector
from models.detector_export import DetectorFunction, ReferenceFunction, detection_difference, keep
from models.exporting import BATCHES, export_onnx, export_torch, onnx_runner


def detector(experts: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    net = create_detector(num_classes=3, experts=experts, image_size=64, width=0.25, depth=0.5, router_gain=1.0)
    for _ in range(3):
        net.train()(torch.randn(8, 3, 64, 64))
    for predictor in net.head.predictors:  # scores and boxes that differ, as after training
        torch.nn.init.normal_(predictor.classes.weight, 0, 0.3)
        torch.nn.init.normal_(predictor.boxes.weight, 0, 0.1)
    return net.eval()


def candidates(seed: int, count: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, count, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 10 + torch.rand(2, count, 2, generator=generator) * 20], -1)
    scores = torch.rand(2, count, generator=generator).sort(dim=1, descending=True).values
    return boxes, scores, torch.randint(0, 2, (2, count), generator=generator)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_suppression_by_matrix_products_is_greedy_suppression(seed: int, threshold: float) -> None:
    boxes, scores, labels = candidates(seed)
    for row, kept in enumerate(keep(boxes, labels, threshold)):
        expected = batched_nms(boxes[row], scores[row], labels[row], threshold).sort().values
        assert torch.equal(kept.nonzero().flatten(), expected) and 10 < len(expected) < 80


def test_the_function_gives_the_detectors_detections() -> None:
    net = detector()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        found, expected = DetectorFunction(net)(images), ReferenceFunction(net)(images)
    for output, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(output, reference)
    assert (expected[1] > 0).any() and (expected[2] >= -1).all()


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    net = detector()
    exported = export_onnx(net, tmp_path / "net.onnx", 64)
    assert exported.error < 1e-4
    run = onnx_runner(exported.path)
    for batch in BATCHES:
        boxes, scores, labels = run(torch.randn(batch, 3, 64, 64))
        assert boxes.shape == (batch, 100, 4) and scores.shape == labels.shape == (batch, 100)
    with pytest.raises(ValueError, match="dynamic_size=false"):
        export_onnx(net, tmp_path / "free.onnx", 64, dynamic_size=True)


@pytest.mark.slow
def test_torch_export(tmp_path: Path) -> None:
    """Also by tests/test_detection_commands.py, through export.py."""
    assert export_torch(detector(), tmp_path / "net.pt2", 64).error < 1e-4


def test_differences_of_detections() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]]])
    scores, labels = torch.tensor([[0.9, 0.5, 0.0]]), torch.tensor([[1, 0, -1]])
    one = (boxes, scores, labels)
    assert detection_difference(one, one, 0.6) == 0
    moved = boxes.clone()
    moved[0, 0, 2] += 0.02
    assert detection_difference((moved, scores, labels), one, 0.6) == pytest.approx(0.02 / 40, rel=1e-3)
    swapped = tuple(tensor[:, [1, 0, 2]] for tensor in one)
    assert detection_difference(swapped, one, 0.6) == 0
    assert detection_difference((boxes, scores, torch.tensor([[2, 0, -1]])), one, 0.6) == float("inf")
    assert detection_difference((boxes, torch.tensor([[0.9, 0.4, 0]]), labels), one, 0.6) > 0.05
    missing = (boxes, torch.tensor([[0.0, 0.5, 0]]), labels)
    assert detection_difference(missing, one, 0.6) == float("inf")
