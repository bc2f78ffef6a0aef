"""One look for all pictures: settings that end with the drawing, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import Image

from reports.style import color, marker, new_figure, plain, save, styled


def draw(folder: Path) -> tuple[Path, Path]:
    with styled():
        figure = new_figure(3, 2, "A title", "how to read it")
        figure.subplots().plot([0, 1], [0, 1], color=color(0), marker=marker(0), label=plain("$class$"))
        return save(figure, folder, "line")


def test_pictures_are_reproducible_and_settings_are_put_back(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert Image.open(first[0]).size == (330, 220)
    assert "A title" in first[1].read_text(encoding="utf-8")


def test_neighbours_differ_in_colour_and_marker() -> None:
    assert all(color(i) != color(i + 1) and marker(i) != marker(i + 1) for i in range(20))
