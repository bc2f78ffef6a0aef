"""Networks by name: a timm network, converted by the paper's placement (`models.placements`), or untouched."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import efficientnet as timm_efficientnet
from torch import nn

from condconv.convert import Patterns, convert
from condconv.layers import CondConv2d, CondLinear
from condconv.patterns import matches
from condconv.routing import DEFAULT_GAIN, SoftmaxRouter, check_routing
from condconv.upcycle import UPCYCLES
from models.freezing import freeze as freeze_part
from models.initializers import INITIALIZERS
from models.placements import BACKBONES, COMMON_PLACEMENTS, Backbone, Placement
from models.pretrained import check_card, find_weights, load_weights
from models.weights import Weights

# timm's constructors that take multipliers; its public names fix them.
_SCALED: Mapping[str, Callable[..., nn.Module]] = {
    "mobilenetv1_100": timm_efficientnet._gen_mobilenet_v1,
    "mobilenetv2_100": timm_efficientnet._gen_mobilenet_v2,
    "semnasnet_100": timm_efficientnet._gen_mnasnet_a1,
    "efficientnet_b0": timm_efficientnet._gen_efficientnet,
}
_RESNET_REPEATS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnext50_32x4d": (3, 4, 6, 3)}
_RESNET_CHANNELS = (64, 128, 256, 512)


def list_backbones() -> tuple[str, ...]:
    """The names that `create_model` knows, besides "timm"."""
    return tuple(BACKBONES)


def list_placements(name: str) -> tuple[str, ...]:
    """The named placements of a backbone, its default first.

    Raises:
        ValueError: there is no such backbone.
    """
    return (*_backbone(name).placements, *COMMON_PLACEMENTS)


def create_model(
    name: str,
    num_classes: int = 1000,
    experts: int = 8,
    *,
    placement: str | None = None,
    from_block: int | None = None,
    last_blocks: int | None = None,
    layers: Patterns | None = None,
    classifier: bool | None = None,
    routing: str = "fc",
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    temperature: float = 1.0,
    router_gain: float = DEFAULT_GAIN,
    backend: str = "auto",
    init: str = "network",
    width: float = 1.0,
    depth: float = 1.0,
    small_input: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
    classifier_std: float | None = None,
    arch: str | None = None,
    pattern: Patterns | None = None,
    exclude: Patterns | None = None,
    timm_options: Mapping[str, Any] | None = None,
    pretrained: str | Path | Weights | None = None,
    new_classifier: bool = False,
    init_noise: float = 0.1,
    freeze: str = "none",
) -> nn.Module:
    """Build a network with randomly initialised weights, or with those of a file; nothing is downloaded unasked.

    Args:
        name: one of `list_backbones()`, or "timm" for any network of timm, see `arch`.
        num_classes: outputs of the classifier; 0 leaves it out.
        experts: experts per CondConv layer; 0 returns timm's network untouched (its static twin: the same values under
            the same seed, and the first expert of every CondConv layer is the static twin's layer).
        placement: one of `list_placements(name)`; None is the paper's.
        from_block: number of the first CondConv block, counted from 1, instead of the placement's choice.
        last_blocks: number of CondConv blocks at the end, instead of the placement's choice; 0 for none.
        layers: which layers of those blocks: "all", "depthwise", "pointwise", "grouped", "dense", or a list of these
            or of patterns of names; None is the placement's choice. The classifier has its own option.
        classifier: convert the classifier, or not; None is the placement's choice.
        routing: a routing function, one of `condconv.routing.ROUTINGS`.
        dropout: probability of dropping a routing weight, in training.
        expert_dropout: probability of dropping an expert, in training.
        temperature: of the routing function.
        router_gain: factor on the initial weights of routers, see `condconv.routing.FCRouter`; 1 is the authors'.
        backend: algorithm of the CondConv layers, one of `condconv.list_backends()` or "auto".
        init: "network" (experts are drawn by the network's own initialisation; for "timm" by the statistics of its
            layers), "independent", or for static `pretrained` weights "upcycle" or "upcycle_neutral": the network's
            output is that of the static one, see `condconv.upcycle`.
        width: multiplier of all channels, rounded to multiples of 8.
        depth: multiplier of the blocks of each stage, rounded up; not for mnasnet_a1.
        small_input: for images of about 32 pixels: the first two strides become 1, so that the network reduces its
            input 8-fold instead of 32-fold (`Backbone.early_strides`: stem and first strided block, or ResNet's stem
            and max pooling). Parameters and their names stay the same.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly over the blocks to this rate.
        in_chans: channels of the images.
        classifier_std: standard deviation of the classifier's initial weights (each expert's; upcycled experts are
            shares of such a classifier), its biases are then zero; None for the network's own. timm draws those of
            EfficientNets for 1,000 classes: with ten, the first loss is over 5.
        arch: for name="timm": timm's name of the network.
        pattern: for name="timm": patterns of the blocks to convert (`condconv.patterns`), all convolutions and linear
            layers in them, e.g. "stages.3.blocks.*"; each match gets one router. May be left out with classifier=True.
        exclude: for name="timm": patterns of the ends of names of layers that stay static.
        timm_options: further arguments for timm's constructor, e.g. {"bn_eps": 1e-3, "pad_type": "same"}.
        pretrained: weights, see `models.pretrained.find_weights`: ours, timm's CondConv networks (which bring
            TensorFlow's padding and epsilon with them), or static ones, for `init="upcycle"` or `experts=0`.
        new_classifier: leave the classifier of `pretrained` out, for data with other classes.
        init_noise: of the experts of `init="upcycle"`, relative to them.
        freeze: what is not trained, see `models.freezing`: "backbone", "experts" or "none".

    Returns:
        The network, in training mode. A converted one has an attribute `conversion` that says what was converted, one
        with `pretrained` weights an attribute `normalization`: the name of that of their images, None if not known.

    Raises:
        ValueError: an unknown name or an impossible option, or weights that do not fit.
        FileNotFoundError: there are no such weights.
    """
    _check_experts(experts)
    _check_numbers(num_classes=num_classes, width=width, depth=depth, in_chans=in_chans)
    check_routing(routing)  # here too, so that the static twin refuses the same mistakes
    weights = None if pretrained is None else find_weights(pretrained, name, experts, init)
    options = {**({} if weights is None else weights.timm_options), **(timm_options or {})}
    options.update(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    if name == "timm":
        refused = {"width": width != 1.0, "depth": depth != 1.0, "small_input": small_input, "placement": placement}
        network, backbone = _timm_network(arch, pattern, exclude, options, refused)
    else:
        refused = {"arch": arch, "pattern": pattern, "exclude": exclude}
        network, backbone = _named_network(name, width, depth, small_input, options, refused)
    chosen = _choose(name, backbone, placement, from_block, last_blocks, layers, classifier, num_classes)
    left_out = backbone.classifier if new_classifier else None
    if weights is not None:
        asked = {"name": name, "arch": arch, "width": width, "depth": depth, "small_input": small_input}
        check_card(weights, {**asked, "routing": routing})
        network.normalization = weights.normalization  # type: ignore[assignment]  # a name, not a submodule
        if weights.is_static:
            load_weights(network, weights, name, left_out)
    std = classifier_std if num_classes and (weights is None or new_classifier) else None
    if std is not None:  # before there are experts, whose draws the static twin does not have
        _draw_classifier(network, backbone, std)
    if experts:
        routers = {"routing": routing, "dropout": dropout, "expert_dropout": expert_dropout}
        routers |= {"temperature": temperature, "router_gain": router_gain}
        initializer = init if init != "network" else INITIALIZERS.get(backbone.family, "independent")
        network.conversion = convert(  # type: ignore[assignment]  # a record, not a submodule
            network,
            experts,
            blocks=_selected_blocks(network, name, backbone, chosen),
            layers=chosen.layers,
            exclude=backbone.exclude,
            classifier=backbone.classifier if chosen.classifier else None,
            backend=backend,
            init=replace(UPCYCLES[init], noise=init_noise) if init in UPCYCLES else initializer,
            **routers,
        )
        if weights is not None and not weights.is_static:
            load_weights(network, weights, name, left_out)
            keep_temperature(network, weights, temperature)
        if std is not None and init not in UPCYCLES:  # upcycled experts give the static classifier's output
            _draw_other_experts(network.get_submodule(backbone.classifier), std)
    freeze_part(network, freeze, backbone.classifier if num_classes else "")
    return network


def keep_temperature(network: nn.Module, weights: Weights, temperature: float) -> None:
    """Set the temperature that was asked for, where the weights just loaded are of a network built with another one.

    One that is asked for as it was then may have changed in training, by a schedule: that of the weights stays.
    """
    if weights.card is None or weights.card.model.get("temperature", temperature) == temperature:
        return
    for router in network.modules():
        if isinstance(router, SoftmaxRouter):
            router.set_temperature(temperature)


@torch.no_grad()
def _draw_classifier(network: nn.Module, backbone: Backbone, std: float) -> None:
    """Normal weights and zero biases for the static classifier, the first expert of one that is converted later."""
    if not backbone.classifier:
        raise ValueError(f"{backbone.arch} has no single classifier layer to be drawn: leave classifier_std None")
    classifier: Any = network.get_submodule(backbone.classifier)
    classifier.weight.normal_(0.0, std)
    if classifier.bias is not None:
        classifier.bias.zero_()


@torch.no_grad()
def _draw_other_experts(classifier: nn.Module, std: float) -> None:
    """The same for all experts but the first; nothing for a classifier that is static."""
    if isinstance(classifier, CondConv2d | CondLinear):
        classifier.weight[1:].normal_(0.0, std)
        if classifier.bias is not None:
            classifier.bias[1:].zero_()


def _check_experts(experts: int) -> None:
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 0:
        raise ValueError(f"experts must be an int of at least 0 (0 is the static network), got {experts!r}")


def _check_numbers(num_classes: int, width: float, depth: float, in_chans: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes must be an int of at least 0, got {num_classes!r}")
    if isinstance(in_chans, bool) or not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f"in_chans must be an int of at least 1, got {in_chans!r}")
    for option, value in (("width", width), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{option} must be a positive number, got {value!r}")


def _near(name: object, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        known = (*BACKBONES, "timm")
        raise ValueError(f"unknown model {name!r}{_near(name, known)}. Choose one of {', '.join(known)}")
    return BACKBONES[name]


def _named_network(
    name: str, width: float, depth: float, small_input: bool, options: dict[str, Any], refused: Mapping[str, Any]
) -> tuple[nn.Module, Backbone]:
    if any(value is not None for value in refused.values()):
        raise ValueError(f"arch, pattern and exclude are options of model timm, not of {name}")
    backbone = _backbone(name)
    network = _scaled_network(name, backbone, width, depth, options)
    if small_input:
        _remove_early_strides(network, backbone)
    return network, backbone


def _scaled_network(name: str, backbone: Backbone, width: float, depth: float, options: dict[str, Any]) -> nn.Module:
    depth = depth * backbone.depth
    if backbone.family == "resnet":
        if width != 1.0:
            options["channels"] = tuple(max(8, round(c * width / 8) * 8) for c in _RESNET_CHANNELS)
        if depth != 1.0:
            options["layers"] = tuple(math.ceil(n * depth) for n in _RESNET_REPEATS[backbone.arch])
    elif width != 1.0 or depth != 1.0:
        options["channel_multiplier"] = width
        if depth != 1.0:
            if backbone.arch == "semnasnet_100":
                raise ValueError(f"model {name} has no depth multiplier: leave depth=1.0")
            options["depth_multiplier"] = depth
        return _build(lambda **kwargs: _SCALED[backbone.arch](backbone.arch, **kwargs), name, options)
    return _build(lambda **kwargs: timm.create_model(backbone.arch, **kwargs), name, options)


def _timm_network(
    arch: str | None,
    pattern: Patterns | None,
    exclude: Patterns | None,
    options: dict[str, Any],
    refused: Mapping[str, Any],
) -> tuple[nn.Module, Backbone]:
    if any(refused.values()):
        raise ValueError("width, depth, small_input and placement are not available for model timm")
    if not arch:
        raise ValueError("model timm needs arch=<a name of timm.list_models()>")
    if not timm.is_model(arch):
        raise ValueError(f"timm has no network {arch!r}{_near(arch, timm.list_models())}")
    network = _build(lambda **kwargs: timm.create_model(arch, **kwargs), arch, options)
    head = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    names = {module: name for name, module in network.named_modules()}
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern or ())
    excluded = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
    placements = {"pattern": Placement(stages=patterns)}
    return network, Backbone(arch, "timm", "", excluded, names.get(head, "") if head else "", placements)


def _build(constructor: Callable[..., nn.Module], name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return constructor(pretrained=False, **options)
    except TypeError as error:  # timm's networks differ in what they take, and drop_path_rate=0.0 must not matter
        rejected = [key for key in ("drop_rate", "drop_path_rate") if f"'{key}'" in str(error) and not options[key]]
        if rejected:
            return _build(constructor, name, {key: value for key, value in options.items() if key not in rejected})
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error


def _remove_early_strides(network: nn.Module, backbone: Backbone) -> None:
    for name in backbone.early_strides:
        module = network.get_submodule(name)
        module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1  # type: ignore[assignment]


def _choose(
    name: str,
    backbone: Backbone,
    placement: str | None,
    from_block: int | None,
    last_blocks: int | None,
    layers: Patterns | None,
    classifier: bool | None,
    num_classes: int,
) -> Placement:
    """The placement with the caller's overrides."""
    named = {**COMMON_PLACEMENTS, **backbone.placements}
    placement = placement or backbone.default_placement
    if placement not in named:
        raise ValueError(
            f"model {name} has no placement {placement!r}{_near(placement, named)}: choose one of {', '.join(named)}"
        )
    chosen = named[placement]
    if from_block is not None and last_blocks is not None:
        raise ValueError("from_block and last_blocks exclude each other: give one")
    for option, value, smallest in (("from_block", from_block, 1), ("last_blocks", last_blocks, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{option} must be an int of at least {smallest}, got {value!r}")
        stages = chosen.stages if backbone.family == "timm" else None
        chosen = replace(chosen, stages=stages, from_block=from_block, last_blocks=last_blocks)
    if layers is not None:
        chosen = replace(chosen, layers=(layers,) if isinstance(layers, str) else tuple(layers))
    if classifier and not num_classes:
        raise ValueError("classifier=True needs num_classes of at least 1")
    if classifier is not None or not num_classes:
        chosen = replace(chosen, classifier=bool(classifier))
    if chosen.classifier and not backbone.classifier:
        raise ValueError(f"{backbone.arch} has no single classifier layer that could be converted")
    return chosen


def _selected_blocks(network: nn.Module, name: str, backbone: Backbone, chosen: Placement) -> tuple[str, ...]:
    """Names of the CondConv blocks, and the patterns of the single layers."""
    if chosen.stages is not None and chosen.from_block is None and chosen.last_blocks is None:
        return (*chosen.stages, *chosen.extra)
    patterns: Sequence[str] = chosen.stages if chosen.stages is not None else (backbone.blocks,)
    blocks = [n for n, _ in network.named_modules() if n and any(matches(n, pattern) for pattern in patterns)]
    first = len(blocks) - chosen.last_blocks if chosen.last_blocks is not None else (chosen.from_block or 1) - 1
    if not 0 <= first < len(blocks) + (chosen.last_blocks == 0):
        asked = (
            f"last_blocks={chosen.last_blocks}" if chosen.last_blocks is not None else f"from_block={chosen.from_block}"
        )
        raise ValueError(f"model {name} has {len(blocks)} blocks, so {asked} is not possible")
    return (*blocks[first:], *chosen.extra)
