"""Compressed experts: the arithmetic of their own values, state, hooks, and every refusal."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from numerics import assert_close
from small_networks import SmallNet
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization as parametrize
from torch.nn.utils.prune import l1_unstructured as prune

import condconv
from condconv import CondConv2d, CondLinear, complexity, compress_experts, convert
from condconv.collapse import collapse
from condconv.compress import CompressedLayer
from condconv.export import export_form
from condconv.ops import chunked, compressed
from condconv.ops.gemm import Gemm

BYTES = {"int8": 1, "bf16": 2}
CONVOLUTIONS = {
    "pointwise": {"kernel_size": 1},
    "pointwise strided": {"kernel_size": 1, "stride": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 12, "out_channels": 12},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "dense": {"kernel_size": 3, "padding": "same_tf", "stride": 2, "dilation": 1},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "depthwise sum": {"kernel_size": 3, "padding": 1, "groups": 3, "backend": "depthwise_sum"},
}
both = pytest.mark.parametrize("expert_dtype", ["bf16", "int8"])


def layer_of(case: str, experts: int = 3, **options: object) -> CondConv2d:
    arguments = {"in_channels": 12, "out_channels": 21, "router": None, **CONVOLUTIONS[case], **options}
    return CondConv2d(num_experts=experts, **arguments)


def pair(layer: nn.Module, expert_dtype: str) -> tuple[nn.Module, nn.Module]:
    """The compressed layer, and a plain one with the values that it stores."""
    small = compress_experts(copy.deepcopy(layer), expert_dtype)
    plain = copy.deepcopy(layer)
    plain.weight.data = small.dequantized().to(plain.weight.dtype)
    return small, plain


@both
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 3, 9])
@torch.no_grad()
def test_it_computes_what_its_stored_experts_say(expert_dtype: str, case: str, batch: int) -> None:
    torch.manual_seed(batch)
    small, plain = pair(layer_of(case), expert_dtype)
    routing = torch.randn(batch, 3)
    for size in ((7, 5), (2, 2)):  # on the small map taps of the kernel are dead
        x = torch.randn(batch, 12, *size)
        for images in (x, x.to(memory_format=torch.channels_last)):
            y, expected = small(images, routing), plain(images, routing)
            assert_close(y, expected, f"{case} {size}")
            assert y.stride() == expected.stride()


@both
@pytest.mark.parametrize("batch", [1, 9, 0])
@torch.no_grad()
def test_linear_layers_and_the_mixture_form(expert_dtype: str, batch: int) -> None:
    small, plain = pair(CondLinear(11, 13, num_experts=3, router=None), expert_dtype)
    routing = torch.rand(batch, 3)
    for shape in ((11,), (4, 11)):
        x = torch.randn(batch, *shape)
        assert_close(small(x, routing), plain(x, routing), str(shape))


@both
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_one_expert(expert_dtype: str, batch: int) -> None:
    for layer, x in (
        (layer_of("dense", experts=1), torch.randn(batch, 12, 7, 5)),
        (CondLinear(3, 1, num_experts=1, router=None), torch.randn(batch, 3)),  # one row, of no multiple of 4 bytes
    ):
        small, plain = pair(layer, expert_dtype)
        routing = torch.rand(batch, 1)
        assert_close(small(x, routing), plain(x, routing), type(layer).__name__)
        twin, _ = pair(layer, expert_dtype)
        twin.load_state_dict(small.state_dict())
        assert_close(twin(x, routing), small(x, routing), "state dict")


@torch.no_grad()
def test_what_plain_layers_check_is_checked() -> None:
    small, _ = pair(layer_of("dense"), "int8")
    x, routing = torch.randn(2, 12, 7, 5), torch.rand(2, 3)
    for backend in ("reference", "mixture", "triton_dense"):  # changed after compression
        small.backend = backend
        with pytest.raises(ValueError, match=f"{backend}' cannot read compressed experts"):
            small(x, routing)
    small.backend = "auto"
    routing[1, 0] = torch.nan
    condconv.set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"examples \[1\] are not finite"):
            small(x, routing)
    finally:
        condconv.set_debug(False)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_activations_of_other_dtypes(expert_dtype: str, dtype: torch.dtype) -> None:
    layer = layer_of("dense")
    small, plain = pair(layer, expert_dtype)
    kept = small.experts.dtype
    x, routing = torch.randn(2, 12, 5, 5), torch.rand(2, 3)
    small.to(dtype).to(memory_format=torch.channels_last)
    assert small.experts.dtype == kept and torch.equal(small.dequantized(), plain.weight)
    # dequantized() rounds to float32 what is mixed in float64 as it is
    tolerance = torch.float32 if dtype == torch.float64 else dtype
    assert_close(small(x.to(dtype), routing), plain.double()(x.double(), routing), "converted", tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert small.float()(x, routing).dtype == torch.bfloat16


@both
@torch.no_grad()
def test_experts_are_never_decoded_all_at_once(expert_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CondConv2d(64, 96, 1, bias=False, num_experts=8, router=None, workspace_bytes=32 << 10)
    small, plain = pair(layer, expert_dtype)
    decoded: list[int] = []
    real = compressed.decode

    def watched(experts_EKB: Tensor, dtype: torch.dtype) -> Tensor:
        value = real(experts_EKB, dtype)
        decoded.append(value.numel() * value.element_size())
        return value

    monkeypatch.setattr(compressed, "decode", watched)
    x = torch.randn(6, 64, 5, 5)
    routing = torch.rand(6, 8)
    assert_close(small(x, routing), plain(x, routing), "y")
    assert sum(decoded) >= plain.weight.numel() * 4 and max(decoded) <= 32 << 10
    decoded.clear()
    small(x[:1], routing[:1])
    assert len(decoded) == (0 if expert_dtype == "int8" else 6)


@both
@torch.no_grad()
def test_the_algorithm_for_one_example_may_be_asked_for(expert_dtype: str) -> None:
    small, plain = pair(layer_of("dense", backend="single"), expert_dtype)
    x, routing = torch.randn(2, 12, 7, 5), torch.rand(2, 3)
    assert_close(small(x[:1], routing[:1]), plain(x[:1], routing[:1]), "y")
    with pytest.raises(ValueError, match="'single' cannot run this layer: it convolves one example"):
        small(x, routing)


@both
@torch.no_grad()
def test_patches_of_a_tile_stay_small(expert_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small, plain = pair(layer_of("dense", backend="gemm"), expert_dtype)
    x, routing = torch.randn(7, 12, 6, 6), torch.rand(7, 3)
    monkeypatch.setattr(chunked, "PATCHES_BYTES", 2 * 12 * 9 * 9 * 4)  # of two examples, with 3 x 3 outputs
    taken: list[int] = []
    unfold = Gemm.patches_BLD.func

    def watched(self: Gemm) -> Tensor:
        patches_BLD = unfold(self)
        taken.append(patches_BLD.numel() * patches_BLD.element_size())
        return patches_BLD

    monkeypatch.setattr(Gemm, "patches_BLD", property(watched))
    y = small(x, routing)
    assert len(taken) == 4 and max(taken) <= chunked.PATCHES_BYTES
    monkeypatch.undo()
    assert_close(y, plain(x, routing), "y")


def test_rounding_is_symmetric_with_a_scale_per_expert_and_channel() -> None:
    weight = torch.tensor([[[1.0, -2.0, 0.49 * 2 / 127], [0.0, 0.0, 0.0]], [[254.0, -126.9, 1.0], [-1e-30, 0.0, 0.0]]])
    layer = CondLinear(3, 2, bias=False, num_experts=2, router=None)
    layer.weight.data = weight
    compress_experts(layer, "int8")
    assert layer.weight.dtype == torch.int8 and layer.scale is not None
    assert layer.weight.tolist() == [[[64, -127, 0], [0, 0, 0]], [[127, -63, 0], [-127, 0, 0]]]
    torch.testing.assert_close(layer.scale, weight.abs().amax(2) / 127)
    assert layer.dequantized()[0, 1].tolist() == [0.0, 0.0, 0.0]


@both
def test_rounding_errors_are_at_most_half_a_step(expert_dtype: str) -> None:
    layer = layer_of("dense")
    before = layer.weight.detach().clone()
    compress_experts(layer, expert_dtype)
    error = (layer.dequantized() - before).abs().flatten(2)
    step = before.abs().flatten(2) / 128 if layer.scale is None else layer.scale[..., None]
    assert (error <= 0.5001 * step).all() and error.max() > 0
    assert layer.weight.shape == before.shape and layer.weight.element_size() == BYTES[expert_dtype]


@both
@torch.no_grad()
def test_networks_keep_hooks_copies_and_state(expert_dtype: str) -> None:
    torch.manual_seed(0)
    network = SmallNet().eval()
    convert(network, 3, blocks="blocks.*.*", classifier="classifier")
    x = torch.randn(2, 3, 16, 16)
    before, counted, original = network(x), complexity(network, 16), copy.deepcopy(network.state_dict())
    plain = copy.deepcopy(network)
    assert compress_experts(network, expert_dtype) is network
    y = network(x)
    assert_close(y, before, "against float32", torch.bfloat16)
    assert not torch.equal(y, before)
    assert (complexity(network, 16).params, complexity(network, 16).madds) == (counted.params, counted.madds)

    names = {name for name, module in network.named_modules() if isinstance(module, CompressedLayer)}
    assert len(names) == 21 and "blocks.0.0.conv_dw" in names
    copied = copy.deepcopy(network)
    network.blocks[0][0].conv_pw.experts.zero_()
    assert torch.equal(copied(x), y)

    file = io.BytesIO()
    torch.save(copied.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["blocks.0.0.conv_pw.weight"].dtype == {"int8": torch.int8, "bf16": torch.bfloat16}[expert_dtype]
    assert ("blocks.0.0.conv_pw.scale" in state) == (expert_dtype == "int8")
    network.load_state_dict(state)
    assert torch.equal(network(x), y)
    network.blocks[0][0].conv_pw.experts.zero_()
    network.load_state_dict(original)  # uncompressed weights are compressed as they come
    assert torch.equal(network(x), y)
    if expert_dtype == "int8":
        with pytest.raises(RuntimeError, match=r"conv_pw\.scale"):
            plain.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Missing key.*conv_pw\.scale"):
            network.load_state_dict({k: v for k, v in state.items() if k != "blocks.0.0.conv_pw.scale"})
    with pytest.raises(RuntimeError, match=r"conv_pw\.weight is \(1,\)"):
        network.load_state_dict({**state, "blocks.0.0.conv_pw.weight": torch.ones(1)})


@both
def test_compiled_in_one_graph(expert_dtype: str) -> None:
    small, _ = pair(layer_of("pointwise"), expert_dtype)
    x, routing = torch.randn(2, 12, 3, 3), torch.rand(2, 3)
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x, routing), small(x, routing), "compiled")


def test_gradients_are_refused() -> None:
    layer = compress_experts(CondConv2d(4, 6, 1, num_experts=2), "int8")
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"no gradients: call the network under torch\.no_grad"):
        layer(x)  # the router is trainable
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    with pytest.raises(RuntimeError, match="no gradients"):
        layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="no gradients"):  # the operator's would be zero
        torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="before compress_experts"):
        layer.reset_parameters()


def test_mistakes_are_told_and_change_nothing() -> None:
    network = nn.Sequential(CondConv2d(4, 6, 1, num_experts=2), nn.ReLU(), CondConv2d(6, 6, 1, num_experts=2))
    with pytest.raises(ValueError, match=r"bf16, int8, got 'int4' \(did you mean 'int8'\?\)"):
        compress_experts(network, "int4")
    with pytest.raises(ValueError, match="Linear has no CondConv layer"):
        compress_experts(nn.Linear(2, 2))
    network[2].backend = "mixture"
    with pytest.raises(
        ValueError, match="2: backend='mixture' cannot read compressed experts: choose 'auto' or one of"
    ):
        compress_experts(network)
    network[2].backend = "auto"
    for computed in (
        lambda layer: parametrize(layer, "weight", nn.Identity()),
        lambda layer: parametrize(layer, "bias", nn.Identity()),
        lambda layer: prune(layer, "weight", 0.5),
    ):
        other = copy.deepcopy(network)
        computed(other[2])
        with pytest.raises(ValueError, match="2 computes its experts"):
            compress_experts(other)
        assert isinstance(other[0].weight, nn.Parameter)
    network[2].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="2 has weights that are not finite"):
        compress_experts(network)
    assert all(isinstance(network[i].weight, nn.Parameter) for i in (0, 2))
    network[2].weight.data.zero_()
    compress_experts(network, "bf16")
    with pytest.raises(ValueError, match=r"experts of 0 are compressed already \(bf16\)"):
        compress_experts(network)
    with pytest.raises(ValueError, match="collapse it before compress_experts"):
        collapse(network, torch.ones(2))
    with pytest.raises(ValueError, match="export it before compress_experts"):
        export_form(network)
    with torch.no_grad(), pytest.raises(ValueError, match="x has 5 channels, the weight expects 4"):
        network[0](torch.randn(1, 5, 3, 3), torch.ones(1, 2))
