"""The benchmark of detectors: its gate, its table, and that the benchmark of networks makes it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import detectors, latency, networks
from benchmarks.detectors import MODES, gate, render, settled
from benchmarks.gates import GateFailure
from condconv import CondConv2d


def test_a_small_detector_for_real(tmp_path: Path) -> None:
    networks.main(["--preset", "detectors", "--quick", "--device", "cpu", "--output", str(tmp_path), "--experts", "2"])
    (row,) = json.loads((tmp_path / "detectors-cpu.json").read_text())["rows"]
    assert row["error_of_gate"] < 0.1 and set(row["over"]) == set(MODES)
    assert all(times[name]["median_ms"] > 0 for times in row["times"].values() for name in ("static", "CondConv"))
    assert (tmp_path / "detectors-cpu.md").read_text().count("width 0.25, E=2, 64 px") == 3


def test_quick_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small detector, and what is given wins."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(detectors, "table", lambda *args: asked.append(args[:6]))
    for words in ([], ["--quick"], ["--quick", "--image-size", "96", "--batch", "4", "--widths", "0.5"]):
        detectors.main([*words, "--device", "cpu", "--output", str(tmp_path)])
    assert asked == [
        ([0.5, 0.75, 1.0], 8, 300, 8, "cpu", 30.0),
        ([0.25], 8, 64, 2, "cpu", 0.2),
        ([0.5], 8, 96, 4, "cpu", 0.2),
    ]


def test_the_gate_finds_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    net = settled(0.25, 2, 64, "cpu")
    layer = next(module for module in net.modules() if isinstance(module, CondConv2d))
    layer.register_forward_hook(lambda module, args, y: y * 1.05 if y.dtype == torch.float32 else None)
    with pytest.raises(GateFailure):
        gate(net, 64, "cpu")


def test_the_table() -> None:
    times = {mode: {"static": {"median_ms": 10.0}, "CondConv": {"median_ms": 12.0}} for mode in MODES}
    over = {mode: {"ratio": 1.2, "min": 1.1, "max": 1.3} for mode in MODES}
    row: dict[str, Any] = {"id": "a", "origin": 0, "width": 0.5, "experts": 8, "image_size": 300, "batch": 8}
    text = render([{**row, "times": times, "over": over}, {"id": "b", "origin": 0, "error": "out of memory"}])
    assert "| width 0.5, E=8, 300 px | training step, batch 8 | 10.0 | 12.0 | 1.20 (1.10 to 1.30) |" in text
    assert "| b | out of memory |" in text


def test_the_benchmark_of_networks_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(networks, "chosen_cases", lambda args: [])
    monkeypatch.setattr(detectors, "table", lambda *args: called.append("detectors"))
    monkeypatch.setattr(latency, "table", lambda *args: called.append("latency"))
    networks.main(["--device", "cpu", "--output", str(tmp_path)])
    networks.main(["--device", "cpu", "--output", str(tmp_path), "--preset", "targets"])
    assert called == ["detectors", "latency"]
