"""timm's CondConv networks, with random weights, in our layout and back; what does not fit is listed and not loaded."""

from __future__ import annotations

import pytest
import timm
import torch
from numerics import assert_close
from small_networks import SmallNet
from torch import nn

from condconv import CondConv2d, compress_experts, convert, list_backends
from condconv.checkpoints import count_experts, from_timm, has_experts, is_timm_condconv, load_complete, to_timm
from models import create_model

TF = {"pad_type": "same", "bn_eps": 1e-3}
PUBLISHED = [
    ("tf_efficientnet_cc_b0_4e", "efficientnet_b0", 4),
    ("tf_efficientnet_cc_b0_8e", "efficientnet_b0", 8),
    ("tf_efficientnet_cc_b1_8e", "efficientnet_b0_depth", 8),
]


def theirs(arch: str) -> nn.Module:
    """A network of timm with statistics and routers that differ everywhere, so that nothing matches by chance."""
    network = timm.create_model(arch, num_classes=11).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, 0, 0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    for name, parameter in network.named_parameters():
        if ".routing_fn." in name:
            nn.init.normal_(parameter, 0, 0.5)
    return network


def ours(name: str, experts: int, **options: object) -> nn.Module:
    return create_model(name, 11, experts, timm_options=TF, **options).eval()


@pytest.mark.parametrize(("arch", "name", "experts"), PUBLISHED)
@torch.no_grad()
def test_the_published_networks_both_ways(arch: str, name: str, experts: int) -> None:
    source, network = theirs(arch), ours(name, experts)
    state = source.state_dict()
    assert is_timm_condconv(state) and has_experts(state) and count_experts(state) == experts
    load_complete(network, from_timm(state, network))
    x = torch.randn(2, 3, 67, 64)  # odd: TensorFlow's padding is not symmetric
    expected = source(x)
    assert_close(network(x), expected, arch)
    assert (network(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    back = to_timm(network)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    timm.create_model(arch, num_classes=11).load_state_dict(back)
    assert count_experts(network.state_dict()) == experts and not is_timm_condconv(network.state_dict())


@torch.no_grad()
def test_every_backend_gives_timms_logits() -> None:
    source, network = theirs("tf_efficientnet_cc_b0_4e"), ours("efficientnet_b0", 4)
    load_complete(network, from_timm(source.state_dict(), network))
    x = torch.randn(3, 3, 64, 64)
    expected = source(x)
    layers = [m for m in network.modules() if isinstance(m, CondConv2d)]
    for backend in list_backends():
        if backend.startswith("triton"):
            continue  # interpreted here, far too slow; compared with the oracle in tests/condconv/ops
        batch = slice(1 if backend == "single" else None)  # that one convolves one example
        for layer in layers:  # gemm runs all but depthwise layers, the depthwise backends these alone
            refused = backend.startswith("gemm" if layer.groups > 1 else "depthwise")
            layer.backend = "auto" if refused else backend
        assert any(layer.backend == backend for layer in layers)
        assert (network(x[batch]) - expected[batch]).abs().max() < 1e-5 * expected[batch].abs().max(), backend


def test_what_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    network = ours("efficientnet_b0", 4)
    state = from_timm(theirs("tf_efficientnet_cc_b0_4e").state_dict(), network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    del state["conv_stem.weight"], state["blocks.4.0.router.fc.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["classifier.weight"] = torch.zeros(5, 1280)
    with pytest.raises(ValueError) as caught:
        load_complete(network, state, "weights.pth")
    message = str(caught.value)
    assert message.startswith("weights.pth does not fit the network, so nothing was loaded.")
    assert "2 missing: conv_stem.weight, blocks.4.0.router.fc.bias" in message
    assert "1 unknown: extra.weight" in message
    assert "1 of another shape: classifier.weight [5, 1280], in the network [11, 1280]" in message
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_another_number_of_experts_does_not_load() -> None:
    network = ours("efficientnet_b0", 4)
    with pytest.raises(
        ValueError, match=r"40 of another shape: blocks\.\S+ \[8, \d+\], in the network \[4, .* 32 more"
    ):
        load_complete(network, from_timm(theirs("tf_efficientnet_cc_b0_8e").state_dict(), network))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classifier": True}, "classifier is a linear layer with experts"),
        ({"routing": "softmax"}, "is a SoftmaxRouter"),
        ({"experts": 0}, "there is no CondConv layer in it"),
    ],
)
def test_networks_that_timm_cannot_have_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"has no counterpart in timm: .*{reason}"):
        to_timm(create_model("efficientnet_b0", 5, **{"experts": 2, **options}))


@pytest.mark.parametrize("routing", ["single", "partially_shared"])
def test_blocks_without_a_router_are_not_timms(routing: str) -> None:
    """Their `routing_fn` would be missing from the file."""
    network = SmallNet()
    convert(network, 2, blocks="blocks.*.*", exclude="se", routing=routing)
    with pytest.raises(ValueError, match=r"blocks\.0\.1 uses the routing weights of the block before it"):
        to_timm(network)


@pytest.mark.parametrize("expert_dtype", ["int8", "bf16"])
def test_compressed_networks_take_plain_weights_and_are_not_timms(expert_dtype: str) -> None:
    plain = nn.Sequential(CondConv2d(4, 6, 1, num_experts=2, router=None))
    network = compress_experts(nn.Sequential(CondConv2d(4, 6, 1, num_experts=2, router=None)), expert_dtype)
    load_complete(network, plain.state_dict())
    assert torch.equal(network[0].dequantized(), compress_experts(plain, expert_dtype)[0].dequantized())
    state = dict(network.state_dict())
    load_complete(network, state)
    if expert_dtype == "int8":
        with pytest.raises(ValueError, match=r"1 missing: 0\.scale"):
            load_complete(network, {name: value for name, value in state.items() if name != "0.scale"})
    with pytest.raises(ValueError, match="the experts of 0 are compressed"):
        to_timm(network)
