"""Variants of a sweep that depend on the network: numbers of blocks, names of placements, networks of equal cost.

Each generator takes the composed config of one of the sweep's jobs, so it follows `model=`, `data=` and everything else
on the command line, and returns lists of overrides. Networks are built without memory for weights (meta device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from condconv.complexity import Complexity, complexity
from configs.messages import UserError
from models import list_placements

# Multipliers that are tried; more than this would not be a fair twin any more.
MULTIPLIERS = (0.1, 20.0)
# Finer than channels and blocks can follow, and they read well.
DECIMALS = {"width": 3, "depth": 2}


def depth(cfg: DictConfig) -> list[list[str]]:
    """The paper's question where CondConv pays: from block k to the end, the last k blocks, the classifier alone."""
    blocks = len(build(cfg, experts=1, from_block=1, last_blocks=None, placement=None).conversion.units)
    blocks -= 1  # the classifier is a unit too
    if blocks < 2:
        raise UserError(f"sweep=depth needs a model with blocks; {cfg.model.name} has {blocks}.")
    first = sorted({1 + round(share * blocks) for share in (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3)})
    last = [k for k in (4, 2, 1) if blocks - k + 1 > first[-1]]
    variants = [[f"condconv.from_block={k}"] for k in first] + [[f"condconv.last_blocks={k}"] for k in last]
    return [*variants, ["condconv.placement=classifier"]]


def placements(cfg: DictConfig) -> list[list[str]]:
    """Every named placement of the model, the paper's first."""
    return [[f"condconv.placement={name}"] for name in list_placements(cfg.model.name)]


def iso(cfg: DictConfig, keys: Sequence[str] = ("width", "depth")) -> list[list[str]]:
    """The CondConv network, and static ones made wider or deeper until they have its MADDs, or its parameters.

    Channels are multiples of 8 and blocks are whole, so equality is as near as the network can come: how near is
    printed. `keys` are the multipliers that are tried. Those that lead to the same network as another are left out.
    """
    target = count(cfg)
    static = count(cfg, experts=0)
    print(f"CondConv ({cfg.condconv.experts} experts): {target.summary()}")
    print(f"static twin: {static.summary()}")
    variants = [[f"condconv.experts={cfg.condconv.experts}"], ["condconv.experts=0"]]
    seen = {(static.params, static.madds)}
    for key in keys:
        for what in ("madds", "params"):
            found = match(cfg, key, what, getattr(target, what))
            if found is None:
                print(f"static, {key} for equal {what}: {cfg.model.name} cannot be scaled that way")
                continue
            multiplier, counted = found
            value = getattr(counted, what)
            words = f"static, model.{key}={multiplier:g} for equal {what}: {counted.summary()}, {what} "
            words += f"{100 * (value / getattr(target, what) - 1):+.1f} % of the CondConv network's"
            if (counted.params, counted.madds) in seen:
                print(f"{words}: the same network as one above, left out")
                continue
            print(words)
            seen.add((counted.params, counted.madds))
            variants.append(["condconv.experts=0", f"model.{key}={multiplier:g}"])
    return variants


def wider(cfg: DictConfig) -> list[list[str]]:
    """Of `iso` the wider static networks alone: for a sweep beside one that has the CondConv network and its twin."""
    found = iso(cfg, ("width",))[2:]
    if not found:
        raise UserError(f"{cfg.model.name} cannot be made wider to the cost of its CondConv network.")
    return found


def match(cfg: DictConfig, key: str, what: str, wanted: int) -> tuple[float, Complexity] | None:
    """The multiplier `key` (width or depth) whose static network's `what` (madds or params) is nearest to `wanted`.

    Returns:
        (multiplier, counts), None if the model has no such multiplier, or none in `MULTIPLIERS` reaches it.
    """
    tried: dict[float, Complexity] = {}
    by_shapes: dict[tuple[torch.Size, ...], Complexity] = {}  # many multipliers round to the same network

    def counted(multiplier: float) -> Complexity:
        if multiplier not in tried:
            net = build(cfg, experts=0, **{f"model.{key}": multiplier})
            shapes = tuple(parameter.shape for parameter in net.parameters())
            if shapes not in by_shapes:
                by_shapes[shapes] = complexity(net, cfg.data.image_size)
            tried[multiplier] = by_shapes[shapes]
        return tried[multiplier]

    low = high = float(OmegaConf.select(cfg, f"model.{key}") or 1.0)
    try:
        while getattr(counted(high), what) < wanted:
            high = round(1.5 * high, DECIMALS[key])
            if high > MULTIPLIERS[1]:
                return None
        while getattr(counted(low), what) > wanted:
            low = round(low / 1.5, DECIMALS[key])
            if low < MULTIPLIERS[0]:
                return None
    except InstantiationException:  # no multiplier for this model
        return None
    while (middle := round((low + high) / 2, DECIMALS[key])) not in tried:
        low, high = (middle, high) if getattr(counted(middle), what) < wanted else (low, middle)
    best = min(tried, key=lambda multiplier: (abs(getattr(tried[multiplier], what) - wanted), multiplier))
    return best, tried[best]


def count(cfg: DictConfig, **changes: Any) -> Complexity:
    """Parameters and MADDs of the config's network with some settings changed."""
    return complexity(build(cfg, **changes), cfg.data.image_size)


def build(cfg: DictConfig, **changes: Any) -> Any:
    """The config's network without weights; changes are of `condconv`, or of `model` by their dotted names."""
    model = dict(instantiate_options(cfg.model))
    condconv = {key: value for key, value in instantiate_options(cfg.condconv).items() if key != "autotune"}
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (model if group == "model" else condconv)[name] = value
    model["num_classes"] = number_of_classes(cfg)
    target: Callable[..., Any] = model.pop("_target_")
    with torch.device("meta"):
        return instantiate({"_target_": target, **model, **condconv}, _convert_="all")


def instantiate_options(node: DictConfig) -> dict[str, Any]:
    """A group of the config as plain values."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def number_of_classes(cfg: DictConfig) -> int:
    """Of the model's config if it says so, else of the data."""
    return int(cfg.model.num_classes or instantiate(cfg.data, _convert_="all").num_classes)
