"""One look for all pictures: light, readable in print, told apart without colour vision.

matplotlib is imported when the first picture is drawn. Figures are made without pyplot, so nothing of its global state
is touched and no display is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1d21"
MUTED = "#5f6b76"
GRID = "#e3e7eb"
PAPER = "#ffffff"
# Okabe and Ito's colours, which people with any colour vision tell apart; yellow is left out: too light on paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
SEQUENTIAL = "cividis"
"""Colour map for amounts; even in lightness and colour-blind safe."""
DIVERGING = "RdBu_r"
"""Colour map for signed values, centred on 0."""

RC: Mapping[str, Any] = {
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.dpi": 110,
    "savefig.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    # Text stays text: small files, searchable, and the same bytes for the same numbers.
    "svg.fonttype": "none",
    "svg.hashsalt": "condconv",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside: matplotlib's settings are ours there, and the caller's again afterwards."""
    import matplotlib

    with matplotlib.rc_context(dict(RC)):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """An empty figure of so many inches; the title says what is seen, the subtitle how to read it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n" if subtitle else title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    if subtitle:
        figure.text(0.01, 1 - 0.36 / height, subtitle, ha="left", va="top", fontsize=9.5, color=MUTED)
    return figure


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `<folder>/<name>.png` and `.svg`; the same numbers give the same files, so they carry no date."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with styled():
        figure.savefig(png, metadata={"Software": None}, pil_kwargs={"optimize": True})
        figure.set_layout_engine("none")  # it stays as it was laid out for the first file
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


def color(position: int) -> str:
    """The colour of the n-th thing in a picture."""
    return COLORS[position % len(COLORS)]


def marker(position: int) -> str:
    """The marker of the n-th thing in a picture: colour is never the only difference."""
    return MARKERS[position % len(MARKERS)]


def plain(text: str) -> str:
    """Text from data and configs, for titles and labels: matplotlib would read dollar signs as mathematics."""
    return text.replace("$", r"\$")


def no_ticks(axes: Axes) -> None:
    """For images and tables: no ticks, no grid."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
