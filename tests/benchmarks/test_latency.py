"""The latency table shows each kind in its column, and what could not be measured."""

from __future__ import annotations

from benchmarks.latency import KINDS, render


def test_the_table() -> None:
    times = {f"static {kind}": {"median_ms": 1.0 + i} for i, kind in enumerate(KINDS) if kind != "ONNX matmul"}
    times |= {f"CondConv {kind}": {"median_ms": 10.0 + i} for i, kind in enumerate(KINDS)}
    row = {"id": "a", "origin": 0, "backbone": "resnet18", "experts": 8, "image_size": 224, "times": times}
    text = render([row, {"id": "b-e8-224px", "origin": 0, "error": "out of memory"}])
    assert "| resnet18, 224 px | static | 1.0 | 2.0 | 3.0 | - | 5.0 |" in text
    assert "| resnet18, 224 px | CondConv, 8 experts | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 |" in text
    assert "| b-e8-224px | out of memory |" in text
