"""SSD detectors by name: a backbone of `models.create_model`, the head of `models.ssd_network`, CondConv in either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from condconv.convert import Conversion, Patterns, convert
from condconv.routing import DEFAULT_GAIN
from models.anchors import ASPECT_RATIOS, MAX_SCALE, MIN_SCALE
from models.backbones import create_model, keep_temperature, list_backbones
from models.boxes import Suppression
from models.detection_losses import LOSSES
from models.freezing import freeze as freeze_part
from models.pretrained import check_card, find_weights, load_detector
from models.ssd_network import PRIOR, SSD, draw_layer
from models.weights import Weights

PREFIX = "ssd_"


def list_detectors() -> tuple[str, ...]:
    """The names that `create_detector` knows, besides "ssd_timm"."""
    return tuple(f"{PREFIX}{name}" for name in list_backbones())


def create_detector(
    name: str = "ssd_mobilenet_v1",
    num_classes: int = 80,
    experts: int = 8,
    *,
    image_size: int = 300,
    condconv_extras: bool = False,
    condconv_predictors: bool = False,
    loss: str = "focal",
    strides: Sequence[int] = (16, 32),
    num_maps: int = 6,
    min_scale: float = MIN_SCALE,
    max_scale: float = MAX_SCALE,
    aspect_ratios: Sequence[float] = ASPECT_RATIOS,
    reduce_lowest: bool = True,
    score_threshold: float = Suppression.score_threshold,
    iou_threshold: float = Suppression.iou_threshold,
    candidates: int = Suppression.candidates,
    detections: int = Suppression.detections,
    width: float = 1.0,
    placement: str | None = None,
    last_blocks: int | None = None,
    classifier: bool | None = None,
    routing: str = "fc",
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    temperature: float = 1.0,
    router_gain: float = DEFAULT_GAIN,
    backend: str = "auto",
    pretrained: str | Path | Weights | None = None,
    new_classifier: bool = False,
    freeze: str = "none",
    **backbone_options: Any,
) -> SSD:
    """Build SSD on a backbone, with random weights or with those of a file.

    Args:
        name: "ssd_" and the name of a backbone (`list_detectors()`), or "ssd_timm" with `arch`.
        num_classes: without the background.
        experts: experts per CondConv layer; 0 is the static twin: the same values under the same seed.
        image_size: side of the images in pixels.
        condconv_extras: CondConv also in the further maps, with one router for each map.
        condconv_predictors: CondConv also in the predictors, with one router for each map. `classifier=True` and the
            placements that end in the classifier alone mean the same.
        loss: "focal", or "hard_negative", for which the network gets a background class and softmax.
        strides, num_maps: see `SSD`.
        min_scale, max_scale, aspect_ratios, reduce_lowest: see `models.anchors.anchor_specs`.
        score_threshold, iou_threshold, candidates, detections: see `models.boxes.Suppression`.
        pretrained: a classifier's weights, all of which but the classifier must fit the backbone (see
            `models.pretrained.find_weights`; a static one with experts needs init="upcycle"), or those of a detector.
        new_classifier: of a detector's weights, leave the class predictors out, for data with other classes.
        freeze: "backbone": all of it but experts and routers; "experts"; "none".
        backbone_options: the others of `models.create_model`, and its options of the same names as above.

    Raises:
        ValueError: an unknown name or an impossible option, or weights that do not fit.
        FileNotFoundError: there are no such weights.
    """
    backbone_name = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or backbone_name not in (*list_backbones(), "timm"):
        raise ValueError(f"unknown detector {name!r}: choose one of {', '.join(list_detectors())}, ssd_timm")
    if loss not in LOSSES:
        raise ValueError(f"unknown detection loss {loss!r}: choose one of {', '.join(LOSSES)}")
    weights = None
    if pretrained is not None:
        weights = find_weights(pretrained, backbone_name, experts, str(backbone_options.get("init", "network")))
    if weights is not None and weights.is_detector:
        given = backbone_options.get("timm_options") or {}
        backbone_options["timm_options"] = {**weights.timm_options, **given}
    routing_options = {
        "routing": routing,
        "dropout": dropout,
        "expert_dropout": expert_dropout,
        "temperature": temperature,
        "router_gain": router_gain,
        "backend": backend,
    }
    head_seed = int(torch.randint(2**62, ()))  # the same head for the static twin, whose backbone draws fewer numbers
    predictors_alone = last_blocks == 0 or placement == "classifier"
    backbone = create_model(
        backbone_name,
        num_classes=0,
        experts=0 if predictors_alone else experts,
        width=width,
        placement=None if predictors_alone else placement,
        last_blocks=None if predictors_alone else last_blocks,
        pretrained=None if weights is None or weights.is_detector else weights,
        new_classifier=weights is not None,
        **routing_options,  # type: ignore[arg-type]
        **backbone_options,
    )
    with _seeded(head_seed):
        detector = SSD(
            backbone,
            num_classes,
            image_size,
            width=width,
            softmax=loss == "hard_negative",
            strides=strides,
            num_maps=num_maps,
            suppression=Suppression(score_threshold, iou_threshold, candidates, detections),
            anchors={
                "min_scale": min_scale,
                "max_scale": max_scale,
                "aspect_ratios": aspect_ratios,
                "reduce_lowest": reduce_lowest,
            },
        )
        parts = ["extras"] if condconv_extras else []
        parts += ["predictors"] if condconv_predictors or classifier or placement == "classifier" else []
        if experts and parts:
            detector.head.conversion = _convert_head(detector, experts, parts, routing_options)  # type: ignore[assignment]
    if weights is not None and not weights.is_detector:
        _report(weights, detector)
    if weights is not None and weights.is_detector:
        asked = {"name": name, "width": width, "routing": routing, "strides": strides, "num_maps": num_maps}
        asked |= {"min_scale": min_scale, "max_scale": max_scale, "aspect_ratios": aspect_ratios}
        check_card(weights, asked | {"reduce_lowest": reduce_lowest})
        load_detector(detector, weights, new_classifier)
        keep_temperature(detector, weights, temperature)
    freeze_part(detector, freeze, "head")
    return detector


def _convert_head(detector: SSD, experts: int, parts: list[str], options: Mapping[str, Any]) -> Conversion:
    """Experts in the further maps or the predictors.

    Routing weights begin near 1/2, so the mixed bias would be experts / 2 times the prior's: it is divided by that.
    """
    patterns: Patterns = [f"{part}.*" for part in parts]
    prior = None if detector.softmax else PRIOR
    conversion = convert(detector.head, experts, blocks=patterns, init=partial(draw_layer, prior=prior), **options)
    if "predictors" in parts and options["routing"] != "softmax":
        with torch.no_grad():
            for predictor in detector.head["predictors"]:  # type: ignore[attr-defined]  # a ModuleList
                predictor.classes.bias.div_(experts / 2)
    return conversion


@rank_zero_only
def _report(weights: Weights, detector: SSD) -> None:
    """How much was loaded: a detector on a backbone with random weights learns little, and nobody sees why."""
    count = len(detector.backbone.state_dict())
    print(f"{weights.source}: {count} tensors loaded into the backbone, 0 missing; its classifier is not used")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
