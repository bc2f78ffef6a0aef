"""Axes, ticks and what the charts of a report draw."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from run_folders import write_run, write_sweep

from reports.charts import LABEL, _beside, charts_of
from reports.colors import colors
from reports.comparison import Metric, compare
from reports.curves import mean_curve
from reports.runs import find_folders, read_run
from reports.svg import Axis, Chart, linear_ticks, log_ticks, padded, tick_label


def charts(root: Path) -> dict[str, Chart]:
    found = charts_of(compare([read_run(folder) for folder in find_folders([root])]))
    return {chart.id: chart for chart in found}


def test_ticks_lie_inside_and_read_differently() -> None:
    draw = random.Random(1)
    for _ in range(300):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-4, 9)
        high = low + abs(low or 1) * 10 ** draw.uniform(-3, 2)
        ticks = linear_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and low <= ticks[0] + 1e-9 * abs(low) and ticks[-1] <= high + 1e-9 * abs(high)
        assert len({tick_label(tick, ticks) for tick in ticks}) == len(ticks)


def test_ticks_by_hand() -> None:
    assert linear_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(150_000, 3_000_000) == [200_000, 500_000, 1_000_000, 2_000_000]
    assert [tick_label(value, [5e5, 1e6, 2e6]) for value in (5e5, 1e6, 2e6)] == ["0.5M", "1M", "2M"]
    assert tick_label(-2.5, [-2.5]) == "−2.5"
    assert padded([3.0]) == (2.85, 3.15) and padded([0.0]) == (-1.0, 1.0)


def test_axes_place_values() -> None:
    linear, log = Axis("", 0, 10, 50, 150), Axis("", 1, 100, 0, 100, log=True)
    assert [linear(value) for value in (0, 5, 10)] == [50, 100, 150]
    assert [log(value) for value in (1, 10, 100)] == [0, 50, 100]
    assert Axis("", 0.6, 3.4, 0, 1, whole=True).ticks() == [(1.0, "1"), (2.0, "2"), (3.0, "3")]


def test_a_sweep_has_all_charts_with_every_group(tmp_path: Path) -> None:
    write_sweep(tmp_path, experts=(0, 1, 8), seeds=(1, 2))
    found = charts(tmp_path)
    assert list(found) == [
        *("effects", "experts", "madds", "params"),
        *("curve-train-top1", "curve-val-top1", "curve-train-loss", "curve-val-loss"),
        *("seconds-per-epoch", "peak-memory-mb"),
    ]
    for name, chart in found.items():
        groups = {"1", "2"} if name == "effects" else {"0", "1", "2"}
        assert set(re.findall(r'data-g="(\d+)"', chart.svg)) == groups, name
        assert len(chart.numbers) == len(groups) and {len(line) for line in chart.numbers} == {len(chart.header)}
        assert not re.search(r"nan|inf|None", chart.svg), name


def test_groups_without_experts_to_compare_show_their_means(tmp_path: Path) -> None:
    for lr in (0.001, 0.01):
        write_run(tmp_path, 0, 1, overrides={"optim.lr": lr})
    found = charts(tmp_path)
    assert "means" in found and "effects" not in found and "experts" not in found
    assert [line[0] for line in found["means"].numbers] == ["lr 0.001", "lr 0.01"]


def test_labels_beside_pictures_are_short_and_tell_groups_apart() -> None:
    causes = (
        "init independent",
        "init network",
        "init network, lr_factor_by_role.expert 0.5",
        "init network, router 0",
    )
    for labels in (
        [f"8 experts, router gain 1, init {each}" for each in causes],
        ["static", *(f"{n} experts, routing hidden_medium" for n in (8, 16))],
        [f"8 experts, {'very ' * 9}long {n}" for n in (1, 2)],
    ):
        beside = _beside(labels)
        assert len({*beside.values()}) == len(labels) and max(map(len, beside.values())) <= LABEL, beside
    assert _beside(["static", "8 experts"]) == {"static": "static", "8 experts": "8 experts"}
    whole = "8 experts, router gain 0, init network, router 0"
    assert _beside(["static", whole])[whole] == "8 experts … router 0"


def test_mean_curves_are_of_all_runs_or_not_drawn() -> None:
    metric = Metric("val/top1")
    curves = [[(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)], [(1.0, 0.3), (2.0, 0.2)], []]
    assert mean_curve(curves, metric) == [(1.0, 10.0, pytest.approx(20.0), 30.0), (2.0, 20.0, 20.0, 20.0)]
    for length in (150, 151, 300, 350, 10_000):
        points = mean_curve([[(float(x), 0.5) for x in range(length)]], metric)
        assert len(points) <= 150 and (points[0][0], points[-1][0]) == (0, length - 1)


def test_groups_of_one_picture_have_colours_of_their_own(tmp_path: Path) -> None:
    write_sweep(tmp_path, experts=(0, 1, 2, 4, 8, 16, 32), seeds=(1,))
    for width in (0.5, 1.0):
        write_run(tmp_path, 8, 1, overrides={"model.width": width})
    rows = compare([read_run(folder) for folder in find_folders([tmp_path])]).rows
    pairs = colors([row.group for row in rows])
    assert len(set(pairs)) == len(rows) == 9
