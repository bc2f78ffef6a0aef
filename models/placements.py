"""Which layers of which network the paper replaces by CondConv layers, as far as that is known: tables, no code.

Source: Yang et al., *CondConv*, NeurIPS 2019, and the authors' EfficientNet code (tensorflow/tpu). Each default
placement has a tag that says how sure it is: [seen] in the authors' code; [recalled] from the paper, not checked
against its text; [derived] from published numbers of parameters; [analogy] with another network, nothing found. Blocks
are numbered from 1, in the order of execution; squeeze-and-excitation, downsampling projections, stems and heads are
static everywhere, except where a placement says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Placement:
    """A choice of CondConv layers: one of `stages`, `from_block` and `last_blocks` selects among a network's blocks.

    Attributes:
        stages: patterns of block names (`condconv.patterns`).
        from_block: number of the first CondConv block, counted from 1; all later blocks follow.
        last_blocks: how many blocks at the end; 0 for none.
        layers: which layers of a block, "all", kinds or patterns, as in `condconv.convert`.
        extra: patterns of single layers outside the blocks, each with a router of its own.
        classifier: whether the classifier is a CondConv layer too.
    """

    stages: tuple[str, ...] | None = None
    from_block: int | None = None
    last_blocks: int | None = None
    layers: tuple[str, ...] = ("all",)
    extra: tuple[str, ...] = ()
    classifier: bool = False


@dataclass(frozen=True)
class Backbone:
    """A timm network and where CondConv goes in it.

    Attributes:
        arch: timm's name of the network.
        family: "efficientnet" or "resnet": how timm builds, scales and initialises it.
        blocks: pattern of all its blocks.
        exclude: parts of blocks that stay static.
        classifier: name of the classifier.
        placements: by name; the first is the default.
        depth: depth multiplier of the network over `arch`.
        early_strides: modules whose stride 2 becomes 1 for small images (`small_input`), with parameters unchanged.
    """

    arch: str
    family: str
    blocks: str
    exclude: tuple[str, ...]
    classifier: str
    placements: Mapping[str, Placement]
    depth: float = 1.0
    early_strides: tuple[str, ...] = field(default=())

    @property
    def default_placement(self) -> str:
        return next(iter(self.placements))


# Placements that every network has besides its own: for sweeps over depth.
COMMON_PLACEMENTS: Mapping[str, Placement] = {
    "all": Placement(from_block=1, classifier=True),
    "blocks": Placement(from_block=1),
    "classifier": Placement(last_blocks=0, classifier=True),
}

_MOBILE_STRIDES = ("conv_stem", "blocks.1.0.conv_dw")
_RESNET_STRIDES = ("conv1", "maxpool")
_LAST_3_BLOCKS = {"last3": Placement(last_blocks=3, classifier=True)}  # [derived]: ResNet-18 then has 81.35M
_LAST_3_STAGES = {"last3stages": Placement(stages=("blocks.[456].*",))}  # [seen]: k5 c112, c192, k3 c320

BACKBONES: Mapping[str, Backbone] = {
    "mobilenet_v1": Backbone(
        arch="mobilenetv1_100",
        family="efficientnet",
        blocks="blocks.*.*",
        exclude=(),
        classifier="classifier",
        placements={"from6": Placement(from_block=6, classifier=True)},  # [recalled], and our arithmetic agrees
        early_strides=_MOBILE_STRIDES,
    ),
    "mobilenet_v2": Backbone(
        arch="mobilenetv2_100",
        family="efficientnet",
        blocks="blocks.*.*",
        exclude=(),
        classifier="classifier",
        placements={
            "final6": Placement(last_blocks=6, classifier=True),  # [recalled]: it adds 22.1M MADDs
            # The paper's table [recalled] has +28M MADDs, which needs nearly all blocks and the last 1x1 convolution.
            "paper_cost": Placement(from_block=1, extra=("conv_head",), classifier=True),
        },
        early_strides=_MOBILE_STRIDES,
    ),
    "mnasnet_a1": Backbone(
        arch="semnasnet_100",
        family="efficientnet",
        blocks="blocks.*.*",
        exclude=("se",),
        classifier="classifier",
        placements={"final6": Placement(last_blocks=6, classifier=True)},  # [analogy] with MobileNetV2
        early_strides=_MOBILE_STRIDES,
    ),
    "resnet18": Backbone(
        arch="resnet18",
        family="resnet",
        blocks="layer[1-4].*",
        exclude=("downsample",),
        classifier="fc",
        placements=_LAST_3_BLOCKS,
        early_strides=_RESNET_STRIDES,
    ),
    "resnet50": Backbone(
        arch="resnet50",
        family="resnet",
        blocks="layer[1-4].*",
        exclude=("downsample",),
        classifier="fc",
        placements=_LAST_3_BLOCKS,
        early_strides=_RESNET_STRIDES,
    ),
    "resnext50_32x4d": Backbone(
        arch="resnext50_32x4d",
        family="resnet",
        blocks="layer[1-4].*",
        exclude=("downsample",),
        classifier="fc",
        placements=_LAST_3_BLOCKS,  # [analogy] with ResNet-50
        early_strides=_RESNET_STRIDES,
    ),
    "efficientnet_b0": Backbone(
        arch="efficientnet_b0",
        family="efficientnet",
        blocks="blocks.*.*",
        exclude=("se",),
        classifier="classifier",
        placements=_LAST_3_STAGES,
        early_strides=_MOBILE_STRIDES,
    ),
    "efficientnet_b0_depth": Backbone(
        arch="efficientnet_b0",
        family="efficientnet",
        blocks="blocks.*.*",
        exclude=("se",),
        classifier="classifier",
        placements=_LAST_3_STAGES,
        depth=1.1,
        early_strides=_MOBILE_STRIDES,
    ),
}
