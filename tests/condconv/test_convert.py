"""Conversion: what is replaced, how experts start, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from numerics import assert_close
from small_networks import InvertedResidual, SmallNet
from torch import Tensor, nn

from condconv.convert import convert
from condconv.export import export_form
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import Router

EXPERTS = 3


def routing_of(router: nn.Module, x: Tensor) -> Tensor:
    """The paper's routing, written out: sigmoid(GlobalAveragePool(x) R + bias)."""
    pooled = x.mean((2, 3)) if x.ndim == 4 else x
    return torch.sigmoid(pooled @ router.fc.weight.T + router.fc.bias)


def mixed(weight: Tensor, routing: Tensor) -> Tensor:
    """The kernel of one example, from its routing weights [E]."""
    return torch.einsum("e...,e->...", weight, routing)


def test_a_converted_block_computes_the_papers_equation() -> None:
    net = nn.Sequential(InvertedResidual(4, 5, stride=2)).double()
    convert(net, EXPERTS, blocks="0", exclude="se")
    block = net[0]
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    expected = []
    for image, routing in zip(x.split(1), routing_of(block.router, x), strict=True):
        y = nn.functional.conv2d(image, mixed(block.conv_pw.weight, routing)).relu()
        y = nn.functional.conv2d(y, mixed(block.conv_dw.weight, routing), stride=2, padding=1, groups=8).relu()
        y = nn.functional.conv2d(
            block.se(y), mixed(block.conv_pwl.weight, routing), mixed(block.conv_pwl.bias, routing)
        )
        expected.append(y)
    assert_close(net(x), torch.cat(expected), "block")


def test_keys_report_and_what_stays_static() -> None:
    net = SmallNet()
    report = convert(net, EXPERTS, blocks="blocks.1.*", exclude="se", classifier="classifier")
    keys = net.state_dict()
    assert keys["blocks.1.0.conv_pw.weight"].shape == (EXPERTS, 14, 7, 1, 1)
    assert keys["blocks.1.0.conv_dw.weight"].shape == (EXPERTS, 14, 1, 3, 3)
    assert keys["blocks.1.1.conv_pwl.bias"].shape == (EXPERTS, 9)
    assert keys["blocks.1.0.router.fc.weight"].shape == (EXPERTS, 7)
    assert keys["classifier.weight"].shape == (EXPERTS, 5, 11)
    assert keys["classifier.router.fc.weight"].shape == (EXPERTS, 11)
    assert keys["blocks.0.0.conv_pw.weight"].ndim == keys["blocks.1.0.se.reduce.weight"].ndim == 4
    assert report.layers == (
        *(f"blocks.1.{block}.{layer}" for block in (0, 1) for layer in ("conv_pw", "conv_dw", "conv_pwl")),
        "classifier",
    )
    assert report.routers == ("blocks.1.0.router", "blocks.1.1.router", "classifier.router")
    assert "blocks.1.1: router on 9 channels: conv_pw, conv_dw, conv_pwl" in str(report)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("depthwise", {"conv_dw"}),
        ("pointwise", {"conv_pw", "conv_pwl"}),
        (("depthwise", "conv_pwl"), {"conv_dw", "conv_pwl"}),
        ("conv_p*", {"conv_pw", "conv_pwl"}),
        ("all", {"conv_pw", "conv_dw", "conv_pwl", "se.reduce", "se.expand"}),
    ],
)
def test_layers_by_kind_and_by_pattern(layers: str, expected: set[str]) -> None:
    net = SmallNet()
    exclude = () if layers == "all" else "se"
    report = convert(net, 2, blocks="blocks.1.1", layers=layers, exclude=exclude)
    assert {name.removeprefix("blocks.1.1.") for name in report.layers} == expected


def test_a_grouped_convolution_is_a_kind_of_its_own() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3)))
    assert convert(net, 2, blocks="0", layers="grouped").layers == ("0.0",)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3)))
    assert convert(net, 2, blocks="0", layers="dense").layers == ("0.1",)


def test_a_lone_layer_pools_its_own_input() -> None:
    net = SmallNet().double()
    convert(net, EXPERTS, blocks=("conv_head",), classifier="classifier")
    x = torch.randn(2, 9, 3, 3, dtype=torch.float64)
    routing = routing_of(net.conv_head.router, x)
    head = torch.stack(
        [mixed(net.conv_head.weight[..., 0, 0], r) @ i.flatten(1) for r, i in zip(routing, x, strict=True)]
    )
    bias = routing @ net.conv_head.bias
    assert_close(net.conv_head(x), (head + bias[:, :, None]).unflatten(2, (3, 3)), "1x1 head")
    features = torch.randn(2, 11, dtype=torch.float64)
    routing = routing_of(net.classifier.router, features)
    logits = torch.einsum("nc,ekc,ne->nk", features, net.classifier.weight, routing) + routing @ net.classifier.bias
    assert_close(net.classifier(features), logits, "classifier")


INITS = {
    "pytorch": None,
    "normal": lambda layer: nn.init.normal_(layer.weight, 0.0, 0.02),
    "he": lambda layer: nn.init.kaiming_normal_(layer.weight, mode="fan_out"),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["pointwise", "depthwise", "dense", "linear"])
def test_every_expert_has_the_statistics_of_the_static_layer(init: str, kind: str) -> None:
    static = {
        "pointwise": nn.Conv2d(40, 60, 1),
        "depthwise": nn.Conv2d(300, 300, 3, groups=300),
        "dense": nn.Conv2d(16, 24, 3),
        "linear": nn.Linear(50, 60),
    }[kind]
    if INITS[init]:
        INITS[init](static)
    net = nn.Sequential(copy.deepcopy(static))
    convert(net, 4, blocks="0")
    weight = net[0].weight.detach()
    assert torch.equal(weight[0], static.weight) and torch.equal(net[0].bias[0], static.bias)
    expected = static.weight.std().item()
    sampling = 6 / math.sqrt(2 * static.weight.numel())  # six standard errors of an estimated standard deviation
    for expert in weight:
        assert expert.std().item() == pytest.approx(expected, rel=sampling)
        assert abs(expert.mean().item()) < 6 * expected / math.sqrt(expert.numel())
        if init == "pytorch":  # uniform, which nothing may exceed
            assert expert.abs().max() <= 1.1 * static.weight.abs().max()
    flat = weight.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(4)
    assert correlation.abs().max() < 6 / math.sqrt(flat.shape[1]), "experts are not independent draws"


def test_constant_tensors_stay_constant_and_seeds_repeat() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        net = SmallNet()
        nn.init.zeros_(net.classifier.bias)
        convert(net, EXPERTS, blocks="blocks.*.*", exclude="se", classifier="classifier")
        return net

    first, second = build(), build()
    assert torch.equal(first.classifier.bias, torch.zeros(EXPERTS, 5))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_experts_by_the_networks_own_function_see_one_kernel_and_its_name() -> None:
    calls = []

    def initialize(layer: nn.Module, name: str) -> None:
        calls.append((name, type(layer), layer.weight.shape))
        nn.init.constant_(layer.weight, len(calls))

    net = nn.Sequential(nn.Conv2d(2, 3, 1))
    before = net[0].weight.detach().clone()
    convert(net, 3, blocks="0", init=initialize)
    assert calls == [("0", nn.Conv2d, (3, 2, 1, 1))] * 2
    assert torch.equal(net[0].weight[0], before)
    assert [expert.unique().tolist() for expert in net[0].weight[1:]] == [[1.0], [2.0]]


def test_one_expert_is_the_static_layer_times_its_routing_weight() -> None:
    net = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1)).double()
    static = copy.deepcopy(net[0])
    convert(net, 1, blocks="0")
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_close(net(x), static(x) * routing_of(net[0].router, x)[:, :, None, None], "one expert")


def test_geometry_dtype_mode_and_frozen_parameters_are_kept() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (2, 1), 2, False, "reflect", dtype=torch.float64)
    conv.weight.requires_grad_(False)
    net = nn.Sequential(conv).eval()
    convert(net, 2, blocks="0", backend="reference")
    layer = net[0]
    assert isinstance(layer, CondConv2d) and not layer.training and not layer.router.training
    assert layer.weight.dtype == torch.float64 and not layer.weight.requires_grad and layer.bias is None
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert layer(x).shape == conv(x).shape
    with torch.no_grad():
        layer.weight[1] = layer.weight[0]
    scale = layer.router(x).sum(1)[:, None, None, None]
    assert_close(layer(x), conv(x) * scale, "reflect padding, strides and dilations")


def test_timms_tensorflow_padding_is_understood() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    conv = timm_layers.Conv2dSame(3, 4, 3, stride=2, bias=False)
    net = nn.Sequential(copy.deepcopy(conv))
    convert(net, 1, blocks="0")
    for size in (7, 8):
        x = torch.randn(2, 3, size, size)
        assert_close(net(x), conv(x) * net[0].router(x)[:, :, None, None], f"size {size}")


def test_a_network_on_the_meta_device_converts() -> None:
    with torch.device("meta"):
        net = SmallNet()
    convert(net, EXPERTS, blocks="blocks.*.*", exclude="se", classifier="classifier")
    assert {p.device.type for p in net.parameters()} == {"meta"}


class Preactivated(nn.Module):
    """A block whose first registered layer does not see the block's input, and blocks registered in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Conv2d(8, 2, 1))
        self.first = _Reordered()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(6, 8, 1)
        self.expand = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.expand(x))


def test_an_example_input_tells_channels_and_order() -> None:
    net = Preactivated()
    convert(net, 2, blocks=("first", "second"))
    with pytest.raises(ValueError, match=r"built for 6 channels, but the block's input has 3.*example_input"):
        net(torch.randn(2, 3, 4, 4))
    net = Preactivated().train()
    report = convert(net, 2, blocks=("first", "second"), routing="hierarchical", example_input=torch.randn(1, 3, 4, 4))
    assert [(unit.name, unit.in_channels) for unit in report.units] == [("first", 3), ("second", 8)]
    assert net.training
    assert net(torch.randn(2, 3, 4, 4)).shape == (2, 2, 4, 4)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 7, 5, 6)], ids=["vectors", "tokens", "NHWC"])
@pytest.mark.parametrize("routing", ["fc", "hierarchical", "single"])
def test_linear_layers_have_their_channels_last(routing: str, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    x = torch.randn(shape, dtype=torch.float64)
    report = convert(net, EXPERTS, blocks=("0", "1"), routing=routing, router_gain=1.0, example_input=x)
    assert [unit.in_channels for unit in report.units] == [6, 8]
    hidden, previous = x, None
    for layer in net:
        if layer.router is not None:
            pooled = hidden.reshape(4, -1, hidden.shape[-1]).mean(1)
            own = pooled if previous is None or routing == "fc" else torch.cat([pooled, previous], 1)
            previous = torch.sigmoid(own @ layer.router.fc.weight.T + layer.router.fc.bias)
        outputs = [
            nn.functional.linear(e, mixed(layer.weight, r), r @ layer.bias)
            for e, r in zip(hidden, previous, strict=True)
        ]
        hidden = torch.stack(outputs)
    assert_close(net(x), hidden, routing)
    assert_close(export_form(net)(x), hidden, "export form")


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_blocks_with_channels_last_are_refused() -> None:
    """Swin's and others' [N, H, W, C]: pooled over the wrong axes, rows of the image would choose the experts."""
    x, refusal = torch.randn(2, 7, 5, 6), r"0: .*\(2, 7, 5, 6\) has the 6 channels of its first layer last.*one by one"
    with pytest.raises(ValueError, match=refusal):
        convert(nn.Sequential(ChannelsLast()), 2, blocks="0", example_input=x)
    net = nn.Sequential(ChannelsLast())
    convert(net, 2, blocks="0")
    with pytest.raises(ValueError, match=refusal):
        net(x)
    net = nn.Sequential(ChannelsLast())
    convert(net, 2, blocks="0.mlp", example_input=x)
    assert net(x).shape == x.shape


def test_converting_twice_is_an_error() -> None:
    net = SmallNet()
    convert(net, 2, blocks="blocks.1.*", exclude="se", classifier="classifier")
    with pytest.raises(ValueError, match=r"blocks\.1\.0 is a CondConv module already"):
        convert(net, 2, blocks="blocks.*.*", exclude="se")
    with pytest.raises(ValueError, match="classifier is a CondConv module already"):
        convert(net, 2, classifier="classifier")
    assert convert(net, 2, blocks="blocks.0.*", exclude="se").layers, "other blocks can follow later"


BAD_ARGUMENTS = {
    "zero experts": ({"num_experts": 0, "blocks": "blocks.1.*"}, "num_experts must be an int of at least 1, got 0"),
    "bool": ({"num_experts": True, "blocks": "blocks.1.*"}, "got True"),
    "fraction": ({"num_experts": 2.5, "blocks": "blocks.1.*"}, "got 2.5"),
    "nothing": ({}, "nothing to convert"),
    "typo": ({"blocks": "block.1.*"}, r"no module matches the block pattern 'block.1.\*' \(near names: blocks\.1"),
    "one of two": ({"blocks": ("blocks.1.*", "stages.*")}, r"block pattern 'stages.\*'"),
    "layer typo": ({"blocks": "blocks.1.*", "layers": "depthwize"}, r"'depthwize' \(near names: depthwise"),
    "no such kind": (
        {"blocks": "blocks.1.*", "layers": "grouped"},
        "holds a layer that fits 'grouped'; the kinds in them",
    ),
    "exclude typo": ({"blocks": "blocks.1.*", "exclude": "sse"}, "no module matches the layer pattern 'sse'"),
    "nested": ({"blocks": ("blocks.1", "blocks.1.*")}, "both blocks.1 and blocks.1.0 inside it"),
    "classifier typo": ({"classifier": "classifer"}, r"no module 'classifer'.*near names: classifier"),
    "classifier kind": ({"classifier": "blocks"}, "the classifier blocks is a Sequential"),
    "classifier twice": ({"blocks": "classifier", "classifier": "classifier"}, "part of the blocks already"),
    "routing": ({"blocks": "blocks.1.*", "routing": "softmx"}, "softmx.*Did you mean 'softmax'"),
    "temperature": (
        {"blocks": "blocks.1.*", "routing": "single", "temperature": 2.0},
        "option of routing 'softmax', not of 'single'",
    ),
    "init": ({"blocks": "blocks.1.*", "init": "xavier"}, "unknown init 'xavier'"),
    "backend": ({"blocks": "blocks.1.*", "backend": "cudnn"}, "cudnn"),
}


def zeros(layer: nn.Module, name: str) -> None:
    nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("init", ["independent", zeros], ids=["independent", "function"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named_and_change_nothing(case: str, init: str | Callable[[nn.Module, str], None]) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    net = SmallNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(net, **{"num_experts": 2, "init": init, **arguments})
    after = net.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(m, CondConv2d | CondLinear | Router) for m in net.modules())


def quantized(conv: nn.Conv2d) -> nn.Module:
    class QuantizedConv2d(nn.Conv2d):
        pass

    return QuantizedConv2d(conv.in_channels, conv.out_channels, 1)


def standardized(conv: nn.Conv2d) -> nn.Module:
    return pytest.importorskip("timm.layers").StdConv2d(conv.in_channels, conv.out_channels, 1)


def timm_condconv(conv: nn.Conv2d) -> nn.Module:
    return pytest.importorskip("timm.layers").CondConv2d(conv.in_channels, conv.out_channels, 1)


UNSUPPORTED: dict[str, tuple[Callable[[nn.Conv2d], nn.Module], str]] = {
    "quantised": (quantized, "QuantizedConv2d.*subclass"),
    "standardised": (standardized, "StdConv2d.*subclass"),
    "conditional": (timm_condconv, "conditional convolution of another library"),
    "weight norm": (nn.utils.parametrizations.weight_norm, "Parametrized"),
    "spectral norm by hook": (nn.utils.spectral_norm, "has hooks"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_layers_that_compute_something_else_are_refused(case: str) -> None:
    change, message = UNSUPPORTED[case]
    net = SmallNet()
    net.blocks[1][0].conv_pw = change(net.blocks[1][0].conv_pw)
    with pytest.raises(ValueError, match=message) as error:
        convert(net, 2, blocks="blocks.1.*", exclude="se")
    assert "blocks.1.0.conv_pw" in str(error.value)


def test_shared_layers_and_shared_parameters_are_refused() -> None:
    net = SmallNet()
    net.blocks[0][0].conv_pwl = net.blocks[0][1].conv_pwl
    with pytest.raises(ValueError, match="used under several names"):
        convert(net, 2, blocks="blocks.0.*", exclude="se")
    net = SmallNet()
    net.blocks[0][1].conv_pwl.bias = net.blocks[0][0].conv_pwl.bias
    with pytest.raises(ValueError, match="shares its parameters"):
        convert(net, 2, blocks="blocks.0.*", exclude="se")


def test_a_block_with_a_router_of_its_own_is_refused() -> None:
    net = SmallNet()
    net.blocks[0][0].router = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.0\.0 already has an attribute 'router'"):
        convert(net, 2, blocks="blocks.0.*", exclude="se")


def test_a_block_that_is_not_given_a_feature_map_says_so() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    convert(net, 2, blocks="0")
    assert net(torch.randn(3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"0: routing pools the block's first input.*shape \(2, 5, 4\)"):
        net(torch.randn(2, 5, 4))
