"""Draws docs/figures/idea.svg: a static convolution beside CondConv, on three real digits.

What is drawn is computed: mixed kernels and outputs follow from the experts and routing weights shown beside them. Only
those two (oriented edge filters, three rows of numbers) are chosen by hand, for a clear picture; a network learns both.

Usage: make docs, or to look at it: python docs/figures/make_idea.py idea.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate, pad

from condconv import condconv2d

HERE = Path(__file__).resolve().parent
INK, MUTED, CARD, PANEL, LINE = "#1f2933", "#5f6c78", "#ffffff", "#f2f4f7", "#9aa5b1"
EXPERT_COLOURS = ("#2f6db3", "#d9822b", "#3d9970", "#a8467f")
DIGITS = (1, 7, 22)  # rows of scikit-learn's table
ROUTING_NE = torch.tensor([[0.92, 0.06, 0.30, 0.12], [0.12, 0.90, 0.55, 0.08], [0.30, 0.10, 0.05, 0.93]])
ROWS_Y = (2.92, 1.72, 0.52)  # lower edges of the three examples' rows, in inches
TILE = 0.92  # side of a picture, in inches


def oriented_filters() -> torch.Tensor:
    """Four 5x5 edge filters, 45 degrees apart: the derivative of a Gaussian along each direction, [E, 1, 1, 5, 5]."""
    axis = torch.arange(-2.0, 3.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = torch.arange(4) * torch.pi / 4
    along = torch.cos(angles)[:, None, None] * x + torch.sin(angles)[:, None, None] * y
    kernels = along * torch.exp(-(x**2 + y**2) / 3.0)
    return (kernels / kernels.abs().sum((1, 2), keepdim=True))[:, None, None]


def examples() -> torch.Tensor:
    """Three handwritten digits, 8x8 pixels enlarged to 32x32 with an empty margin of 4 pixels, [3, 1, 40, 40]."""
    images = torch.tensor(load_digits().images[list(DIGITS)], dtype=torch.float32)[:, None] / 16
    return pad(interpolate(images, size=(32, 32), mode="bicubic").clamp(0, 1), (4, 4, 4, 4))


class Canvas:
    """A figure measured in inches from its lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure: Figure = plt.figure(figsize=(width, height))
        self.back = self.figure.add_axes((0, 0, 1, 1))
        self.back.set(xlim=(0, width), ylim=(0, height))
        self.back.axis("off")

    def panel(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        style = "round,pad=0,rounding_size=0.12"
        self.back.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none"))

    def text(self, x: float, y: float, text: str, size: float = 10, colour: str = INK, **options: str) -> None:
        self.back.text(x, y, text, fontsize=size, color=colour, va="center", **{"ha": "center", **options})

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": LINE, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        self.back.add_patch(FancyArrowPatch(start, end, **style))

    def picture(self, x: float, y: float, image: torch.Tensor, side: float, cmap: str, frame: str = LINE) -> None:
        """One image; colour maps that diverge are centred on zero."""
        axes = self.figure.add_axes((x / self.width, y / self.height, side / self.width, side / self.height))
        limit = float(image.abs().max())
        axes.imshow(
            image.numpy(), cmap=cmap, vmin=0 if cmap == "Greys" else -limit, vmax=limit, interpolation="nearest"
        )
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=1.0 if frame == LINE else 2.2)

    def bars(self, x: float, y: float, values: torch.Tensor) -> None:
        """One example's routing weights, each bar in its expert's colour."""
        width = 0.98
        axes = self.figure.add_axes((x / self.width, y / self.height, width / self.width, TILE / self.height))
        axes.bar(range(len(values)), values.tolist(), color=EXPERT_COLOURS, width=0.74)
        for position, value in enumerate(values.tolist()):
            axes.text(position, value + 0.03, f"{value:.1f}", ha="center", fontsize=7, color=MUTED)
        axes.set(ylim=(0, 1.14), xlim=(-0.6, 3.6), xticks=[], yticks=[], facecolor="none")
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set(color=LINE)


def draw_static(canvas: Canvas, x_NCHW: torch.Tensor, kernel: torch.Tensor, y_NKPQ: torch.Tensor) -> None:
    """Left panel: three inputs, one kernel, three outputs."""
    canvas.panel(0.15, 0.15, 4.15, 5.3, PANEL)
    canvas.text(2.22, 5.12, "Static convolution", 13, weight="bold")
    canvas.text(2.22, 4.76, r"$y = W * x$", 13)
    canvas.text(2.22, 4.38, "one kernel for every example", 9.5, MUTED)
    for x, label in ((0.86, "input"), (2.24, "kernel"), (3.58, "output")):
        canvas.text(x, ROWS_Y[0] + TILE + 0.14, label, 8.5, MUTED)
    for row, y in enumerate(ROWS_Y):
        canvas.picture(0.4, y, x_NCHW[row, 0], TILE, "Greys")
        canvas.picture(3.12, y, y_NKPQ[row, 0], TILE, "RdBu_r")
        middle = y + TILE / 2
        canvas.arrow((1.42, middle), (1.72, ROWS_Y[1] + TILE / 2 + 0.2 * (1 - row)))
        canvas.arrow((2.74, ROWS_Y[1] + TILE / 2 + 0.2 * (1 - row)), (3.06, middle))
    canvas.picture(1.78, ROWS_Y[1], kernel[0, 0], TILE, "PuOr_r")
    canvas.text(2.24, ROWS_Y[1] + TILE + 0.16, "$W$", 11)


def draw_condconv(canvas: Canvas, x_NCHW: torch.Tensor, weight_EKCRS: torch.Tensor, y_NKPQ: torch.Tensor) -> None:
    """Right panel: experts on top; per example its routing weights, its own kernel, its output."""
    left = 4.5
    canvas.panel(left, 0.15, 6.65, 5.3, PANEL)
    canvas.text(left + 0.25, 5.12, "CondConv", 13, weight="bold", ha="left")
    canvas.text(left + 1.42, 5.11, "one kernel per example", 9.5, MUTED, ha="left")
    mixing = r"$y_n = (\alpha_{n1} W_1 + \ldots + \alpha_{nE} W_E) * x_n$"
    routing = r"$\alpha_n = \mathrm{sigmoid}(\mathrm{pool}(x_n)\, R)$"
    canvas.text(left + 0.25, 4.76, mixing, 13, ha="left")
    canvas.text(left + 0.25, 4.39, routing, 12, ha="left")
    for expert, colour in enumerate(EXPERT_COLOURS):
        x = left + 3.98 + expert * 0.62
        canvas.picture(x, 4.44, weight_EKCRS[expert, 0, 0], 0.5, "PuOr_r", frame=colour)
        canvas.text(x + 0.25, 5.06, f"$W_{expert + 1}$", 10, colour)
    canvas.text(left + 5.16, 5.27, "experts, shared by all examples", 8.5, MUTED)
    mixed = torch.einsum("ne,ekcrs->nkcrs", ROUTING_NE, weight_EKCRS)
    for row, y in enumerate(ROWS_Y):
        middle = y + TILE / 2
        canvas.picture(left + 0.25, y, x_NCHW[row, 0], TILE, "Greys")
        canvas.arrow((left + 1.24, middle), (left + 1.56, middle))
        canvas.bars(left + 1.62, y, ROUTING_NE[row])
        canvas.arrow((left + 2.68, middle), (left + 3.34, middle))
        canvas.picture(left + 3.42, y, mixed[row, 0, 0], TILE, "PuOr_r")
        canvas.arrow((left + 4.42, middle), (left + 5.3, middle))
        canvas.text(left + 4.84, middle + 0.16, f"$*\\;x_{row + 1}$", 10, MUTED)
        canvas.picture(left + 5.42, y, y_NKPQ[row, 0], TILE, "RdBu_r")
    for x, label in ((0.71, "input"), (2.1, "routing weights"), (3.88, "mixed kernel"), (5.88, "output")):
        canvas.text(left + x, ROWS_Y[0] + TILE + 0.14, label, 8.5, MUTED)


def main(path: Path) -> None:
    """Computes both outputs with the library and writes the picture in the format that the path's suffix names."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "cm", "svg.hashsalt": "condconv"})
    x_NCHW, weight_EKCRS = examples(), oriented_filters()
    static_kernel = weight_EKCRS[0]
    y_static = torch.nn.functional.conv2d(x_NCHW, static_kernel, padding="same")
    y_NKPQ = condconv2d(x_NCHW, ROUTING_NE, weight_EKCRS, padding="same", backend="reference")
    canvas = Canvas(11.3, 5.6)
    canvas.panel(0, 0, canvas.width, canvas.height, CARD)
    draw_static(canvas, x_NCHW, static_kernel, y_static)
    draw_condconv(canvas, x_NCHW, weight_EKCRS, y_NKPQ)
    # Without the date the file is the same whenever it is drawn.
    canvas.figure.savefig(path, transparent=True, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "idea.svg")
