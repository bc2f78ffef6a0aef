"""The profile of a step: labels reach our operators, self times add up, a wrong network has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import contenders, profiles, work
from benchmarks.contenders import OURS, STATIC
from benchmarks.presets import Case
from condconv import CondConv2d
from condconv.ops import mixture
from condconv.ops.registry import BACKENDS
from models import create_model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        contenders, "create_model", lambda name, experts: create_model(name, experts=experts, width=0.25)
    )


def kinds_of(layer: nn.Module, x: torch.Tensor, train: bool = True) -> dict[str, float]:
    """Milliseconds by kind of one step of a layer behind a convolution, which makes its input need a gradient."""
    network = nn.Sequential(nn.Conv2d(x.shape[1], x.shape[1], 1), layer)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with work.labelled(), profile(activities=[ProfilerActivity.CPU]) as profiler, torch.set_grad_enabled(train):
        y = network(x)
        if train:
            y.sum().backward()
            optimizer.step()
    return work.milliseconds(profiler.events())


def test_every_part_of_a_mixed_layer_has_its_kind() -> None:
    layer = CondConv2d(8, 8, 3, padding=1, num_experts=2, router="fc", backend="gemm")
    found = kinds_of(layer, torch.randn(4, 8, 6, 6))
    wanted = {
        work.STATIC_CONVOLUTIONS, work.ROUTERS, work.MIXING, work.PRODUCTS, work.KERNEL_GRADIENTS, work.REDUCTION,
        work.COPIES, work.CALLS, work.OPTIMISER,
    }  # fmt: skip
    assert wanted <= {kind for kind, ms in found.items() if ms > 0}
    assert work.ALL_EXPERTS not in found
    assert set(found) <= set(work.KINDS)


@pytest.mark.parametrize("backend", ["depthwise", "grouped", "mixture"])
def test_backends_are_seen(backend: str) -> None:
    layer = CondConv2d(8, 8, 3, padding=1, groups=8, num_experts=2, router="fc", backend=backend)
    found = kinds_of(layer, torch.randn(4, 8, 6, 6))
    mixed = {work.MIXING, work.PRODUCTS, work.KERNEL_GRADIENTS, work.REDUCTION}
    assert (work.ALL_EXPERTS in found) == (backend == "mixture")
    assert mixed <= found.keys() if backend != "mixture" else not mixed & found.keys()


def test_one_example_mixes_its_kernel() -> None:
    layer = CondConv2d(64, 64, 3, padding=1, num_experts=2, router="fc")
    found = kinds_of(layer, torch.randn(1, 64, 6, 6), train=False)
    assert found[work.MIXING] > 0
    assert found[work.PRODUCTS] > 0


def test_a_static_network_has_nothing_of_ours() -> None:
    found = kinds_of(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(4, 8, 6, 6))
    assert set(found) == {work.STATIC_CONVOLUTIONS, work.NORMS, work.ELEMENTWISE, work.OPTIMISER}


def test_labels_are_taken_away() -> None:
    before = [getattr(owner, name) for owner, name, _ in work._places()]
    with work.labelled():
        assert BACKENDS["mixture"].forward is not mixture.forward
    assert [getattr(owner, name) for owner, name, _ in work._places()] == before
    assert BACKENDS["mixture"].forward is mixture.forward


def test_self_times_add_up_to_the_step(tiny: None) -> None:
    row = profiles.measure(Case("mobilenet_v1", 2, True, 32, 3), rounds=1)
    assert set(row["work_ms"]) == set(row["plain_ms"]) == {STATIC, OURS}
    assert row["work_ms"][OURS][work.MIXING] > 0
    assert work.MIXING not in row["work_ms"][STATIC]
    text = profiles.render([row | {"id": "this row", "origin": 0}])
    shares = [line.split("|") for line in text.splitlines() if line.startswith("| ") and "%" in line]
    parts = [float(cells[6].strip(" %")) for cells in shares[:-2]]
    total = float(shares[-2][6].strip(" %"))
    assert sum(parts) == pytest.approx(total, abs=0.15 * len(work.KINDS))


def test_the_step_alone_is_what_its_kinds_add_up_to() -> None:
    def step() -> None:
        torch.randn(64, 64) @ torch.randn(64, 64)

    step()
    found = profiles.profile_step(step)
    assert found[work.BETWEEN] > 0
    assert found[work.STATIC_CONVOLUTIONS] > 0


def test_a_wrong_network_has_no_profile(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["gemm"]

    def wrong(x: Any, routing: Any, *rest: Any) -> Any:
        return right.forward(x, routing.roll(1, 0), *rest)

    monkeypatch.setitem(BACKENDS, "gemm", right._replace(forward=wrong))
    row = profiles.measure(Case("mobilenet_v1", 2, True, 32, 3), rounds=1)
    assert "gate failed" in row["error"]
    assert "work_ms" not in row
    assert "gate failed" in profiles.render([row | {"id": "x", "origin": 0}])


def test_a_run_writes_a_table(tiny: None, tmp_path: Path) -> None:
    options = ["--quick", "--backbones", "mobilenet_v1", "--experts", "2", "--batch-sizes", "2", "--threads", "1"]
    profiles.main([*options, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "profiles-cpu.json").read_text())["rows"]
    assert row["rounds"] == 1
    text = (tmp_path / "profiles-cpu.md").read_text()
    assert "## mobilenet_v1 E=2 training 32px batch 2 float32" in text
    assert "| mixing kernels |" in text


@pytest.mark.parametrize("options", [["--device", "cuda"], ["--rounds", "0"], ["--threads", "-1"]])
def test_options_that_make_no_sense(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profiles.parse(options)
    assert options[0] in capsys.readouterr().err
