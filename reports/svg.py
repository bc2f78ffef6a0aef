"""Axes and marks of small SVG charts, without a library: text stays text, colours follow the light or dark scheme.

Every mark of group `i` has the class `c<i>`, which sets the CSS variable `--c`; what a mark says when it is pointed at
stands in its `data-tip`. All text is escaped here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
LEGEND_LINE, LONG_LABEL = 20, 28
VIEW_BOX = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')


@dataclass
class Axis:
    """Values to pixels.

    Attributes:
        low, high: of the values; for categories, indices.
        start, end: pixels of low and high.
        log: logarithmic.
        labels: of categories 0, 1, 2, ...; empty for numbers.
        whole: ticks at whole numbers only.
    """

    title: str
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    labels: list[str] = field(default_factory=list)
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of the marks on the axis."""
        if self.labels:
            return [(float(i), label) for i, label in enumerate(self.labels)]
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return [(value, tick_label(value, values)) for value in values if not self.whole or value == int(value)]


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between low and high, about `count`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between low and high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def tick_label(value: float, values: Sequence[float]) -> str:
    """1500000 -> 1.5M; enough digits to tell neighbours apart."""
    largest = max((abs(v) for v in values), default=0.0)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or (largest >= size and size >= 1e6):
            return f"{value / size:.10g}{letter}" if value else "0"
    return f"{value:.10g}".replace("-", "−")


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """(low, high) around the values with some room; around one value, too."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - room, high + room


@dataclass
class Chart:
    """A picture, what it shows in words, and its numbers as a table for those who cannot see it."""

    id: str
    title: str
    caption: str
    svg: Markup
    header: list[str]
    numbers: list[list[str]]
    groups: list[int] = field(default_factory=list)  # of the legend; none where the picture names them itself


def axes(x: tuple[str, float, float], y: tuple[str, float, float], log_x: bool = False) -> tuple[Axis, Axis]:
    """Both axes of a picture of the usual size, each by title and ends."""
    return (
        Axis(*x, LEFT, WIDTH - RIGHT, log=log_x),
        Axis(*y, HEIGHT - BOTTOM, TOP + 14),
    )


class Picture:
    """An SVG under construction: frame, then marks."""

    def __init__(self, label: str, x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.label, self.x, self.y, self.width, self.height = label, x, y, width, height
        self.parts: list[Markup] = []

    def frame(self, grid_x: bool = False) -> None:
        """Grid, tick labels and titles of the axes."""
        left, right = self.x.start, self.x.end
        top, bottom = self.y.end, self.y.start
        for value, label in self.y.ticks():
            at = self.y(value)
            self.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', left, right, at, at)
            self.text(left - 7, at + 4, label, "tick end")
        for value, label in self.x.ticks():
            at = self.x(value)
            if grid_x:
                self.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', at, at, top, bottom)
            self.add('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>', at, at, bottom, bottom + 4)
            self.text(at, bottom + 17, label, "tick mid")
        self.add('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>', left, right, bottom, bottom)
        # A long title of a narrow axis has the whole width.
        middle = (left + right) / 2 if 6.2 * len(self.x.title) < right - left else self.width / 2
        self.text(middle, bottom + 36, self.x.title, "title mid")

    def add(self, template: str, *values: object) -> None:
        """A piece of SVG whose `{}` are filled with escaped values."""
        self.parts.append(Markup(template).format(*values))

    def text(self, x: float, y: float, text: str, classes: str) -> None:
        self.add('<text class="{}" x="{}" y="{}">{}</text>', classes, round(x, 1), round(y, 1), text)

    def dot(self, x: float, y: float, group: int, tip: str, classes: str = "dot", radius: float = 4.5) -> None:
        """A point, at values."""
        template = '<circle class="{} c{}" data-g="{}" data-tip="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>'
        self.add(template, classes, group, group, tip, self.x(x), self.y(y), radius, tip)

    def bar(self, x1: float, y1: float, x2: float, y2: float, group: int, classes: str = "err") -> None:
        """A straight line between two values."""
        places = (self.x(x1), self.y(y1), self.x(x2), self.y(y2))
        self.add('<line class="{} c{}" data-g="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', classes, group, group, *places)

    def line(self, points: Sequence[tuple[float, float]], group: int, tip: str, classes: str = "line") -> None:
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        template = '<polyline class="{} c{}" data-g="{}" data-tip="{}" points="{}"><title>{}</title></polyline>'
        self.add(template, classes, group, group, tip, path, tip)

    def band(self, points: Sequence[tuple[float, float, float]], group: int) -> None:
        """The area between low and high over x."""
        there = [f"{self.x(x)},{self.y(low)}" for x, low, _ in points]
        back = [f"{self.x(x)},{self.y(high)}" for x, _, high in reversed(points)]
        self.add('<polygon class="band c{}" data-g="{}" points="{}"/>', group, group, " ".join(there + back))

    def svg(self) -> Markup:
        """The element, drawn as wide as its place and named for readers of the screen."""
        head = '<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        return (
            Markup(head).format(self.width, self.height, escape(self.label))
            + Markup("").join(self.parts)
            + Markup("</svg>")
        )


def standalone(chart: Chart, css: str, labels: Sequence[str]) -> str:
    """The chart as a file of its own: with its colours, and a legend below where the page has one beside it.

    Args:
        css: style sheet.
        labels: of all groups; those of `chart.groups` are shown.
    """
    svg = str(chart.svg)  # Markup would escape what is put into it
    named = [labels[group] for group in chart.groups]
    columns = 1 if any(len(label) > LONG_LABEL for label in named) else 2
    found = VIEW_BOX.search(svg)
    width, height = map(float, found.groups()) if found else (WIDTH, HEIGHT)
    legend = ""
    for place, (group, label) in enumerate(zip(chart.groups, named, strict=True)):
        x, y = 12 + place % columns * width / columns, height + 10 + place // columns * LEGEND_LINE
        legend += f'<circle class="dot c{group}" cx="{x:g}" cy="{y:g}" r="4.5"/>'
        legend += f'<text x="{x + 10:g}" y="{y + 4:g}">{escape(label)}</text>'
    taller = height + -(-len(named) // columns) * LEGEND_LINE
    svg = VIEW_BOX.sub(f'viewBox="0 0 {width:g} {taller:g}"', svg, count=1)
    return svg.replace(">", f"><style>{css}</style>", 1).replace("</svg>", f"{legend}</svg>")
