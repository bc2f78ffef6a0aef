"""The benchmark of layers times what is right, and nothing else."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layers, timing
from benchmarks.bounds import Rates, bound_ms, least_bytes, least_madds
from benchmarks.layers import Shape
from condconv.ops.registry import BACKENDS
from condconv.ops.spec import ConvSpec, Problem

SMALL = Problem(
    batch=3,
    in_channels=6,
    size_HW=(5, 5),
    out_channels=4,
    kernel_RS=(3, 3),
    experts=2,
    spec=ConvSpec(padding=(1, 1)),
    dtype=torch.float32,
    weight_dtype=torch.float32,
    device="cpu",
    channels_last=True,
    training=True,
)


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape, *options: str) -> dict[str, Any]:
    """The one row of a run over this shape."""
    monkeypatch.setattr(layers, "shapes_of", lambda *arguments: {shape: 2})
    monkeypatch.setattr(layers, "BUDGET_S", {True: 0.001})
    layers.main(["--quick", "--device", "cpu", "--modes", "training", "--output", str(folder), *options])
    row: dict[str, Any] = json.loads((folder / "layers-cpu.json").read_text())["rows"][0]
    return row


def test_a_table_with_a_time_for_every_backend_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(tmp_path, monkeypatch, Shape(SMALL, linear=False))
    can = {name for name, backend in BACKENDS.items() if backend.supports(SMALL) is None}
    assert set(row["times"]) == can | {"static", "timm", "loop"}
    assert all(error < 1e-4 for error in row["errors"].values())
    text = (tmp_path / "layers-cpu.md").read_text()
    assert "| 6 -> 4 3x3 on 5x5 |" in text
    assert "efficientnet_b0" in text
    assert [path.stat().st_size < 100_000 for path in tmp_path.glob("*.svg")] == [True]


def test_processor_time_is_of_one_thread_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(timing, "_clock", timing._clock)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    measured(tmp_path, monkeypatch, Shape(SMALL, linear=False), "--processor-time")
    assert threads == [1]
    assert timing._clock is time.process_time
    assert "- clock: processor time" in (tmp_path / "layers-cpu.md").read_text()
    with pytest.raises(SystemExit):
        layers.parse(["--processor-time", "--device", "cuda"])


def test_a_linear_layer_is_measured_beside_a_linear_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = replace(SMALL, size_HW=(1, 1), kernel_RS=(1, 1), spec=ConvSpec(), channels_last=False)
    row = measured(tmp_path, monkeypatch, Shape(linear, linear=True))
    assert row["shape"] == "6 -> 4 linear"
    assert {"static", "timm", "mixture"} <= set(row["times"])


@pytest.mark.parametrize("wrong_half", ["forward", "backward"])
def test_a_wrong_backend_is_not_timed(wrong_half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["mixture"]

    def wrong(*arguments: Any) -> Any:
        result = getattr(right, wrong_half)(*arguments)
        return 1.01 * result if wrong_half == "forward" else (*result[:2], 1.01 * result[2])

    monkeypatch.setitem(BACKENDS, "mixture", right._replace(**{wrong_half: wrong}))
    row = measured(tmp_path, monkeypatch, Shape(SMALL, linear=False))
    assert "mixture" not in row["times"]
    assert f"gate failed: {'y' if wrong_half == 'forward' else 'dweight'}" in row["notes"]["mixture"]
    assert "gemm" in row["times"], "the others go on"
    assert "gate failed" in (tmp_path / "layers-cpu.md").read_text()


def test_examples_that_exchange_their_kernels_are_caught() -> None:
    shape = Shape(SMALL, linear=False)
    inputs = layers.inputs_of(SMALL)
    right = layers.conditional(shape, "gemm")
    oracle = layers.oracle_of(shape, inputs)
    assert layers.gate(SMALL, right, inputs, oracle) < 1e-4
    with pytest.raises(RuntimeError, match="gate failed"):
        layers.gate(SMALL, lambda x, routing, weight: right(x, routing.roll(1, 0), weight), inputs, oracle)


def test_every_distinct_layer_of_a_network_is_found() -> None:
    shapes = layers.shapes_of("mobilenet_v2", image_size=32, experts=2)
    assert sum(shapes.values()) == 19  # six blocks of three convolutions, and the classifier
    assert sum(count for shape, count in shapes.items() if shape.linear) == 1
    assert all(shape.problem.experts == 2 for shape in shapes)


def test_bounds_counted_by_hand() -> None:
    pointwise = Problem(
        2, 8, (4, 4), 16, (1, 1), 4, ConvSpec(), torch.float32, torch.float32, "cpu", channels_last=True, training=False
    )
    assert least_bytes(pointwise) == 4 * (2 * 8 * 16 + 2 * 16 * 16 + 4 * 8 * 16)  # x, y, experts
    assert least_madds(pointwise) == 2 * 8 * 16 * (4 + 16)  # mix 4 experts, then 16 positions
    one_position = replace(pointwise, size_HW=(1, 1), training=True)
    assert least_madds(one_position) == 2 * 8 * 16 * 3 * 4  # run all 4 experts: forward and two products back
    rates = Rates(copy_bytes_per_s=1e9, madds_per_s={"torch.float32": 1e7})
    assert bound_ms(pointwise, rates) == pytest.approx(5120 / 1e4)


def test_rows_that_are_added_are_judged_by_the_same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[torch.dtype]] = []

    def measured(device: str, dtypes: list[torch.dtype]) -> Rates:
        asked.append(dtypes)
        return Rates(float(len(asked)), {str(dtype): float(len(asked)) for dtype in dtypes})

    monkeypatch.setattr(layers, "measure_rates", measured)
    first = layers.completed_rates(None, "cpu", ["float32"])
    assert layers.completed_rates(first, "cpu", ["float32"]) == first
    both = layers.completed_rates(first, "cpu", ["float32", "bfloat16"])
    assert asked == [[torch.float32], [torch.bfloat16]]
    assert both == {"copy_bytes_per_s": 1.0, "madds_per_s": {"torch.float32": 1.0, "torch.bfloat16": 2.0}}
