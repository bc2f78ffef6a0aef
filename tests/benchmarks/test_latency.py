"""The latency table shows each kind in its column, and what could not be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import latency, networks
from benchmarks.latency import KINDS, render
from models import list_backbones


def test_the_table() -> None:
    times = {
        f"static {kind}": {"median_ms": 1.0 + i, "rounds": 4} for i, kind in enumerate(KINDS) if kind != "ONNX matmul"
    }
    times |= {f"CondConv {kind}": {"median_ms": 10.0 + i, "rounds": 7} for i, kind in enumerate(KINDS)}
    row = {"id": "a", "origin": 0, "backbone": "resnet18", "experts": 8, "image_size": 224, "times": times}
    text = render([row, {"id": "b-e8-224px", "origin": 0, "error": "out of memory"}])
    assert "median of 4 to 7 rounds" in text
    assert "| resnet18, 224 px | static | 1.0 | 2.0 | 3.0 | - | 5.0 |" in text
    assert "| resnet18, 224 px | CondConv, 8 experts | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 |" in text
    assert "| b-e8-224px | out of memory |" in text


def fake(backbone: str, experts: int, image_size: int, budget_s: float) -> dict[str, Any]:
    times = {f"{variant} eager": {"median_ms": 2.0, "rounds": 9} for variant in ("static", "CondConv")}
    return {"backbone": backbone, "experts": experts, "image_size": image_size, "notes": {}, "times": times}


def test_the_benchmark_of_networks_makes_the_table_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself and at the end of the whole benchmark, not beside a selection."""
    monkeypatch.setattr(latency, "measure", fake)
    monkeypatch.setattr(networks, "chosen_cases", lambda args: [])
    monkeypatch.setattr(networks, "detector_table", lambda args: None)
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/networks.py", "--preset", "latency"])
    options = ["--device", "cpu", "--output", str(tmp_path)]
    networks.main(["--preset", "latency", "--backbones", "resnet18", *options])
    written = json.loads((tmp_path / "latency-cpu.json").read_text())
    assert [row["id"] for row in written["rows"]] == ["resnet18-e8-224px"]
    assert written["origins"][0]["commands"] == ["python -m benchmarks.networks --preset latency"]
    networks.main(["--preset", "targets", *options])
    networks.main(["--backbones", "resnet18", *options])
    assert len(json.loads((tmp_path / "latency-cpu.json").read_text())["rows"]) == 1
    networks.main(options)
    assert len(json.loads((tmp_path / "latency-cpu.json").read_text())["rows"]) == 8
    assert "median of 9 to 9 rounds" in (tmp_path / "latency-cpu.md").read_text()


def test_quick_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small network, and what is given wins."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(latency, "table", lambda *args: asked.append(args[:4]))
    for words in ([], ["--quick"], ["--quick", "--image-size", "64", "--seconds", "1", "--backbones", "resnet18"]):
        latency.main([*words, "--output", str(tmp_path)])
    assert asked[0][0] == list(list_backbones()) and asked[0][1:] == (8, 224, 20.0)
    assert asked[1:] == [(["mobilenet_v1"], 8, 32, 0.2), (["resnet18"], 8, 64, 1.0)]


def test_a_gpu_is_not_measured_by_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for main, words in ((latency.main, []), (networks.main, ["--preset", "latency"])):
        with pytest.raises(SystemExit):
            main([*words, "--device", "cuda"])
        assert "latency is of the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_one_backbone_for_real(tmp_path: Path) -> None:
    networks.main(["--preset", "latency", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "latency-cpu.json").read_text())["rows"]
    assert set(row["times"]) == {f"{v} {k}" for v in ("static", "CondConv") for k in KINDS} - {"static ONNX matmul"}
    assert all(time["median_ms"] > 0 for time in row["times"].values())
