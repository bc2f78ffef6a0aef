"""Pictures of a network's routing: by class, by depth, expert by expert; each function draws one figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from reports.routing.findings import Findings
from reports.style import DIVERGING, INK, MUTED, SEQUENTIAL, color, marker, new_figure, no_ticks, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 12
"""More layers than this are numbered on an axis; the tables name them."""


def class_weights(found: Findings) -> Figure:
    """The paper's figure: mean routing weight of each expert for a few classes, with one standard deviation."""
    rows = len(found.layers)
    most = max(found.router(name).num_experts for name in found.layers)
    width = min(15.0, max(7.5, 0.36 * most + 3))
    figure = new_figure(
        width, 1.0 + 2.1 * rows, "Mean routing weight by class", "bars: one standard deviation over the class's images"
    )
    for axes, name in zip(_column(figure, rows), found.layers, strict=True):
        router = found.router(name)
        positions = torch.arange(router.num_experts).numpy()
        for place, label in enumerate(found.classes):
            assert router.classes is not None
            shift = (place - (len(found.classes) - 1) / 2) * 0.8 / max(len(found.classes), 1)
            axes.errorbar(
                positions + shift,
                router.classes.mean[label].numpy(),
                router.classes.std[label].numpy(),
                fmt=marker(place),
                color=color(place),
                elinewidth=1,
                capsize=2,
                label=plain(found.class_name(label)),
            )
        share = "-" if router.classes is None else _percent(router.classes.between_all)
        axes.set_title(f"{plain(name)}: {share} of variance between classes")
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("routing weight")
        axes.set_xticks(positions[:: math.ceil(len(positions) / 32)])
        axes.set_xlim(-0.6, router.num_experts - 0.4)
    axes.set_xlabel("expert")
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def histograms(found: Findings) -> Figure:
    """Histogram of all routing weights of each layer, with bimodality coefficients."""
    routers = found.survey.routers
    columns = min(4, len(routers))
    rows = math.ceil(len(routers) / columns)
    figure = new_figure(
        max(2.9 * columns, 7.5),
        1.3 + 1.75 * rows,
        "Histogram of routing weights by layer",
        "b: bimodality of all weights, w: within single experts (two values: 1, uniform: 0.56, normal: 0.33)",
    )
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, router in zip(grid.flat, routers, strict=False):
        counts = router.summary.histogram.sum(0)
        bins = len(counts)
        left = (torch.arange(bins) / bins).numpy()
        axes.bar(left, (counts / counts.sum() * bins).numpy(), width=1 / bins, align="edge", color=color(0))
        axes.set_title(plain(router.name), fontsize=9.5)
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        axes.text(
            0.98,
            0.95,
            f"b {_number(router.summary.bimodality)}\nw {_number(router.summary.expert_bimodality)}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=8.5,
            color=MUTED,
        )
    for axes in grid.flat[len(routers) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("routing weight")
    for axes in grid[:, 0]:
        axes.set_ylabel("density")
    return figure


def by_depth(found: Findings) -> Figure:
    """Entropy, between-class share of variance, spread and saturation over the layers."""
    routers = found.survey.routers
    figure = new_figure(9.5, 5.6, "Routing by depth", "layers in the order of execution")
    grid = figure.subplots(2, 2, sharex=True)
    entropy, share, spread, saturated = grid.flat
    _line(entropy, [r.summary.entropy for r in routers], 0, "of single images")
    _line(entropy, [r.summary.mean_entropy for r in routers], 1, "of the mean weights")
    entropy.set_title("Entropy of the weights (1: all experts alike)")
    entropy.legend()
    _line(share, [math.nan if r.classes is None else r.classes.between_all for r in routers], 2)
    share.set_title("Share of variance between classes")
    _line(spread, [float(r.summary.std.mean()) for r in routers], 0)
    spread.set_title("Standard deviation over images, mean of experts")
    _line(saturated, [r.summary.saturation for r in routers], 0, "saturated weights")
    _line(saturated, [r.summary.num_dead / r.num_experts for r in routers], 1, "dead experts")
    saturated.set_title("Saturated weights and dead experts (shares)")
    saturated.legend()
    for axes in (entropy, share, saturated):
        axes.set_ylim(-0.03, 1.05)
    spread.set_ylim(bottom=0)
    for axes in grid[1]:
        _layer_ticks(axes, [router.name for router in routers])
    return figure


def expert_use(found: Findings) -> Figure:
    """Mean weight and spread of every expert of every layer; dead experts crossed out."""
    routers = found.survey.routers
    most = max(router.num_experts for router in routers)
    names = [router.name for router in routers]
    height = 1.6 + max(1.6, 0.24 * len(routers))
    figure = new_figure(11, height, "Use of every expert", "left: how much it weighs; right: how much that varies")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, title in (
        (panels[0], "mean", "Mean routing weight (x: dead)"),
        (panels[1], "std", "Standard deviation over images"),
    ):
        cells = torch.full((len(routers), most), math.nan)
        for row, router in enumerate(routers):
            cells[row, : router.num_experts] = getattr(router.summary, what)
        top = 1.0 if what == "mean" else max(0.05, float(cells.nan_to_num(0).max()))
        image = axes.imshow(cells.numpy(), aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=top, interpolation="nearest")
        figure.colorbar(image, ax=axes, fraction=0.046)
        axes.set_title(title)
        axes.set_xlabel("expert")
        axes.grid(False)
        for row, router in enumerate(routers):
            for expert in router.summary.dead:
                axes.text(expert, row, "x", ha="center", va="center", color="#ffffff", fontsize=9)
    panels[0].set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    return figure


def embedding(found: Findings) -> Figure:
    """The sampled images' routing weights on their two main directions, coloured by class."""
    figure = new_figure(
        4.0 * max(len(found.layers), 2) + 1.6,
        4.6,
        "Routing weights of single images, on their two main directions (PCA)",
        f"one dot is one of {len(found.survey.sample)} images",
    )
    labels = found.survey.sample_labels
    shown = found.classes if len(found.class_names) > 10 else tuple(range(len(found.class_names)))
    for axes, name in zip(_row(figure, len(found.layers)), found.layers, strict=True):
        points, shares = principal_components(found.survey.sample_of(name))
        other = ~torch.isin(labels, torch.tensor(shown, dtype=labels.dtype))
        rest = "other" if other.any() else None
        axes.scatter(*points[other].T.numpy(), s=5, color="#c4ccd3", linewidths=0, label=rest)
        for place, label in enumerate(shown):
            chosen = points[labels == label]
            axes.scatter(
                *chosen.T.numpy(), s=14, color=color(place), marker=marker(place + place // 7), linewidths=0,
                alpha=0.75, label=plain(found.class_name(label)),
            )  # fmt: skip
        axes.set_title(plain(name))
        axes.locator_params(nbins=5)
        axes.set_xlabel(f"first direction, {_percent(shares[0])} of variance")
        axes.set_ylabel(f"second, {_percent(shares[1])}")
    figure.axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=1.5)
    return figure


def principal_components(weights: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """`[S, E]` -> coordinates `[S, 2]` on the two directions of largest variance, and their shares of it.

    Signs are fixed (the largest component of a direction is positive), so the same weights give the same picture.
    """
    centred = weights.double() - weights.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)[:, :2]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    points = centred @ directions
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros_like(points)], 1)
    shares = (variances / variances.sum().clamp_min(1e-30)).tolist()
    return points, (shares[0], shares[1] if len(shares) > 1 else 0.0)


def expert_similarity(found: Findings) -> Figure:
    """Cosines between experts by layer, and maps of them for the chosen layers."""
    chosen = [kernel for kernel in found.kernels if any(_belongs(kernel.name, layer) for layer in found.layers)]
    chosen = chosen[:6]
    figure = new_figure(
        11.5, 7.0, "Similarity of the experts of a layer", "cosine between kernels: 1 same, 0 unrelated"
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = top.subplots()
    _line(axes, [kernel.mean_cosine for kernel in found.kernels], 0)
    axes.set_title("Mean cosine over pairs of experts, by layer")
    _layer_ticks(axes, [kernel.name for kernel in found.kernels])
    panels = bottom.subplots(1, len(chosen), squeeze=False)[0]
    for panel, kernel in zip(panels, chosen, strict=True):
        image = panel.imshow(kernel.cosine.numpy(), cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        panel.set_title(plain(kernel.name), fontsize=8.5)
        no_ticks(panel)
    bottom.colorbar(image, ax=panels, fraction=0.02, label="cosine")
    return figure


def router_similarity(found: Findings) -> Figure:
    """Which layers decide alike (left), and how alike the rows of a router are (right)."""
    routers = found.survey.routers
    names = [plain(router.name) for router in routers]
    side = max(4.2, 0.22 * len(routers) + 1.6)
    figure = new_figure(side + 6.6, side + 0.9, "Similarity of routers")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    image = left.imshow(found.depths.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    left.set_title("Do two layers sort the images alike? (CKA)")
    left.grid(False)
    left.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=left, fraction=0.046)
    _line(right, [router.mean_cosine for router in found.routers], 0)
    right.set_ylim(-1.05, 1.05)
    right.set_title("Mean cosine between the rows of a router")
    _layer_ticks(right, [router.name for router in found.routers])
    return figure


def _column(figure: Figure, rows: int) -> list[Axes]:
    return list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _row(figure: Figure, columns: int) -> list[Axes]:
    return list(figure.subplots(1, columns, squeeze=False)[0])


def _line(axes: Axes, values: list[float], place: int, label: str | None = None) -> None:
    axes.plot(range(len(values)), values, color=color(place), marker=marker(place), label=label)


def _layer_ticks(axes: Axes, names: list[str]) -> None:
    """Names of layers on the horizontal axis, as many as can be read."""
    step = math.ceil(len(names) / (2 * MOST_NAMES))
    shown = range(0, len(names), step)
    axes.set_xticks(list(shown), [plain(names[i]) for i in shown], rotation=45, ha="right", fontsize=8, color=INK)


def _belongs(layer: str, router: str) -> bool:
    return layer == router or layer.startswith(f"{router}.")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
