"""Bars of time over the static network or layer, one group for each backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw `groups` {backbone: {series: ratio}} as an SVG; the dashed line is the static one, the scale logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "condconv", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(max(5.0, 1.1 * len(groups)), 3.2), layout="constrained")
        width = 0.8 / max(1, len(series))
        for index, name in enumerate(series):
            places = [i for i, values in enumerate(groups.values()) if name in values]
            heights = [values[name] for values in groups.values() if name in values]
            offset = (index - (len(series) - 1) / 2) * width
            drawn = axes.bar([place + offset for place in places], heights, width, label=name)
            axes.bar_label(drawn, fmt="%.2g", fontsize=6)
        axes.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
        axes.set_ylabel("time / static")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, ncols=min(4, max(1, len(series))))
        # Without a date the same figures give the same file.
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
