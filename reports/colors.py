"""Colours of the groups, for light and dark pages: grey for static networks, a ramp where experts alone vary."""

from __future__ import annotations

from collections.abc import Sequence

from reports.groups import EXPERTS, Group, identity

STATIC = ("#5f6b76", "#aab4be")
# Told apart by people of any colour vision (after Okabe and Ito), at a contrast of 3:1 with the page.
DISTINCT_LIGHT = ("#0072b2", "#c44e00", "#00805d", "#b0558c", "#9a6a00", "#2f8fc4", "#6b4c9a", "#a33b3b")
DISTINCT_DARK = ("#56b4e9", "#f08a4b", "#2fc79c", "#e39ac6", "#e6b422", "#9ad1f5", "#b79be8", "#ee8a8a")
# From few experts to many: lightness and hue both move one way.
RAMP_LIGHT = ("#c98a00", "#8f9a1e", "#2f9162", "#0f7f8c", "#2a5fa8", "#4b2f8f", "#5b0f5f")
RAMP_DARK = ("#8f86ff", "#5c9dff", "#35b5d0", "#35c48d", "#9ad14b", "#e5d13a", "#fff2a0")


def colors(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(light, dark) for each group."""
    dynamic = [group for group in groups if not group.is_static]
    if all(list(group.columns) == [EXPERTS] for group in groups):
        places = {id(group): i / max(len(dynamic) - 1, 1) for i, group in enumerate(dynamic)}
        ramps = (RAMP_LIGHT, RAMP_DARK)
        return [STATIC if g.is_static else (_at(ramps[0], places[id(g)]), _at(ramps[1], places[id(g)])) for g in groups]
    # A hue for what groups share besides the experts; paler for fewer experts.
    rows: dict[str, list[Group]] = {}
    for group in groups:
        others = {key: group.settings.get(key) for key in group.columns if key != EXPERTS}
        rows.setdefault(identity(others), []).append(group)
    found = {}
    for index, members in enumerate(rows.values()):
        hues = (DISTINCT_LIGHT[index % len(DISTINCT_LIGHT)], DISTINCT_DARK[index % len(DISTINCT_DARK)])
        for place, group in enumerate(members):
            paler = 0.5 * (1 - place / (len(members) - 1)) if len(members) > 1 else 0.0
            found[id(group)] = (_at((hues[0], STATIC[0]), paler), _at((hues[1], STATIC[1]), paler))
    only = [group for group in groups if group.is_static]
    return [STATIC if [group] == only else found[id(group)] for group in groups]


def _at(ramp: Sequence[str], place: float) -> str:
    """The colour at a place from 0 to 1 of a ramp, between its two neighbours."""
    position = place * (len(ramp) - 1)
    low = min(int(position), len(ramp) - 2)
    parts = zip(_rgb(ramp[low]), _rgb(ramp[low + 1]), strict=True)
    mixed = [round(a + (b - a) * (position - low)) for a, b in parts]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def style(groups: Sequence[Group]) -> str:
    """The CSS that gives each group its colour in both schemes."""
    both = colors(groups)
    light = "".join(f".c{i}{{--c:{pair[0]}}}" for i, pair in enumerate(both))
    dark = "".join(f".c{i}{{--c:{pair[1]}}}" for i, pair in enumerate(both))
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}@media print{{{light}}}"
