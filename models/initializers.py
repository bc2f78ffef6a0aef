"""How timm initialises the layers of its networks: experts are drawn in the same way, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def initialize_efficientnet(layer: nn.Module, name: str) -> None:
    """TensorFlow's initialisation of the EfficientNet family, as timm applies it to static layers.

    Convolutions N(0, 2 / fan_out) with the fan of one group, linear layers U(-1, 1) / sqrt(fan_out), zero biases.
    """
    weight: Any = layer.weight
    if isinstance(layer, nn.Conv2d):
        fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(weight, 0.0, math.sqrt(2.0 / fan_out))
    else:
        nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[0]), 1 / math.sqrt(weight.shape[0]))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def initialize_resnet(layer: nn.Module, name: str) -> None:
    """Initialise as timm's ResNet: convolutions by He et al. (fan-out, ReLU), the classifier by PyTorch's default."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        layer.reset_parameters()


INITIALIZERS: Mapping[str, Callable[[nn.Module, str], None]] = {
    "efficientnet": initialize_efficientnet,
    "resnet": initialize_resnet,
}
