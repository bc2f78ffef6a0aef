"""Contact sheets: the images that activate an expert most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.routing.findings import Findings
from reports.style import MUTED, new_figure, no_ticks, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def top_images(found: Findings, layer: str) -> Figure:
    """One row for each chosen expert of the layer: its images, the largest weight first, with class and weight."""
    router, experts = found.router(layer), found.experts[layer]
    columns = router.top_indices.shape[1]
    figure = new_figure(
        1.0 + 1.05 * columns,
        1.15 + 1.32 * len(experts),
        f"Images that activate experts of {plain(layer)} most",
        "above each image: its class; below: the expert's routing weight",
    )
    grid = figure.subplots(len(experts), columns, squeeze=False)
    for row, expert in zip(grid, experts, strict=True):
        for axes, index, weight in zip(
            row, router.top_indices[expert].tolist(), router.top_weights[expert].tolist(), strict=True
        ):
            no_ticks(axes)
            for spine in axes.spines.values():
                spine.set_visible(False)
            picture = found.survey.thumbnails.get(index)
            if picture is None:
                continue
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            name = found.class_name(found.survey.labels[index])
            short = plain(name if len(name) < 14 else f"{name[:12]}…")
            axes.set_title(short, fontsize=8, fontweight="normal", loc="center", pad=2)
            axes.set_xlabel(f"{weight:.3f}", fontsize=8, color=MUTED, labelpad=2)
        row[0].set_ylabel(f"expert {expert}", fontsize=9)
    return figure
