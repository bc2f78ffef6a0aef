"""Every algorithm against the float64 oracle: forward and the four gradients, over geometry, layout and tiling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from oracle import CPU_BACKENDS, Case, assert_all_close, case_for, cotangent, leaves, oracle, run

from condconv import condconv2d
from condconv.ops import chunked
from condconv.ops.workspace import workspace

GEOMETRY = [
    Case(),
    Case(kernel=(1, 1)),
    Case(kernel=(1, 1), stride=(2, 2)),
    Case(kernel=(1, 1), stride=(3, 2), padding=(1, 0)),
    Case(kernel=(1, 1), size=(1, 1)),
    Case(kernel=(1, 1), size=(2, 2), channels=11, out_channels=3),
    Case(kernel=(1, 1), channels=3, out_channels=35),
    Case(padding=(1, 1), size=(1, 1)),
    Case(padding=(1, 1), size=(2, 2)),
    Case(padding=(1, 1), stride=(2, 2), size=(8, 8)),
    Case(padding=(0, 1), size=(5, 3), stride=(1, 2)),
    Case(kernel=(2, 2), padding=(1, 1)),
    Case(kernel=(3, 1), padding=(1, 0)),
    Case(kernel=(5, 5), padding=(2, 2), size=(1, 1)),
    Case(kernel=(5, 5), padding=(2, 2), size=(2, 2)),
    Case(kernel=(5, 5), padding=(2, 2), size=(2, 3), stride=(2, 2)),
    Case(kernel=(7, 7), padding=(3, 3)),
    Case(kernel=(7, 7), padding=(4, 4), size=(3, 2)),
    Case(kernel=(4, 6), padding=(3, 5), size=(2, 2), stride=(2, 3)),
    Case(dilation=(2, 2), padding=(2, 2)),
    Case(dilation=(3, 1), padding=(3, 1), stride=(2, 2)),
    Case(dilation=(4, 4), padding=(4, 4), size=(3, 3)),
    Case(padding=(2, 2), size=(3, 3)),
    Case(padding=(3, 4), kernel=(2, 2), size=(2, 2)),
    Case(out_channels=1),
    Case(channels=1, out_channels=1),
    Case(channels=1, out_channels=4, padding=(1, 1)),
    Case(experts=1),
    Case(experts=8),
    Case(batch=1),
    Case(batch=1, kernel=(1, 1)),
    Case(batch=5, kernel=(1, 1), experts=8),
    Case(batch=0),
    Case(batch=0, kernel=(1, 1), size=(1, 1)),
]
GROUPED = [
    Case(channels=6, out_channels=4, groups=2),
    Case(channels=6, out_channels=9, groups=3, padding=(1, 1), stride=(2, 2)),
    Case(channels=6, out_channels=4, groups=2, kernel=(1, 1)),
    Case(channels=6, out_channels=4, groups=2, kernel=(1, 1), size=(1, 1)),
    Case(channels=6, out_channels=4, groups=2, kernel=(5, 5), padding=(2, 2), size=(2, 2)),
    Case(channels=8, out_channels=4, groups=4, dilation=(2, 2), padding=(2, 2)),
    Case(channels=3, out_channels=6, groups=3, padding=(1, 1)),
    Case(channels=3, out_channels=6, groups=3, kernel=(1, 1)),
    Case(batch=0, channels=6, out_channels=4, groups=2),
    # Enough for a loop over examples in channels last; the second one for kernel gradients too.
    Case(batch=2, channels=6, out_channels=4, groups=2, padding=(1, 1), size=(75, 76)),
    Case(batch=2, channels=8, out_channels=4, groups=4, size=(128, 129), stride=(2, 3)),
]
DEPTHWISE = [
    Case(channels=5, out_channels=5, groups=5, **geometry)  # type: ignore[arg-type] - values of several types
    for geometry in (
        {},
        {"padding": (1, 1)},
        {"padding": (1, 1), "stride": (2, 2)},
        {"padding": (1, 1), "stride": (2, 2), "size": (8, 6)},
        {"kernel": (1, 1)},
        {"kernel": (1, 1), "stride": (2, 2)},
        {"kernel": (5, 5), "padding": (2, 2), "size": (1, 1)},
        {"kernel": (5, 5), "padding": (2, 2), "size": (2, 2)},
        {"kernel": (5, 5), "padding": (2, 2), "stride": (2, 2), "size": (14, 14)},
        {"kernel": (7, 7), "padding": (3, 3), "batch": 1},
        {"kernel": (3, 2), "padding": (0, 1), "stride": (3, 1)},
        {"kernel": (3, 3), "stride": (3, 3), "size": (8, 8)},
        {"dilation": (2, 2), "padding": (2, 2), "stride": (2, 2), "experts": 8},
        {"dilation": (3, 3), "padding": (3, 3), "size": (2, 2)},
        {"padding": (1, 1), "size": (19, 19)},
        {"padding": (1, 1), "size": (35, 35), "stride": (2, 2), "batch": 2},
        # A single output position, whose kernel gradient is a window of x.
        {"size": (3, 3)},
        {"size": (5, 5), "dilation": (2, 2)},
        {"size": (4, 5), "stride": (3, 3)},
        {"size": (3, 6), "dilation": (2, 2), "padding": (1, 0), "stride": (2, 3)},
        {"experts": 1, "batch": 5},
        {"batch": 0, "padding": (1, 1)},
        # Enough for a loop over examples in channels last.
        {"padding": (1, 1), "size": (81, 83)},
        {"kernel": (5, 5), "padding": (2, 2), "size": (82, 81), "stride": (2, 2), "batch": 2},
    )
]
ALL = GEOMETRY + GROUPED + DEPTHWISE
PAIRS = [
    pytest.param(backend, case, id=f"{backend} {case}")
    for case in ALL
    for backend in (*CPU_BACKENDS, "auto", "reference")
    if backend in ("auto", "reference") or case.supported_by(backend)
]
LAYOUTS = [False, True]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever `torch.empty` gives is NaN, and no workspace of an earlier call hides it."""
    workspace.buffers.clear()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_matches_oracle(backend: str, case: Case, channels_last: bool) -> None:
    tensors = case.tensors(channels_last=channels_last)
    actual = run(tensors, case.spec, backend)
    assert_all_close(actual, oracle(tensors, case.spec), torch.float64)
    if case.batch:
        expected = torch.channels_last if channels_last and case.channels > 1 else torch.contiguous_format
        assert actual[0].is_contiguous(memory_format=expected) or case.out_channels == 1
        # The oracle's gradient is what autograd makes of a loop; its layout is not promised.
        assert actual[1].is_contiguous(memory_format=expected) or backend == "reference"


def test_every_backend_meets_every_kind_of_layer_it_should() -> None:
    """Guards the parametrisation above: a `supports` that says no too often would silently shrink it."""
    counts = {backend: sum(case.supported_by(backend) for case in ALL) for backend in CPU_BACKENDS}
    assert counts["mixture"] == counts["grouped"] == len(ALL)
    assert counts["depthwise"] >= len(DEPTHWISE)
    assert counts["gemm"] >= len(GEOMETRY) + len(GROUPED)
    assert counts["depthwise_sum"] >= len(GROUPED) + len(DEPTHWISE)


TILED = [
    Case(batch=5, channels=3, out_channels=70, padding=(1, 1), size=(4, 4)),
    Case(batch=5, channels=9, out_channels=67, kernel=(1, 1), size=(3, 3)),
    Case(batch=5, channels=6, out_channels=4, groups=2, padding=(1, 1), stride=(2, 2)),
    Case(batch=5, channels=5, out_channels=5, groups=5, padding=(1, 1)),
    Case(batch=5, channels=5, out_channels=5, groups=5, kernel=(5, 5), padding=(2, 2), size=(2, 2)),
]


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("workspace_bytes", [1, 1000, 20_000, 1 << 30])
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend} {case}")
        for case in TILED
        for backend in CPU_BACKENDS
        if case.supported_by(backend)
    ],
)
def test_any_workspace_gives_the_same(backend: str, case: Case, workspace_bytes: int, channels_last: bool) -> None:
    tensors = case.tensors(channels_last=channels_last)
    assert_all_close(run(tensors, case.spec, backend, workspace_bytes), oracle(tensors, case.spec), torch.float64)


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["pointwise", "3x3"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["dense", "strided"])
def test_the_automatic_workspace_in_many_tiles(
    monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, int], stride: tuple[int, int], channels_last: bool
) -> None:
    """On a CPU tiles are planned for the cache: here of three examples and 32 channels, the last ones smaller."""
    for name, value in (("CACHED_BYTES", 1), ("CACHED_EXAMPLES", 1), ("LEAST_CHANNELS", 32)):
        monkeypatch.setattr(chunked, name, value)
    case = Case(batch=8, channels=3, out_channels=70, kernel=kernel, stride=stride, size=(4, 4))
    assert chunked._cached_budget(case.batch, case.experts, 4, 24) == (3 * 32 * 24, 3)
    tensors = case.tensors(channels_last=channels_last)
    assert_all_close(run(tensors, case.spec, "gemm"), oracle(tensors, case.spec), torch.float64)


def test_small_workspaces_make_many_tiles() -> None:
    tiles = chunked.plan_tiles(5, 70, 27, True, 8, 1000)
    assert len(tiles) > 5
    seen = torch.zeros(5, 70, dtype=torch.int64)
    for tile in tiles:
        seen[tile.examples, tile.channels] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto", "reference"])
@pytest.mark.parametrize("kind", ["sliced", "expanded batch", "expanded channels", "transposed map", "strided weight"])
def test_inputs_that_are_not_dense(backend: str, kind: str) -> None:
    case = case_for(backend, padding=(1, 1))
    x, routing, weight, bias = case.tensors()
    if kind == "sliced":
        x = torch.randn(6, 9, 7, 14, dtype=torch.float64)[::2, 1:5, :, ::2][: case.batch]
    elif kind == "expanded batch":
        x = x[:1].expand(case.batch, -1, -1, -1)
    elif kind == "expanded channels":
        x = x[:, :1].expand(-1, 4, -1, -1)
    elif kind == "transposed map":
        x = x.transpose(2, 3)
    else:
        weight = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        routing = routing.T.contiguous().T
        bias = bias[:, ::2].repeat_interleave(2, 1)[:, ::1]
    expected = oracle([x.contiguous(), routing.contiguous(), weight.contiguous(), bias], case.spec)
    arguments = [t.detach().requires_grad_() for t in (x, routing, weight, bias)]
    y = condconv2d(*arguments, 1, 1, 1, case.groups, backend)
    gradients = torch.autograd.grad(y, arguments, cotangent(y))
    assert_all_close([y.detach(), *gradients], expected, torch.float64)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto", "reference"])
def test_the_format_of_the_output_is_that_of_the_librarys_convolution(backend: str) -> None:
    """Which goes by the order of strides, so also for channels and positions cut out of NHWC."""
    case = case_for(backend, padding=(1, 1))
    _, routing, weight, _ = case.tensors()
    wide = torch.randn(6, 8, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layouts = {
        "channels": wide.chunk(2, 1)[1],
        "columns": wide[:, :4, :, 1:6],
        "one column": wide[:, :4, :, :1],
        "every other row": wide[:, :4, ::2],
        "every other example": wide[::2, ::2],
        "one channel for all": wide[:, :1].expand(-1, 4, -1, -1),
        "one example for all": wide[:1, :4].expand(6, -1, -1, -1),
        "one example": wide[1, :4].unsqueeze(0),
        "turned": wide[:, :4].transpose(2, 3),
    }
    for name, x in layouts.items():
        x = x[: case.batch]
        like = F.conv2d(x, weight[0], None, *case.spec)
        y = condconv2d(x, routing[: len(x)], weight, None, *case.spec, backend=backend)
        assert y.stride() == like.stride(), name


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_gradient_of_the_output_may_be_expanded_or_in_the_other_layout(backend: str) -> None:
    """`y.sum().backward()` gives a gradient with stride 0 everywhere."""
    case = case_for(backend)
    for channels_last in LAYOUTS:
        tensors = case.tensors(channels_last=channels_last)
        expected, actual = leaves(tensors), leaves(tensors)
        condconv2d(*expected, groups=case.groups, backend="reference").sum().backward()
        y = condconv2d(*actual, groups=case.groups, backend=backend)
        y.backward(torch.ones((), dtype=y.dtype).expand(y.shape), retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            assert a.grad is not None
            assert e.grad is not None
            assert_close(a.grad, e.grad, "gradient for an expanded one")
        other = torch.contiguous_format if channels_last else torch.channels_last
        grad_y = torch.ones_like(y).contiguous(memory_format=other)
        for a, g in zip(actual, torch.autograd.grad(y, actual, grad_y), strict=True):
            assert a.grad is not None
            assert_close(g, a.grad, "gradient in the other layout")
