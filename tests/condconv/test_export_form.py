"""The export form computes what the layers compute, and holds no operator that depends on the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import assert_close
from small_networks import SmallNet

from condconv import CondConv2d, CondLinear, convert
from condconv.export import FORMS, export_form

# in, out, kernel, stride, padding, dilation, groups, padding mode
GEOMETRIES = [
    (6, 5, 1, 1, 0, 1, 1, "zeros"),
    (6, 5, 1, 2, 0, 1, 1, "zeros"),
    (6, 6, 5, 2, 2, 1, 6, "zeros"),
    (6, 12, 3, 1, 1, 2, 6, "zeros"),
    (6, 6, 3, 2, "same_tf", 1, 6, "zeros"),
    (6, 9, 3, 1, "same", 2, 3, "zeros"),
    (4, 6, (3, 1), (2, 1), (1, 0), 1, 2, "reflect"),
    (3, 7, 3, 2, "same_tf", 1, 1, "zeros"),
    (3, 7, 3, 1, "valid", 1, 1, "zeros"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution(geometry: tuple, form: str) -> None:
    *sizes, mode = geometry
    layer = CondConv2d(*sizes, padding_mode=mode, num_experts=3, router="softmax").double()
    torch.nn.init.normal_(layer.bias)
    plain = export_form(layer, form)
    for batch, size in ((1, (7, 9)), (4, (8, 8))):
        x = torch.randn(batch, sizes[0], *size, dtype=torch.float64)
        assert_close(plain(x), layer(x), f"own router {geometry} {form}")
        routing = torch.randn(batch, 3, dtype=torch.float64)
        assert_close(plain(x, routing), layer(x, routing), f"given routing {geometry} {form}")


@pytest.mark.parametrize(("form", "bias", "shape"), [*itertools.product(FORMS, (True, False), ((4, 6), (2, 5, 3, 6)))])
def test_a_linear_layer(form: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer = CondLinear(6, 7, bias=bias, num_experts=3).double()
    plain, x = export_form(layer, form), torch.randn(shape, dtype=torch.float64)
    assert_close(plain(x), layer(x), "linear")


@pytest.mark.parametrize(("form", "routing"), [("mixture", "hierarchical"), ("matmul", "fc"), ("matmul", "single")])
def test_a_network_is_copied_and_its_batch_stays_free(form: str, routing: str) -> None:
    net = SmallNet()
    convert(net, 3, blocks="blocks.1.*", classifier="classifier", exclude="se", routing=routing)
    plain = export_form(net, form)
    assert net.training and not plain.training
    assert not any(isinstance(m, CondConv2d | CondLinear) for m in plain.modules())
    assert sum(isinstance(m, CondConv2d | CondLinear) for m in net.modules()) == 7
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        assert_close(plain(x), net.eval()(x), f"plain, batch {batch}")
    if routing == "single":  # three exports would only cost time
        return
    exported = torch.export.export(
        plain, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    kinds = {node.target.name() for node in exported.graph.nodes if hasattr(node.target, "name")}
    assert not [kind for kind in kinds if kind.startswith("condconv")]
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        assert_close(exported.module()(x), net(x), f"exported, batch {batch}")


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    layer = CondConv2d(4, 4, 3, padding=1, num_experts=3)
    net, x = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).eval(), torch.randn(2, 4, 6, 6)
    plain = export_form(net)
    assert plain[2] is plain[0] and not isinstance(plain[0], CondConv2d)
    assert_close(plain(x), net(x), "twice")


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown export form 'grouped': choose one of mixture, matmul"):
        export_form(SmallNet(), "grouped")
