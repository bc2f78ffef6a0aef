"""Wrong use of functions and layers: one clear message each, before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condconv
from condconv import CondConv2d, CondLinear, build_router, compress_experts, cond_linear, condconv2d, list_backends


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that works, but for the changes."""
    call: dict[str, Any] = {
        "x": torch.randn(2, 4, 5, 5),
        "routing_weights": torch.rand(2, 3),
        "weight": torch.randn(3, 6, 4, 3, 3),
        "bias": torch.randn(3, 6),
    }
    return call | changes


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


FUNCTION: dict[str, tuple[dict[str, Any], str]] = {
    "x of three dimensions": ({"x": torch.randn(4, 5, 5)}, "x must be [N, C, H, W], got 3 dimensions (4, 5, 5)"),
    "weight of a static layer": (
        {"weight": torch.randn(6, 4, 3, 3)},
        "weight must be [E, K, C / groups, R, S], got 4 dimensions (6, 4, 3, 3)",
    ),
    "no expert": ({"weight": torch.randn(0, 6, 4, 3, 3)}, "is empty: (0, 6, 4, 3, 3)"),
    "no tap": ({"weight": torch.randn(3, 6, 4, 0, 3)}, "is empty: (3, 6, 4, 0, 3)"),
    "channels": ({"x": torch.randn(2, 5, 5, 5)}, "x has 5 channels, the weight expects 4 (4 in each of 1 groups)"),
    "channels of groups": ({"groups": 2}, "x has 4 channels, the weight expects 8 (4 in each of 2 groups)"),
    "groups do not divide": ({"groups": 4}, "groups=4 must be an integer >= 1 that divides the 6 output channels"),
    "groups 0": ({"groups": 0}, "groups=0 must be an integer >= 1"),
    "groups a float": ({"groups": 1.0}, "groups=1.0 must be an integer >= 1"),
    "routing of one example": ({"routing_weights": torch.rand(3)}, "must be [N, E] with E = 3 experts, got (3,)"),
    "E mismatch": ({"routing_weights": torch.rand(2, 4)}, "must be [N, E] with E = 3 experts, got (2, 4)"),
    "N mismatch": ({"routing_weights": torch.rand(5, 3)}, "routing_weights has 5 rows for 2 examples"),
    "bias of a static layer": ({"bias": torch.randn(6)}, "bias must be [E, K] = (3, 6), got (6,)"),
    "bias transposed": ({"bias": torch.randn(6, 3)}, "bias must be [E, K] = (3, 6), got (6, 3)"),
    "routing elsewhere": ({"routing_weights": meta(2, 3)}, "x is on cpu but routing_weights is on meta"),
    "weight elsewhere": ({"weight": meta(3, 6, 4, 3, 3)}, "x is on cpu but weight is on meta"),
    "bias elsewhere": ({"bias": meta(3, 6)}, "x is on cpu but bias is on meta"),
    "x elsewhere": ({"x": meta(2, 4, 5, 5)}, "x is on meta but routing_weights is on cpu"),
    "integer images": (
        {"x": torch.zeros(2, 4, 5, 5, dtype=torch.uint8)},
        "x must be floating point, got torch.uint8; convert images with x.float() / 255",
    ),
    "complex x": ({"x": torch.randn(2, 4, 5, 5, dtype=torch.complex64)}, "x must be floating point"),
    "integer routing": (
        {"routing_weights": torch.ones(2, 3, dtype=torch.int64)},
        "routing_weights must be floating point, got torch.int64",
    ),
    "integer weight": (
        {"weight": torch.ones(3, 6, 4, 3, 3, dtype=torch.int8)},
        "weight must be floating point, got torch.int8",
    ),
    "mixed dtypes": (
        {"x": torch.randn(2, 4, 5, 5).bfloat16()},
        "x is torch.bfloat16 but the weight is torch.float32; convert one, or use torch.autocast",
    ),
    "double x": ({"x": torch.randn(2, 4, 5, 5).double()}, "x is torch.float64 but the weight is torch.float32"),
    "kernel larger than the map": (
        {"x": torch.randn(2, 4, 2, 5)},
        "A 3x3 kernel (dilation (1, 1), padding 0) does not fit into a 2x5 map",
    ),
    "dilated kernel": ({"dilation": 3}, "A 3x3 kernel (dilation (3, 3), padding 0) does not fit into a 5x5 map"),
    "map of size zero": ({"x": torch.randn(2, 4, 0, 5)}, "x (2, 4, 0, 5) has maps without a single position"),
    "map of size zero, padded": (
        {"x": torch.randn(2, 4, 5, 0), "padding": 3},
        "x (2, 4, 5, 0) has maps without a single position",
    ),
    "map of size zero, same_tf": (
        {"x": torch.randn(2, 4, 0, 0), "padding": "same_tf"},
        "x (2, 4, 0, 0) has maps without a single position",
    ),
    "stride 0": ({"stride": 0}, "stride must be an integer >= 1 or a pair of them, got 0"),
    "stride a float": ({"stride": 2.0}, "stride must be an integer >= 1 or a pair of them, got 2.0"),
    "stride of three": ({"stride": (1, 2, 3)}, "stride must be an integer >= 1 or a pair of them, got (1, 2, 3)"),
    "dilation 0": ({"dilation": (1, 0)}, "dilation must be an integer >= 1 or a pair of them, got (1, 0)"),
    "padding negative": ({"padding": (1, -1)}, "padding must be an integer >= 0 or a pair of them, got (1, -1)"),
    "padding typo": (
        {"padding": "sme"},
        'padding must be an integer, a pair, "same", "valid" or "same_tf", got \'sme\'',
    ),
    "padding None": ({"padding": None}, "padding must be an integer >= 0 or a pair of them, got None"),
    "padding same with stride": (
        {"padding": "same", "stride": 2},
        'TensorFlow\'s rule for strides is padding="same_tf"',
    ),
    "backend typo": ({"backend": "gem"}, "Unknown CondConv backend 'gem'. Did you mean 'gemm'? Available: auto"),
    "backend None": ({"backend": None}, "Unknown CondConv backend None. Available: auto"),
    "backend that cannot run": (
        {"backend": "depthwise"},
        "CondConv backend 'depthwise' cannot run this layer: not a depthwise layer",
    ),
    "workspace negative": ({"workspace_bytes": -1}, "workspace_bytes must be an integer >= 0"),
    "workspace a float": ({"workspace_bytes": 1e6}, "workspace_bytes must be an integer >= 0"),
}


def test_the_call_without_changes_works() -> None:
    assert condconv2d(**arguments()).shape == (2, 6, 3, 3)


@pytest.mark.parametrize("mistake", FUNCTION)
def test_wrong_arguments_of_the_function(mistake: str) -> None:
    changes, message = FUNCTION[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        condconv2d(**arguments(**changes))


@pytest.mark.parametrize("backend", [name for name in list_backends() if name != "auto"])
def test_a_backend_named_explicitly_runs_or_says_why_not(backend: str) -> None:
    """There is no silent fallback: the answer is right, or there is none."""
    depthwise = {"weight": torch.randn(3, 4, 1, 3, 3), "bias": None, "groups": 4}
    for call in (arguments(), arguments(**depthwise)):
        expected = condconv2d(**call, backend="reference")
        try:
            y = condconv2d(**call, backend=backend)
        except ValueError as error:
            assert f"CondConv backend {backend!r} cannot run this layer: " in str(error)
        else:
            torch.testing.assert_close(y, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_triton_kernel_on_the_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton_dense' cannot run this layer: .*need a CUDA device"):
        condconv2d(**arguments(backend="triton_dense"))


LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "weight of a static layer": ({"weight": torch.randn(6, 4)}, "weight must be [E, K, C], got 2 dimensions (6, 4)"),
    "x of one dimension": ({"x": torch.randn(4)}, "x must be [N, ..., C], got 1 dimensions (4,)"),
    "features": ({"x": torch.randn(2, 5)}, "x has 5 channels, the weight expects 4"),
    "no positions": ({"x": torch.randn(2, 0, 4)}, "x [N, ..., C] has no positions between examples and channels"),
    "E mismatch": ({"routing_weights": torch.rand(2, 4)}, "must be [N, E] with E = 3 experts"),
    "bias": ({"bias": torch.randn(6)}, "bias must be [E, K] = (3, 6)"),
    "dtype": ({"x": torch.randn(2, 4).half()}, "x is torch.float16 but the weight is torch.float32"),
}


@pytest.mark.parametrize("mistake", LINEAR)
def test_wrong_arguments_of_the_linear_function(mistake: str) -> None:
    changes, message = LINEAR[mistake]
    call = {"x": torch.randn(2, 4), "routing_weights": torch.rand(2, 3), "weight": torch.randn(3, 6, 4), "bias": None}
    assert cond_linear(**call).shape == (2, 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message)):
        cond_linear(**(call | changes))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_linear_layer_names_an_input_without_examples(compressed: bool) -> None:
    layer = CondLinear(4, 6, num_experts=2).requires_grad_(False)
    layer = compress_experts(layer) if compressed else layer
    with pytest.raises(ValueError, match=re.escape("x must be [N, ..., C], got 1 dimensions (4,)")):
        layer(torch.randn(4))


def test_double_precision_is_not_told_to_use_autocast_inside_it() -> None:
    layer, x = CondLinear(4, 6, num_experts=2), torch.randn(2, 4, dtype=torch.float64)
    routing = torch.rand(2, 2)
    with pytest.raises(ValueError, match=r"convert one, or use torch\.autocast"):
        layer(x, routing)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"convert one\.$"):
        layer(x, routing)


LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
    "experts a float": ({"num_experts": 2.5}, "num_experts must be an integer >= 1, got 2.5"),
    "experts a bool": ({"num_experts": True}, "num_experts must be an integer >= 1, got True"),
    "groups": ({"groups": 3}, "groups=3 must divide in_channels=4 and out_channels=6"),
    "groups 0": ({"groups": 0}, "groups=0 must divide in_channels=4 and out_channels=6"),
    "kernel 0": ({"kernel_size": 0}, "kernel_size must be an integer >= 1 or a pair of them, got 0"),
    "kernel of three": ({"kernel_size": (3, 3, 3)}, "kernel_size must be an integer >= 1 or a pair of them"),
    "stride": ({"stride": 0}, "stride must be an integer >= 1 or a pair of them, got 0"),
    "dilation": ({"dilation": "2"}, "dilation must be an integer >= 1 or a pair of them, got '2'"),
    "padding": ({"padding": -1}, "padding must be an integer >= 0 or a pair of them, got -1"),
    "padding typo": ({"padding": "full"}, "padding must be an integer, a pair"),
    "padding same with stride": ({"padding": "same", "stride": 2}, 'for strides use padding="same_tf"'),
    "padding mode": (
        {"padding_mode": "reflection"},
        "padding_mode must be one of zeros, reflect, replicate, circular, got 'reflection'",
    ),
    "padding mode of same_tf": (
        {"padding_mode": "reflect", "padding": "same_tf"},
        'padding="same_tf" pads with zeros only',
    ),
    "backend typo": ({"backend": "group"}, "Unknown CondConv backend 'group'. Did you mean 'grouped'?"),
    "routing typo": ({"router": "softmaxx"}, "Unknown routing function 'softmaxx'. Did you mean 'softmax'?"),
    "router of other size": ({"router": build_router("fc", 4, 5)}, "The router has 5 experts, the layer 8"),
}


@pytest.mark.parametrize("mistake", LAYER)
def test_wrong_arguments_of_the_layer(mistake: str) -> None:
    changes, message = LAYER[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        CondConv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | changes))


@pytest.mark.parametrize(
    "layer", [CondConv2d(4, 6, 3, router=None), CondLinear(4, 6, router=None)], ids=["2d", "linear"]
)
def test_a_layer_without_router_and_routing_weights(layer: nn.Module) -> None:
    message = rf"{type(layer).__name__} has no router of its own \(router=None\).*layer\(x, routing_weights\)"
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(2, 4, 5, 5) if isinstance(layer, CondConv2d) else torch.randn(2, 4))


def test_inputs_that_the_layers_router_cannot_pool() -> None:
    layer = CondConv2d(4, 6, 3)
    with pytest.raises(ValueError, match=re.escape("This router pools inputs [N, 4, ...] but was given (2, 3, 5, 5)")):
        layer(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="floating point"):
        layer(torch.zeros(2, 4, 5, 5, dtype=torch.uint8))


def test_a_router_for_other_channels() -> None:
    layer = CondConv2d(4, 6, 3, router=build_router("fc", 9, 8))
    with pytest.raises(ValueError, match=re.escape("This router pools inputs [N, 9, ...] but was given (2, 4, 5, 5)")):
        layer(torch.randn(2, 4, 5, 5))


def test_routing_that_is_not_finite_is_found_in_debug_mode() -> None:
    """Off by default: the output of the example is NaN then, and only that."""
    call = arguments()
    call["routing_weights"][1, 2] = float("nan")
    y = condconv2d(**call)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    condconv.set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"routing_weights of examples \[1\] are not finite"):
            condconv2d(**call)
        assert condconv2d(**arguments()).isfinite().all()
    finally:
        condconv.set_debug(False)
    assert condconv2d(**call)[1].isnan().all()
