"""The benchmark of networks: the peers compute what ours does, gates stop what is wrong, rows state their targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, network_tables, networks, peers
from benchmarks.contenders import OURS, STATIC, TIMM, Trio
from benchmarks.network_gates import gate
from benchmarks.presets import Case, of_backbones, with_targets
from condconv.ops import choice
from condconv.ops.registry import BACKENDS
from models import create_model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks a quarter as wide, so that a row takes a second."""
    monkeypatch.setattr(
        contenders, "create_model", lambda name, experts: create_model(name, experts=experts, width=0.25)
    )


def case(training: bool = True, dtype: str = "float32") -> Case:
    return Case("mobilenet_v1", 2, training, 32, 3, dtype, budget_s=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_timms_layers_in_our_network_compute_the_same(tiny: None, dtype: str) -> None:
    trio = Trio("mobilenet_v1", 2, "cpu")
    errors, notes = gate(trio, case(dtype=dtype), case().batch_of_images()[0])
    assert notes == {}
    assert set(errors) == {OURS, TIMM}
    assert max(errors.values()) < (1e-2 if dtype == "float32" else 3e-2)


def test_timms_own_network_computes_the_same() -> None:
    ours = create_model("efficientnet_b0", experts=8).eval()
    peer = peers.timm_peer("efficientnet_b0", ours, 8)
    assert peer.title == "timm efficientnet_cc_b0_8e"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer.network.eval()(x), ours(x), rtol=1e-3, atol=1e-5)
    assert peer.to_ours(peer.network.state_dict()).keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("wrong_half", "dtype"), [("forward", "float32"), ("backward", "float32"), ("forward", "bfloat16")]
)
def test_a_wrong_backend_gets_no_time(tiny: None, wrong_half: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example gets the kernel of its neighbour in the backend that "auto" takes for most pointwise layers."""
    right = BACKENDS["gemm"]
    place = 1 if wrong_half == "forward" else 2

    def wrong(*arguments: Any) -> Any:
        rolled = [t.roll(1, 0) if index == place else t for index, t in enumerate(arguments)]
        return getattr(right, wrong_half)(*rolled)

    monkeypatch.setitem(BACKENDS, "gemm", right._replace(**{wrong_half: wrong}))
    row = networks.measure(case(dtype=dtype), networks.Networks(), quick=True)
    assert "gate failed" in row["notes"][OURS]
    assert OURS not in row["times"]
    assert STATIC in row["times"]
    assert "gate failed" in network_tables.line(row | {"id": "x"})


def test_a_run_writes_rows_with_times_memory_and_ratios(tiny: None, tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--backbones", "mobilenet_v1", "--experts", "2", "--batch-sizes", "2"]
    networks.main([*options, "--output", str(tmp_path)])
    training, inference = json.loads((tmp_path / "networks-cpu.json").read_text())["rows"]
    assert set(training["times"]) == set(inference["times"]) == {STATIC, OURS, TIMM}
    assert set(training["over"]) == {"ours/static", "ours/timm", "timm/static"}
    assert all(peak > 0 for peak in training["peak_mb"].values())
    assert "peak_mb" not in inference
    text = (tmp_path / "networks-cpu.md").read_text()
    assert "mobilenet_v1 E=2, training, 32 px, batch 2, float32" in text
    assert "Peak memory" in text


def test_a_missing_timm_layer_is_said_and_the_others_go_on(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise peers.PeerMissing("not run: no timm")

    monkeypatch.setattr(peers, "timm_condconv2d", missing)
    row = networks.measure(case(training=False), networks.Networks(), quick=True)
    assert row["notes"] == {TIMM: "not run: no timm"}
    assert set(row["times"]) == {STATIC, OURS}


def test_a_contender_without_memory_is_said_and_the_others_go_on(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Module.__call__

    def greedy(module: torch.nn.Module, *arguments: Any) -> Any:
        if isinstance(module, peers.TimmLayer) and module.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return network(module, *arguments)

    monkeypatch.setattr(torch.nn.Module, "__call__", greedy)
    row = networks.measure(case(), networks.Networks(), quick=True)
    assert row["notes"] == {TIMM: "out of memory"}
    assert set(row["times"]) == set(row["peak_mb"]) == {STATIC, OURS}


def test_targets_are_judged_honestly() -> None:
    assert network_tables.met(1.9, 1.9) == "<= 1.9: met"
    assert network_tables.met(1.91, 1.9) == "<= 1.9: missed"
    assert network_tables.met(None, 1.9) == "<= 1.9: not measured"
    assert network_tables.met(1.0, None) == ""


def test_the_table_of_targets_is_complete_and_its_targets_survive_selection() -> None:
    assert [(c.backbone, c.image_size, c.batch, c.targets) for c in with_targets("cpu")] == [
        ("efficientnet_b0", 32, 64, (1.9, 0.18)),
        ("efficientnet_b0", 64, 64, (2.1, 0.35)),
        ("efficientnet_b0", 224, 16, (1.2, 0.95)),
        ("efficientnet_b0", 224, 1, (1.15, 0.9)),
        ("resnet50", 224, 16, (1.3, 0.8)),
        ("mobilenet_v1", 224, 16, (1.5, 0.7)),
    ]
    on_gpu = {c.backbone: c.targets[0] for c in with_targets("cuda") if c.targets}
    assert on_gpu == {"efficientnet_b0": 1.15, "mobilenet_v1": 1.2, "mobilenet_v2": 1.2, "resnet50": 1.25}
    chosen = networks.chosen_cases(networks.parse(["--device", "cpu"]))
    assert len({c.id for c in chosen}) == len(chosen)
    assert {c.id for c in chosen if c.targets} == {c.id for c in with_targets("cpu")}


def test_rows_with_targets_keep_them_in_every_preset() -> None:
    cases = of_backbones(["resnet50", "resnet18"], "cpu", [16], 224, 8, "float32", 8.0)
    wanted = next(case for case in with_targets("cpu") if case.backbone == "resnet50")
    found = {case.id: (case.targets, case.budget_s) for case in cases}
    assert found[wanted.id] == (wanted.targets, wanted.budget_s)
    assert {targets for name, (targets, _) in found.items() if name != wanted.id} == {None}


@pytest.mark.parametrize("autotune", [True, False])
def test_backends_are_measured_when_asked(tiny: None, autotune: bool) -> None:
    choice.forget()
    try:
        row = networks.measure(case(), networks.Networks(autotune), quick=True)
        assert OURS in row["times"]
        assert bool(choice._measured) == autotune
    finally:
        choice.forget()
