"""Pictures of what routing and experts are worth: changes of the accuracy with their 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from condconv.ablation import MEAN, REMOVED, SHUFFLED, TOP, AblationResult
from reports.routing.findings import Findings
from reports.style import INK, MUTED, SEQUENTIAL, color, marker, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _chosen(found: Findings, *kinds: str, everywhere: bool) -> list[AblationResult]:
    return [
        result
        for result in found.ablations
        if result.ablation is not None
        and result.ablation.kind in kinds
        and (result.ablation.layer is None) == everywhere
    ]


def everywhere(found: Findings) -> Figure:
    """Changes in all layers at once: shuffled and mean routing, the top experts only, each expert removed."""
    results = _chosen(found, SHUFFLED, MEAN, TOP, REMOVED, everywhere=True)
    base = found.ablations[0]
    figure = new_figure(
        8.5,
        1.5 + 0.3 * len(results),
        "What routing and experts are worth: changes in all layers at once",
        f"undisturbed: {100 * base.accuracy:.1f} % of {base.num_examples} images right; bars: 95 % intervals",
    )
    axes = figure.subplots()
    for row, result in enumerate(results):
        axes.errorbar(
            100 * result.difference,
            row,
            xerr=100 * result.interval,
            fmt=marker(_place(result)),
            color=color(_place(result)),
            capsize=3,
        )
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel("change of top-1 accuracy in points")
    return figure


def _place(result: AblationResult) -> int:
    assert result.ablation is not None
    return [SHUFFLED, MEAN, TOP, REMOVED].index(result.ablation.kind)


def layer_by_layer(found: Findings) -> Figure:
    """Shuffled and mean routing in one layer at a time: where does routing by image matter?"""
    figure = new_figure(
        9.5, 4.6, "Routing changed in one layer at a time", "change of top-1 accuracy, with 95 % intervals"
    )
    axes = figure.subplots()
    layers: list[str] = []
    for place, kind in enumerate((SHUFFLED, MEAN)):
        results = _chosen(found, kind, everywhere=False)
        layers = [str(result.ablation.layer) for result in results if result.ablation is not None]
        axes.errorbar(
            [row + 0.12 * (2 * place - 1) for row in range(len(results))],
            [100 * result.difference for result in results],
            [100 * result.interval for result in results],
            fmt=f"{marker(place)}-",
            color=color(place),
            capsize=3,
            label=f"{kind} routing",
        )
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xticks(range(len(layers)), [plain(layer) for layer in layers], rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("points")
    axes.legend()
    return figure


def removed_experts(found: Findings) -> Figure:
    """The drop when a single expert of a single layer is removed."""
    results = _chosen(found, REMOVED, everywhere=False)
    layers = list(dict.fromkeys(str(result.ablation.layer) for result in results if result.ablation is not None))
    most = max(result.ablation.expert for result in results if result.ablation is not None) + 1
    cells = torch.full((len(layers), most), torch.nan)
    for result in results:
        assert result.ablation is not None
        cells[layers.index(str(result.ablation.layer)), result.ablation.expert] = -100 * result.difference
    figure = new_figure(
        max(7.5, 0.62 * most + 3.5),
        1.7 + 0.5 * len(layers),
        "What single experts are worth",
        "drop of top-1 accuracy in points without the expert (its weight set to 0, in this layer alone)",
    )
    axes = figure.subplots()
    lowest, limit = min(0.0, float(cells.nan_to_num(0).min())), max(float(cells.nan_to_num(0).max()), 1.0)
    image = axes.imshow(cells.numpy(), cmap=SEQUENTIAL, vmin=lowest, vmax=limit, aspect="auto")
    for row in range(len(layers)):
        for expert in range(most):
            value = float(cells[row, expert]) + 0.0  # no "-0.0"
            if value == value and most <= 16:
                axes.text(
                    expert, row, f"{value:.1f}", ha="center", va="center", fontsize=8.5,
                    color="#ffffff" if value < 0.6 * limit else INK,
                )  # fmt: skip
    axes.set_yticks(range(len(layers)), [plain(layer) for layer in layers])
    axes.set_xticks(range(0, most, max(1, most // 16)))
    axes.set_xlabel("expert")
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.03)
    return figure
