"""Parts of a network that are not trained: `condconv.freeze=backbone|experts|none`."""

from __future__ import annotations

from typing import Any

from torch import nn

from condconv.layers import CondConv2d, CondLinear
from condconv.routing import Router

FREEZES = ("none", "backbone", "experts")
_RUNNING_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


def freeze(network: nn.Module, what: str, classifier: str = "") -> None:
    """Take gradients from a part of the network, in place.

    Args:
        network: static or converted.
        what: "backbone": all but experts, routers and the classifier, and running statistics stay as they are;
            "experts": the experts' kernels and biases, so that routers and all static layers are trained; "none".
        classifier: name of the classifier, or of a detector's head.

    Raises:
        ValueError: an unknown part, or one that the network does not have.
    """
    if what not in FREEZES:
        raise ValueError(f"freeze must be one of {', '.join(FREEZES)}, got {what!r}")
    layers = [module for module in network.modules() if isinstance(module, CondConv2d | CondLinear)]
    if what == "experts":
        if not layers:
            raise ValueError("freeze='experts' needs a network with experts; this one is static")
        for layer in layers:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
    if what == "backbone":
        _freeze_backbone(network, layers, classifier)


def _freeze_backbone(network: nn.Module, layers: list[Any], classifier: str) -> None:
    routers = [module for module in network.modules() if isinstance(module, Router)]
    trained = [p for layer in layers for p in layer.parameters(recurse=False)]
    trained += [p for router in routers for p in router.parameters()]
    if classifier:
        trained += list(network.get_submodule(classifier).parameters())
    if not trained:
        raise ValueError("freeze='backbone' leaves nothing to train: the network has neither experts nor a classifier")
    kept = {id(parameter) for parameter in trained}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    for name, module in network.named_modules():
        if isinstance(module, _RUNNING_STATISTICS) and not (classifier and name.startswith(f"{classifier}.")):
            module.register_forward_pre_hook(_stay_in_eval_mode)


def _stay_in_eval_mode(module: nn.Module, args: Any) -> None:
    """Normalise with the frozen statistics, though `network.train()` put the layer into training mode."""
    module.training = False
