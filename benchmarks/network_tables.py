"""Markdown, terminal lines and plots of the rows of `benchmarks.networks`."""

from __future__ import annotations

from benchmarks.contenders import OURS, STATIC, TIMM
from benchmarks.presets import PEAK_MEMORY_OVER_TIMM, PEAK_MEMORY_TARGET
from benchmarks.report import Row, origin_mark

PAIRS = ((OURS, STATIC), (OURS, TIMM))


def met(value: float | None, target: float | None) -> str:
    """`<= target: met` or `missed`; empty without a target."""
    if target is None:
        return ""
    verdict = "not measured" if value is None else "met" if value <= target else "missed"
    return f"<= {target:g}: {verdict}"


def over(row: Row, pair: tuple[str, str]) -> float | None:
    """Ratio of the median times of a pair of contenders."""
    found = row.get("over", {}).get("/".join(pair))
    return None if found is None else float(found["ratio"])


def memory_over(row: Row, pair: tuple[str, str]) -> float | None:
    """Ratio of the peak memory of a pair of contenders."""
    peaks = row.get("peak_mb", {})
    return peaks[pair[0]] / peaks[pair[1]] if all(name in peaks for name in pair) else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time(row: Row, name: str) -> str:
    timing = row.get("times", {}).get(name)
    if timing is None:
        return str(row.get("notes", {}).get(name, "-"))
    digits = 1 if timing["median_ms"] < 1000 else 0
    spread = f"{timing['min_ms']:.{digits}f} to {timing['max_ms']:.{digits}f}"
    return f"{timing['median_ms']:.{digits}f} ({spread}; {timing['rounds']})"


def _ratio(row: Row, pair: tuple[str, str]) -> str:
    found = row.get("over", {}).get("/".join(pair))
    return "-" if found is None else f"{found['ratio']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def title(row: Row) -> str:
    """What was measured, in the words of a table."""
    size = f"{row['image_size']} px, batch {row['batch']}"
    return f"{row['backbone']} E={row['experts']}, {row['mode']}, {size}, {row['dtype']}"


def line(row: Row) -> str:
    """For the terminal."""
    if "error" in row:
        return f"{row['id']}: {row['error']}"
    parts = [f"{name} {_time(row, name)} ms" for name in (STATIC, OURS, TIMM)]
    targets = row["targets"] or (None, None)
    for pair, target in zip(PAIRS, targets, strict=True):
        parts.append(f"{'/'.join(pair)} {_ratio(row, pair)} {met(over(row, pair), target)}".strip())
    if "peak_mb" in row:
        parts.append("peak memory " + ", ".join(f"{'/'.join(p)} {_number(memory_over(row, p))}" for p in PAIRS))
    return f"{row['id']}: {'; '.join(parts)}"


def render(rows: list[Row]) -> str:
    """Rows with targets, then all others, then peak memory."""
    rows = [row for row in rows if "backbone" in row or "error" in row]
    asked = [row for row in rows if row.get("targets")]
    lines = [
        "Milliseconds: median (smallest to largest; rounds). Ratios: of medians (smallest to largest of one round).",
        "Contenders take turns in one process; channels last; a training step is forward, backward, SGD with momentum.",
        "timm: its `efficientnet_cc_b0_8e` for efficientnet_b0 with 8 experts, else its CondConv2d in our network.",
        "Gates passed before timing: ours against the float64 oracle, timm's against ours, outputs and gradients.",
    ]
    for heading, chosen in (("Figures asked for", asked), ("Other rows", [r for r in rows if r not in asked])):
        if chosen:
            lines += ["", f"## {heading}", ""]
            lines += ["| what | static, ms | ours, ms | timm, ms | ours / static | ours / timm | targets |"]
            lines += ["|---|---:|---:|---:|---:|---:|---|"]
            lines += [_time_line(rows, row) for row in chosen]
    trained = [row for row in rows if row.get("peak_mb")]
    if trained:
        lines += ["", "## Peak memory of a training step beyond parameters, gradients and optimiser state", ""]
        lines += ["| what | static, MB | ours, MB | timm, MB | ours / static | ours / timm | targets |"]
        lines += ["|---|---:|---:|---:|---:|---:|---|", *(_memory_line(rows, row) for row in trained)]
    return "\n".join(lines) + "\n"


def _time_line(rows: list[Row], row: Row) -> str:
    if "error" in row:
        return f"| {row['id']}{origin_mark(rows, row)} | {row['error']} | | | | | |"
    targets = row["targets"] or (None, None)
    verdicts = [met(over(row, pair), target) for pair, target in zip(PAIRS, targets, strict=True)]
    cells = [title(row) + origin_mark(rows, row), *(_time(row, name) for name in (STATIC, OURS, TIMM))]
    cells += [*(_ratio(row, pair) for pair in PAIRS), "; ".join(v for v in verdicts if v)]
    return f"| {' | '.join(cells)} |"


def _memory_line(rows: list[Row], row: Row) -> str:
    targets = (PEAK_MEMORY_TARGET, PEAK_MEMORY_OVER_TIMM.get(row["backbone"]))
    verdicts = [met(memory_over(row, pair), target) for pair, target in zip(PAIRS, targets, strict=True)]
    cells = [title(row) + origin_mark(rows, row), *(_number(row["peak_mb"].get(n), 1) for n in (STATIC, OURS, TIMM))]
    cells += [*(_number(memory_over(row, pair)) for pair in PAIRS), "; ".join(v for v in verdicts if v)]
    return f"| {' | '.join(cells)} |"


def plotted(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """{title: {backbone: {contender: time over static}}}, for each mode and size that several backbones have."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        bars = {name: over(row, (name, STATIC)) for name in (OURS, TIMM)}
        present = {name: value for name, value in bars.items() if value is not None}
        if present:
            key = f"{row['mode']} {row['image_size']}px batch {row['batch']} {row['dtype']}"
            label = row["backbone"] + ("" if row["experts"] == 8 else f" E={row['experts']}")
            found.setdefault(key, {})[label] = present
    return {key: groups for key, groups in found.items() if len(groups) > 1}
