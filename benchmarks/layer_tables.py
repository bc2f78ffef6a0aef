"""Markdown, terminal lines and sums over networks of the rows of `benchmarks.layers`."""

from __future__ import annotations

from benchmarks.report import Row, origin_mark
from condconv.ops.registry import BACKENDS

LOOP, TIMM, STATIC = "loop", "timm", "static"


def ratio(row: Row, name: str) -> float | None:
    """Time over static of a contender, of "auto" or of the bound; None if it has no time."""
    times = row.get("times", {})
    name = row.get("auto", name) if name == "auto" else name
    if STATIC not in times or (name != "bound" and name not in times):
        return None
    return float((row["bound_ms"] if name == "bound" else times[name]["median_ms"]) / times[STATIC]["median_ms"])


def cell(row: Row, name: str) -> str:
    """A ratio, or in a word why there is none."""
    value = ratio(row, name)
    return f"{value:.2f}" if value is not None else row.get("notes", {}).get(name, "-")


def line(row: Row) -> str:
    """For the terminal."""
    if "error" in row:
        return f"{row['id']}: {row['error']}"
    figures = ", ".join(f"{name} {cell(row, name)}" for name in (*row["times"], *row["notes"]) if name != STATIC)
    static_ms = row["times"].get(STATIC, {}).get("median_ms", float("nan"))
    return f"{row['id']}: static {static_ms:.2f} ms; {figures}; auto = {row['auto']}"


def groups_of(rows: list[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Rows of the same image size, dtype, batch size, experts and mode."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if "shape" in row:
            key = tuple(row[name] for name in ("image_size", "dtype", "batch", "experts", "mode"))
            found.setdefault(key, []).append(row)
    return found


def render(rows: list[Row]) -> str:
    """One table for each group of rows, and what one backbone's layers cost together."""
    lines = [
        "Times over a static layer of the same shape; medians of runs in turns. `-`: not for this backend.",
        '`auto` is what `backend="auto"` takes, `bound` the least time by bytes or operations. Channels last.',
    ]
    for (image_size, dtype, batch, experts, mode), group in groups_of(rows).items():
        names = [
            n for n in (*BACKENDS, TIMM, LOOP) if any(n in r.get("times", {}) or n in r.get("notes", {}) for r in group)
        ]
        lines += ["", f"## {mode}, batch {batch}, {dtype}, {image_size} pixels, {experts} experts", ""]
        lines += [
            f"| layer | static, ms | {' | '.join(names)} | bound | auto |",
            f"|---|---:|{'---:|' * len(names)}---:|---|",
        ]
        for row in group:
            shape = row["shape"] + origin_mark(rows, row)
            if "error" in row:
                lines.append(f"| {shape} | {row['error']} |{' |' * (len(names) + 2)}")
                continue
            static_ms = row["times"].get(STATIC, {}).get("median_ms", float("nan"))
            values = [cell(row, name) for name in (*names, "bound")]
            lines.append(f"| {shape} | {static_ms:.3f} | {' | '.join(values)} | {row['auto']} |")
        lines += ["", "All CondConv layers of a network together:", "", "| network | auto | timm | loop | bound |"]
        lines.append("|---|---:|---:|---:|---:|")
        for backbone, values in totals(group).items():
            texts = [f"{values[name]:.2f}" if name in values else "-" for name in ("auto", TIMM, LOOP, "bound")]
            lines.append(f"| {backbone} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def totals(group: list[Row]) -> dict[str, dict[str, float]]:
    """{backbone: {contender: time over static of all its CondConv layers}}; without a contender that misses one."""
    found: dict[str, dict[str, float]] = {}
    for backbone in dict.fromkeys(name for row in group for name in row["backbones"]):
        own = [(row, row["backbones"][backbone]) for row in group if backbone in row["backbones"]]
        if any(STATIC not in row.get("times", {}) for row, _ in own):
            continue
        static_ms = sum(count * row["times"][STATIC]["median_ms"] for row, count in own)
        found[backbone] = {}
        for name in ("auto", TIMM, LOOP, "bound"):
            ratios = [(ratio(row, name), count * row["times"][STATIC]["median_ms"]) for row, count in own]
            if all(value is not None for value, _ in ratios):
                found[backbone][name] = sum(value * weight for value, weight in ratios if value) / static_ms
    return found
