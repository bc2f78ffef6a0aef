"""Variants that depend on the network; networks of equal cost against a search by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from condconv.complexity import Complexity, complexity
from models import create_model, list_backbones
from sweeps.generators import count, depth, iso, match, placements
from train import register_resolvers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
register_resolvers()


def config(*overrides: str) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=["model=mobilenet_v1", "model.width=0.25", *overrides])


FAST = ("mobilenet_v1", "resnet18")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in list_backbones()]
)
def test_depths_and_placements_are_possible_for_every_backbone(name: str) -> None:
    cfg = config(f"model={name}", "model.width=1.0")
    variants = depth(cfg)
    assert variants[0] == ["condconv.from_block=1"] and variants[-1] == ["condconv.placement=classifier"]
    assert len(variants) >= 6 and len({tuple(v) for v in variants}) == len(variants)
    cheapest = None
    for (override,) in [*variants, *placements(cfg)]:
        key, _, value = override.partition("=")
        counted = count(cfg, **{key.removeprefix("condconv."): int(value) if value.isdigit() else value})
        assert counted.params > counted.static_params, override
        if "from_block" in override:  # a later start costs less
            assert cheapest is None or counted.params < cheapest
            cheapest = counted.params


@cache
def widths_by_hand() -> list[Complexity]:
    return [complexity(create_model("mobilenet_v1", 10, experts=0, width=width / 50), 32) for width in range(14, 36)]


@pytest.mark.parametrize("what", ["madds", "params"])
def test_the_nearest_width_is_found(what: str) -> None:
    """Against trying every width: channels are multiples of 8, so many widths are the same network."""
    cfg = config("condconv.experts=4")
    wanted = getattr(count(cfg), what)
    found = match(cfg, "width", what, wanted)
    assert found is not None
    width, counted = found
    best = min(abs(getattr(each, what) - wanted) for each in widths_by_hand())
    assert abs(getattr(counted, what) - wanted) <= best
    built = complexity(create_model("mobilenet_v1", 10, experts=0, width=width), 32)
    assert (built.params, built.madds) == (counted.params, counted.madds), "as train.py will build it"


def test_equal_networks_are_listed_once_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    # One expert: the same size as the static twin but for one router, so hardly anything wider or deeper is nearer.
    variants = iso(config("condconv.experts=1", "condconv.placement=classifier"))
    assert variants == [["condconv.experts=1"], ["condconv.experts=0"], ["condconv.experts=0", "model.width=0.254"]]
    out = capsys.readouterr().out
    assert out.count("left out") == 3 and "CondConv (1 experts)" in out


def test_a_network_without_multiplier_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    variants = iso(config("model=mnasnet_a1", "model.width=1.0", "condconv.experts=2"))
    assert [override.partition("=")[0] for variant in variants for override in variant[1:]] == ["model.width"] * 2
    assert "mnasnet_a1 cannot be scaled that way" in capsys.readouterr().out
