"""Backbones by name: they train and evaluate, options do what they say, mistakes are named."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import timm
import torch
from numerics import assert_close
from torch import Tensor, nn

from condconv.layers import CondConv2d, CondLinear
from condconv.routing import ROUTINGS, Router
from models import create_model, list_backbones, list_placements
from models.placements import BACKBONES

TIMM_NAMES = {
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mnasnet_a1": "semnasnet_100",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnext50_32x4d": "resnext50_32x4d",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b0_depth": "efficientnet_b1",  # the same network: B1 is B0 with depth 1.1 and larger images
}


def cond_layers(net: nn.Module) -> dict[str, CondConv2d | CondLinear]:
    return {name: m for name, m in net.named_modules() if isinstance(m, CondConv2d | CondLinear)}


def train_step(net: nn.Module, x: Tensor, num_classes: int) -> None:
    """One step of plain SGD; every parameter gets a gradient and every finite one stays finite."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net.train()
    loss = nn.functional.cross_entropy(net(x), torch.arange(len(x)) % num_classes)
    loss.backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    infinite = [name for name, p in net.named_parameters() if not p.grad.isfinite().all()]
    assert not infinite, f"infinite gradient: {infinite}"
    # Three examples on 1x1 maps behind untrained BatchNorm: gradients are finite, and far too large for a plain step.
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("experts", [0, 1, 8])
@pytest.mark.parametrize("name", list_backbones())
def test_trains_a_step_and_evaluates_at_32_pixels(name: str, experts: int) -> None:
    options = {} if BACKBONES[name].family == "efficientnet" else {"timm_options": {"zero_init_last": False}}
    # Most networks at half width: their full size is counted elsewhere, and costs seconds here.
    width = 1.0 if name in ("mobilenet_v1", "efficientnet_b0") else 0.5
    net = create_model(name, num_classes=10, experts=experts, width=width, **options)
    train_step(net, torch.randn(3, 3, 32, 32), 10)
    zero = [n for n, p in net.named_parameters() if p.grad.abs().max() == 0 and "bn" not in n]
    assert not zero, f"gradient zero everywhere: {zero}"
    net.eval().double()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        logits = net(x)
        assert logits.shape == (2, 10) and logits.isfinite().all()
        assert_close(net(x[:1]), logits[:1], "one example alone")
    assert bool(cond_layers(net)) == bool(experts)
    assert all(layer.num_experts == experts for layer in cond_layers(net).values())


@pytest.mark.parametrize(("name", "experts"), [("mobilenet_v1", 8), ("efficientnet_b0", 0)])
def test_trains_a_step_at_224_pixels(name: str, experts: int) -> None:
    width = 0.25 if name == "mobilenet_v1" else 1.0
    net = create_model(name, num_classes=5, experts=experts, width=width)
    train_step(net, torch.randn(2, 3, 224, 224), 5)


@pytest.mark.parametrize("name", list_backbones())
def test_without_experts_it_is_timms_network_bit_for_bit(name: str) -> None:
    torch.manual_seed(5)
    ours = create_model(name, num_classes=7, experts=0)
    torch.manual_seed(5)
    theirs = timm.create_model(TIMM_NAMES[name], num_classes=7)
    assert type(ours) is type(theirs) and not hasattr(ours, "conversion")
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["mobilenet_v1", "efficientnet_b0", "resnet18"])
def test_experts_start_like_the_static_twin(name: str) -> None:
    torch.manual_seed(5)
    static = create_model(name, experts=0).state_dict()
    torch.manual_seed(5)
    net = create_model(name, experts=3)
    for layer_name, layer in cond_layers(net).items():
        twin, experts = static[f"{layer_name}.weight"], layer.weight.detach()
        assert torch.equal(experts[0], twin), "the first expert is the twin's layer"
        for expert in experts[1:]:
            assert not torch.equal(expert, twin)
            deviation = 6 * float(twin.std()) / (2 * twin.numel()) ** 0.5
            assert float(expert.std()) == pytest.approx(float(twin.std()), abs=deviation), layer_name
            uniform = isinstance(layer, CondLinear)
            assert (float(expert.abs().max() / expert.std()) < 1.8) == uniform, f"{layer_name}: another distribution"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_function_on_a_backbone(routing: str) -> None:
    net = create_model("mobilenet_v1", num_classes=4, experts=3, width=0.25, routing=routing)
    train_step(net, torch.randn(3, 3, 32, 32), 4)
    routers = sum(isinstance(m, Router) for m in net.modules())
    assert routers == {"single": 1, "partially_shared": 5}.get(routing, 9)
    assert pickle.loads(pickle.dumps(net)).conversion == net.conversion


def units(**options: object) -> list[str]:
    with torch.device("meta"):
        net = create_model(**{"name": "mobilenet_v1", "experts": 2, **options})
    return [unit.name for unit in net.conversion.units]


def test_placement_overrides() -> None:
    assert units(from_block=13) == ["blocks.4.1", "classifier"]
    assert units(from_block=13, classifier=False) == ["blocks.4.1"]
    assert units(last_blocks=2) == ["blocks.4.0", "blocks.4.1", "classifier"]
    assert units(last_blocks=0) == units(placement="classifier") == ["classifier"]
    assert len(units(from_block=1)) == len(units(placement="all")) == 14
    assert units(name="efficientnet_b0", last_blocks=1, classifier=True) == ["blocks.6.0", "classifier"]
    assert units(name="mobilenet_v2", placement="paper_cost")[-2:] == ["conv_head", "classifier"]
    assert units(name="resnet18", from_block=8) == ["layer4.1", "fc"]
    assert len(units(name="efficientnet_b0", placement="blocks")) == 16
    assert list_placements("mobilenet_v2")[:2] == ("final6", "paper_cost")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("depthwise", {"conv_dw"}),
        ("pointwise", {"conv_pw"}),
        (["depthwise", "pointwise"], {"conv_dw", "conv_pw"}),
        ("conv_p*", {"conv_pw"}),
    ],
)
def test_layer_types(layers: str | list[str], expected: set[str]) -> None:
    with torch.device("meta"):
        net = create_model("mobilenet_v1", experts=2, layers=layers, classifier=False)
    assert {name.rpartition(".")[2] for name in cond_layers(net)} == expected
    with torch.device("meta"):
        net = create_model("mobilenet_v1", experts=2, layers=layers)
    assert "classifier" in cond_layers(net), "the classifier has its own option"


def test_options_reach_layers_and_network() -> None:
    net = create_model(
        "efficientnet_b0",
        experts=2,
        backend="mixture",
        dropout=0.1,
        expert_dropout=0.2,
        in_chans=1,
        drop_rate=0.3,
        drop_path_rate=0.2,
        num_classes=3,
        timm_options={"bn_eps": 1e-3, "pad_type": "same"},
    )
    assert all(layer.backend == "mixture" for layer in cond_layers(net).values())
    assert all((r.dropout, r.expert_dropout) == (0.1, 0.2) for r in net.modules() if isinstance(r, Router))
    assert net.conv_stem.in_channels == 1 and net.drop_rate == 0.3
    assert net.blocks[6][0].drop_path.drop_prob > 0.1
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    strided = net.blocks[5][0].conv_dw
    assert isinstance(strided, CondConv2d) and strided.padding == "same_tf"
    assert net(torch.randn(2, 1, 33, 33)).shape == (2, 3)


def test_without_classes_it_gives_features() -> None:
    net = create_model("mobilenet_v1", num_classes=0, experts=2, width=0.25)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 256)


@pytest.mark.parametrize(("width", "channels"), [(0.25, 256), (0.5, 512), (1.4, 1432)])
def test_width_multiplies_channels(width: float, channels: int) -> None:
    with torch.device("meta"):
        assert create_model("mobilenet_v1", experts=0, width=width).num_features == channels
        assert create_model("resnet18", experts=0, width=0.5).num_features == 256
        assert len(create_model("resnet18", experts=0, depth=1.5).layer4) == 3


def strides(net: nn.Module) -> Iterator[int]:
    shapes = {}
    handles = [m.register_forward_hook(lambda m, _, y: shapes.__setitem__(m, y.shape)) for m in net.modules()]
    with torch.no_grad():
        net.eval()(torch.randn(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    yield from (32 // shape[-1] for shape in shapes.values() if len(shape) == 4 and shape[-1] > 1)


@pytest.mark.parametrize("name", [n for n in list_backbones() if n not in ("resnet50", "efficientnet_b0_depth")])
def test_small_input_keeps_parameters_and_reduces_8_fold(name: str) -> None:
    torch.manual_seed(0)
    plain = create_model(name, num_classes=2, experts=0)
    torch.manual_seed(0)
    small = create_model(name, num_classes=2, experts=0, small_input=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), small.state_dict().values(), strict=True))
    assert max(strides(small)) == 8
    assert small(torch.randn(1, 3, 32, 32)).shape == (1, 2)


def test_any_network_of_timm_by_pattern() -> None:
    net = create_model(
        "timm", num_classes=4, experts=2, arch="regnetx_002", pattern="s4.*", exclude="downsample", classifier=True
    )
    assert net.conversion.units[-1].name == "head.fc"
    assert any(layer.groups > 1 for layer in cond_layers(net).values() if isinstance(layer, CondConv2d))
    train_step(net, torch.randn(2, 3, 64, 64), 4)
    with torch.device("meta"):
        net = create_model(
            "timm", experts=2, arch="mobilenetv3_small_050", pattern="blocks.*.*", exclude="se", last_blocks=2
        )
    assert [unit.name for unit in net.conversion.units] == ["blocks.4.2", "blocks.5.0"]
    assert type(create_model("timm", experts=0, arch="resnet10t")) is timm.models.ResNet


MISTAKES = {
    "unknown": ({"name": "mobilenetv1"}, r"unknown model 'mobilenetv1' \(did you mean 'mobilenet_v1'\?\)\. Choose"),
    "like none": ({"name": "xyz"}, r"unknown model 'xyz'\. Choose one of mobilenet_v1, "),
    "negative": ({"experts": -1}, "experts must be an int of at least 0.*got -1"),
    "fraction": ({"experts": 2.5}, "got 2.5"),
    "bool": ({"experts": True}, "got True"),
    "text": ({"experts": "8"}, "got '8'"),
    "classes": ({"num_classes": -3}, "num_classes must be an int of at least 0"),
    "channels": ({"in_chans": 0}, "in_chans must be an int of at least 1"),
    "width": ({"width": 0}, "width must be a positive number"),
    "depth": ({"name": "mnasnet_a1", "depth": 1.2}, "mnasnet_a1 has no depth multiplier"),
    "routing": ({"routing": "softmaxx"}, "Did you mean 'softmax'"),
    "routing of the twin": ({"routing": "softmaxx", "experts": 0}, "Did you mean 'softmax'"),
    "placement": ({"placement": "from5"}, r"no placement 'from5' \(did you mean 'from6'\?\)"),
    "placement of the twin": ({"placement": "from5", "experts": 0}, "no placement 'from5'"),
    "first block": ({"from_block": 0}, "from_block must be an int of at least 1"),
    "too late": ({"from_block": 14}, "has 13 blocks, so from_block=14 is not possible"),
    "too many": ({"last_blocks": 14}, "has 13 blocks, so last_blocks=14 is not possible"),
    "both": ({"last_blocks": 1, "from_block": 1}, "exclude each other"),
    "layers": ({"layers": "dense"}, "holds a layer that fits 'dense'; the kinds in them: depthwise, pointwise"),
    "layer typo": ({"layers": "depthwize"}, "depthwize"),
    "nothing": ({"last_blocks": 0, "classifier": False}, "nothing to convert"),
    "no classifier": ({"num_classes": 0, "classifier": True}, "classifier=True needs num_classes"),
    "backend": ({"backend": "cudnn"}, "cudnn"),
    "init": ({"init": "xavier"}, "unknown init 'xavier'"),
    "temperature": ({"temperature": 2.0}, "temperature"),
    "timm option": ({"timm_options": {"bn_epps": 1}}, "cannot be built with.*bn_epps"),
    "arch": ({"arch": "resnet18"}, "options of model timm"),
    "no arch": ({"name": "timm"}, "needs arch="),
    "arch typo": ({"name": "timm", "arch": "resnet81"}, r"no network 'resnet81' \(did you mean"),
    "pattern typo": ({"name": "timm", "arch": "resnet10t", "pattern": "layer5.*"}, "no module matches.*'layer5"),
    "no pattern": ({"name": "timm", "arch": "resnet10t"}, "nothing to convert"),
    "no single classifier": (
        {"name": "timm", "arch": "deit_tiny_distilled_patch16_224", "experts": 0, "classifier_std": 0.01},
        "has no single classifier layer to be drawn",
    ),
    "timm width": ({"name": "timm", "arch": "resnet10t", "width": 0.5}, "not available for model timm"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str) -> None:
    options, message = MISTAKES[case]
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model(**{"name": "mobilenet_v1", **options})


DRAWN = {
    "efficientnet_b0": {"name": "efficientnet_b0", "width": 0.5},
    "resnet18": {"name": "resnet18", "width": 0.5},
    "timm": {"name": "timm", "arch": "resnet10t", "pattern": "layer4.*"},
}


def seeded(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(**{"num_classes": 10, **options})


def with_drawn_classifier(net: nn.Module, std: float) -> nn.Module:
    """The static network, its classifier drawn by hand after all else."""
    with torch.no_grad():
        net.get_classifier().weight.normal_(0.0, std)
        net.get_classifier().bias.zero_()
    return net


@pytest.mark.parametrize("case", DRAWN)
def test_classifier_std_draws_the_static_classifier_and_nothing_else(case: str) -> None:
    found = seeded(**DRAWN[case], experts=0, classifier_std=0.05).state_dict()
    expected = with_drawn_classifier(seeded(**DRAWN[case], experts=0), 0.05).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    own = seeded(**DRAWN[case], experts=0).state_dict()
    changed = {key.split(".")[0] for key, value in own.items() if not torch.equal(value, found[key])}
    assert changed == {"classifier" if case == "efficientnet_b0" else "fc"}


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("case", DRAWN)
def test_a_drawn_classifier_begins_with_the_static_twins(case: str, experts: int, classifier: bool) -> None:
    static = seeded(**DRAWN[case], experts=0, classifier_std=0.05)
    net = seeded(**DRAWN[case], experts=experts, classifier=classifier, classifier_std=0.05)
    layers = cond_layers(net)
    for key, twin in static.named_parameters():
        found = net.get_parameter(key)
        assert torch.equal(found[0] if key.rpartition(".")[0] in layers else found, twin), key
    head = net.get_classifier()
    assert isinstance(head, CondLinear) == classifier
    if classifier:
        assert head.bias.shape == (experts, 10) and not head.bias.any()
        weight = head.weight.detach().flatten(1)
        assert all(0.045 < float(expert.std()) < 0.055 for expert in weight)
        alike = torch.corrcoef(weight).view(experts, experts) - torch.eye(experts)
        assert float(alike.abs().max()) < 0.1, "experts are drawn independently"


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 1, 8])
@pytest.mark.parametrize("name", list_backbones())
def test_trains_a_step_and_evaluates_at_224_pixels(name: str, experts: int) -> None:
    torch.manual_seed(0)
    network = create_model(name, 10, experts, classifier_std=0.01)
    images, labels = torch.randn(4, 3, 224, 224), torch.arange(4)
    nn.functional.cross_entropy(network(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    with torch.no_grad():
        logits = network.eval()(images)
    assert logits.shape == (4, 10) and logits.isfinite().all()
