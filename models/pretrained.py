"""Weights into a network, completely or not at all: published CondConv networks, our own files, static networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from condconv.checkpoints import from_timm, load_complete, misfits, to_timm
from condconv.upcycle import UPCYCLES
from models.weights import HUB, Weights, read_weights

PUBLISHED: Mapping[tuple[str, int], str] = {
    ("efficientnet_b0", 4): "timm/tf_efficientnet_cc_b0_4e.in1k",
    ("efficientnet_b0", 8): "timm/tf_efficientnet_cc_b0_8e.in1k",
    ("efficientnet_b0_depth", 8): "timm/tf_efficientnet_cc_b1_8e.in1k",  # depth 1.1, width 1.0: the paper's B0-depth
}
"""The authors' trained networks, converted by timm, by our name and number of experts."""

# torchvision names the layers of these by position, in the order in which timm has them.
_TORCHVISION_BY_POSITION = ("mobilenet_v2", "efficientnet_b0")


# What a detector's weights learned to correct: boxes of other anchors have other codes.
_ANCHORS = ("min_scale", "max_scale", "aspect_ratios", "reduce_lowest", "strides", "num_maps")
# By whether the weights are of a detector.
_TARGETS = {False: "models.create_model", True: "models.create_detector"}
_TASKS = {False: "models.classification.ClassificationModule", True: "models.detection.DetectionModule"}


def find_weights(pretrained: str | Path | Weights, name: str, experts: int, init: str) -> Weights:
    """Read the weights that `create_model(pretrained=...)` asks for, and refuse those that cannot fit.

    Args:
        pretrained: as for `models.weights.read_weights`, or "published": the authors' weights of this network; or
            weights that were read already.
        name, experts, init: of the network that is to be built.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: they are of another network, or of a static one where experts are wanted, or the reverse.
    """
    name = name.removeprefix("ssd_")  # of a detector: its backbone's weights
    if pretrained == "published":
        if (name, experts) not in PUBLISHED:
            known = ", ".join(f"{other} with {number} experts" for other, number in PUBLISHED)
            raise ValueError(f"no weights of {name} with {experts} experts were published; there are {known}")
        pretrained = f"{HUB}{PUBLISHED[name, experts]}"
    weights = pretrained if isinstance(pretrained, Weights) else read_weights(pretrained)
    if weights.is_detector and weights.is_static and experts:
        raise ValueError(
            f"{weights.source} holds a static detector, which cannot get experts: start from a classifier's weights"
        )
    if weights.is_static and experts and init not in UPCYCLES:
        raise ValueError(
            f"{weights.source} holds a static network: init={init!r} would leave its experts untrained. Give "
            "init='upcycle' (condconv.init=upcycle), which keeps its output, or experts=0"
        )
    if not weights.is_static:
        if init in UPCYCLES:
            raise ValueError(f"{weights.source} has experts already; init={init!r} is for weights of static networks")
        if weights.num_experts != experts:
            raise ValueError(f"{weights.source} has {weights.num_experts} experts per layer, the network {experts}")
    return weights


def check_card(weights: Weights, asked: Mapping[str, Any]) -> None:
    """Refuse a file of ours of another network than is asked for.

    Raises:
        ValueError: with the settings that differ.
    """
    if weights.card is None:
        return
    theirs = weights.card.model
    keys = ("name", "arch", "width", "depth", "small_input", *_ANCHORS) + (() if weights.is_static else ("routing",))

    def plain(value: Any) -> Any:
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    different = [
        f"{key}={theirs[key]!r} in the file, {asked[key]!r} asked for"
        for key in keys
        if key in theirs and key in asked and plain(theirs[key]) != plain(asked[key])
    ]
    if different:
        raise ValueError(f"{weights.source} is of another network, so nothing was loaded: {'; '.join(different)}")


def for_evaluation(
    pretrained: str, model: Mapping[str, Any], condconv: Mapping[str, Any]
) -> tuple[Weights, dict[str, dict[str, Any]]]:
    """Weights, and the config groups `model`, `condconv` and `task` of their network.

    Args:
        pretrained: see `find_weights`.
        model, condconv: the groups as given, None where nothing was; a file of ours needs none, but may get a backend.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: the file does not say which network it is of, and no model is given; or they do not fit.
    """
    given = {key: value for key, value in condconv.items() if value is not None}
    if model.get("name") is None:
        weights = read_weights(pretrained)
        if weights.card is None:
            raise ValueError(
                f"{pretrained} does not say which network it is of: add model=... and condconv.experts=..."
            )
        model, given = {**weights.card.model, "_target_": _TARGETS[weights.is_detector]}, {"backend": "auto", **given}
        settings = {"model": {"timm_options": {}, **model, **given}, "condconv": {}}
        return weights, {**settings, "task": {"_target_": _TASKS[weights.is_detector]}}
    weights = find_weights(pretrained, str(model["name"]), given.get("experts", 8), given.get("init", "network"))
    return weights, {"model": dict(model), "condconv": given, "task": {"_target_": _TASKS[weights.is_detector]}}


def load_weights(network: nn.Module, weights: Weights, name: str, new_classifier: str | None = None) -> None:
    """Load into a network that is static or converted, as the weights are.

    Args:
        network: changed in place.
        weights: whose every tensor must fit.
        name: of the backbone.
        new_classifier: name of a layer whose weights are left as they are, for other classes.

    Raises:
        ValueError: with the tensors that are missing, unknown or of another shape; nothing was loaded.
    """
    state: Mapping[str, Tensor] = weights.state
    if weights.is_timm_condconv:
        state = from_timm(state, network)
    elif name in _TORCHVISION_BY_POSITION and "features.0.0.weight" in state:
        state = _from_torchvision(state, network, weights.source)
    if new_classifier is not None:
        own = network.state_dict()
        kept = {key: value for key, value in own.items() if key.startswith(f"{new_classifier}.")}
        others = {key: value for key, value in state.items() if not key.startswith(f"{new_classifier}.")}
        state = {**others, **kept}
    load_complete(network, state, weights.source)


def load_detector(detector: nn.Module, weights: Weights, new_classifier: bool = False) -> None:
    """Load a detector's weights into a detector; with `new_classifier` its class predictors stay as they are.

    Raises:
        ValueError: with the tensors that are missing, unknown or of another shape; nothing was loaded.
    """
    state = dict(weights.state)
    if new_classifier:
        parts = ("head.predictors.", ".classes.")
        left = {key for key in state if key.startswith(parts[0]) and parts[1] in key}
        own = {key: value for key, value in detector.state_dict().items() if key in left}
        state = {key: own.get(key, value) for key, value in state.items() if key not in left or key in own}
    load_complete(detector, state, weights.source)


def _from_torchvision(state: Mapping[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """The state dict of a torchvision network under timm's names: the same tensors in the same order."""
    own = network.state_dict()
    if len(own) != len(state):
        raise ValueError(
            f"{source} looks like a network of torchvision with {len(state)} tensors, the network has {len(own)}: "
            "nothing was loaded"
        )
    return dict(zip(own, state.values(), strict=True))


def timm_name(model: Mapping[str, Any]) -> str:
    """The network of timm that computes the same from the same weights.

    Raises:
        ValueError: there is none: another architecture or number of experts, or padding and epsilon that are of none
            of them.
    """
    sizes = {"efficientnet_b0": "b0", "efficientnet_b0_depth": "b1"}
    plain = model.get("width", 1.0) == 1.0 and model.get("depth", 1.0) == 1.0 and not model.get("small_input")
    if model.get("name") not in sizes or not plain:
        raise ValueError(
            "format=timm: timm has CondConv for efficientnet_b0 and efficientnet_b0_depth in full width alone."
        )
    options = model.get("timm_options") or {}
    prefixes = {("same", 1e-3): "tf_", ("", 1e-5): ""}
    found = (options.get("pad_type", ""), options.get("bn_eps", 1e-5))
    if found not in prefixes:
        raise ValueError(
            f"format=timm: timm's networks have TensorFlow's padding and epsilon (pad_type: same, bn_eps: 0.001) or "
            f"neither, this one {found[0] or 'symmetric'!r} padding and {found[1]}: none computes the same."
        )
    start = f"{prefixes[found]}efficientnet_cc_{sizes[model['name']]}"
    name = f"{start}_{model['experts']}e"
    if not timm.is_model(name):
        known = ", ".join(timm.list_models(f"{start}_*"))
        raise ValueError(f"format=timm: timm has no {name}, of {model['name']} there is {known}.")
    return name


def save_for_timm(network: nn.Module, model: Mapping[str, Any], path: Path) -> str:
    """Write a state dict that timm loads; returns the name of timm's network, see `timm_name`.

    Raises:
        ValueError: timm has no such network, or its own has other layers with experts.
    """
    name, state = timm_name(model), to_timm(network)
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=model["num_classes"], in_chans=model.get("in_chans", 3))
    if problems := misfits(state, theirs):
        raise ValueError(
            f"format=timm: {name} has experts in other layers, those of the paper's placement (placement, from_block, "
            f"last_blocks and layers as they are by default, classifier=false). Tensors {problems}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return name


def open_network(weights: Weights) -> nn.Module:
    """The network of a file of ours, built from its card, with its weights, in eval mode.

    Raises:
        ValueError: the file has no card (it is not ours), or its tensors do not fit.
    """
    from models.backbones import create_model  # which imports this file
    from models.ssd import create_detector  # and so does this

    if weights.card is None:
        raise ValueError(
            f"{weights.source} does not say which network it is of: it was not written by export.py, save_pretrained "
            "or train.py. Build the network with create_model(name, ..., pretrained=<file>)"
        )
    model = {**weights.card.model, "backend": "auto"}  # not that of another machine
    network = create_detector(**model) if weights.is_detector else create_model(**model)
    load_complete(network, weights.state, weights.source)
    return network.eval()
