"""What kind of layer a module is, in the words that placements, patterns and tables use."""

from __future__ import annotations

from torch import nn

from condconv.layers import CondConv2d, CondLinear

KINDS = ("depthwise", "pointwise", "grouped", "dense", "linear")


def layer_kind(module: nn.Module) -> str | None:
    """Name the kind of a convolution or linear layer, static or CondConv.

    Returns "depthwise" (one input channel per group, more than one group), "grouped" (any other convolution with more
    than one group, as in ResNeXt), "pointwise" (1x1), "dense" (k x k), "linear", or None for every other module.
    """
    if isinstance(module, nn.Linear | CondLinear):
        return "linear"
    if not isinstance(module, nn.Conv2d | CondConv2d):
        return None
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "grouped"
    return "pointwise" if tuple(module.kernel_size) == (1, 1) else "dense"
