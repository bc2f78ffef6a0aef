"""The index of a routing analysis: every picture with a sentence on how to read it, as HTML and as Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from condconv.ablation import MEAN, REMOVED, SHUFFLED, TOP
from reports.routing.findings import Findings
from reports.style import GRID, INK, MUTED, PAPER

EXPLANATIONS = {
    "class_weights": (
        "Mean routing weight by class",
        "How much each expert weighs for a few classes. Classes apart by more than their bars mean that routing tells "
        "them apart; in the paper that is so in late layers only.",
    ),
    "histograms": (
        "Histograms of routing weights",
        "Two peaks near 0 and 1 mean that experts are switched on and off. b is Sarle's coefficient of all weights of "
        "the layer (above 0.56: more than one mode, or strong skew), w that of single experts: a high b with a low w "
        "means experts with different, constant weights.",
    ),
    "by_depth": (
        "Routing by depth",
        "Entropy 1 means that all experts weigh the same. The share of variance between classes is adjusted for "
        "chance: 0 when routing says nothing about the class, 1 when it depends on nothing else.",
    ),
    "expert_use": (
        "Use of every expert",
        "An expert with a mean weight but no deviation is part of the static kernel. A dead one (x) stayed below 0.01 "
        "for every image. Saturated weights (below 0.01 or above 0.99) have hardly any gradient.",
    ),
    "expert_similarity": (
        "Similarity of experts",
        "Cosines between the kernels of a layer: experts near 1 do the same. Unrelated large kernels have 0.",
    ),
    "router_similarity": (
        "Similarity of routers",
        "Left: linear CKA between the routing weights of two layers, over a sample of images (1: they tell the images "
        "apart in the same way). Right: cosines between the rows of a router, one row per expert.",
    ),
    "embedding": (
        "Routing weights of single images",
        "The two directions in which the routing weights of a layer vary most. Clusters of one colour mean routing by "
        "class.",
    ),
    "ablations": (
        "What routing is worth",
        "Shuffled: every image is run with the routing weights of another one. Mean: with the mean weights of the data "
        "(a static network). Top k: with its k largest weights, the others zero, or rescaled so that they keep their "
        "sum. Without expert i: its weight is zero, in every layer that has it. Differences are paired by image.",
    ),
    "ablations_by_layer": (
        "What routing is worth, layer by layer",
        "The same in one layer at a time: where the accuracy falls, routing by image matters.",
    ),
    "experts_removed": (
        "What single experts are worth",
        "The drop of accuracy when one expert of one layer is removed.",
    ),
}
"""Title and explanation by the name of the picture; contact sheets have one each, `top_images_<layer>`."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page."""

    name: str
    title: str
    explanation: str


def picture(name: str, layer: str = "") -> Picture:
    """With its title and explanation."""
    if name in EXPLANATIONS:
        return Picture(name, *EXPLANATIONS[name])
    return Picture(
        name,
        f"Images of the experts of {layer}",
        "For each expert the images with its largest routing weights. Images that look or mean alike show what it is "
        "for; of experts chosen automatically, those that tell classes apart most are shown.",
    )


def summary(found: Findings) -> list[str]:
    """What was found, in sentences made from the numbers."""
    routers, lines = found.survey.routers, list(found.notes)
    if found.survey.num_correct is not None:
        share = 100 * found.survey.num_correct / found.survey.num_examples
        lines.append(f"The network is right on {share:.2f} % of the {found.survey.num_examples} images looked at.")
    if all(router.classes is not None for router in routers):
        shares = [router.classes.between_all for router in routers if router.classes is not None]
        if not any(math.isnan(share) for share in shares):
            best = max(range(len(shares)), key=shares.__getitem__)
            lines.append(
                f"{100 * shares[0]:.0f} % of the variance of routing weights lies between the classes in the first "
                f"layer with routing ({routers[0].name}), {100 * shares[-1]:.0f} % in the last ({routers[-1].name}); "
                f"most in {routers[best].name}, {100 * shares[best]:.0f} %."
            )
    dead = sum(router.summary.num_dead for router in routers)
    experts = sum(router.num_experts for router in routers)
    spread = [float(router.summary.std.mean()) for router in routers]
    lines.append(
        f"{dead} of {experts} experts are dead. Mean standard deviation of a routing weight over the images: "
        f"{min(spread):.3f} to {max(spread):.3f} by layer."
    )
    return lines + _ablation_lines(found)


def _ablation_lines(found: Findings) -> list[str]:
    lines: list[str] = []
    undisturbed = next((r for r in found.ablations if r.ablation is None), None)
    if undisturbed is None:
        return lines
    whole = [r for r in found.ablations if r.ablation is not None and r.ablation.layer is None]
    for kinds in ((SHUFFLED, MEAN), (TOP,)):
        parts = [
            f"{result.name} {_points(result.difference, result.interval)}"
            for result in whole
            if result.ablation is not None and result.ablation.kind in kinds
        ]
        if parts:
            lines.append(
                f"On {whole[0].num_examples} images, in all layers at once, points of top-1 with 95 % intervals "
                f"(undisturbed: {100 * undisturbed.accuracy:.2f} %): {'; '.join(parts)}."
            )
    removed = [r for r in found.ablations if r.ablation is not None and r.ablation.kind == REMOVED]
    if removed:
        worst = min(removed, key=lambda result: result.difference)
        assert worst.ablation is not None
        where = "" if worst.ablation.layer is not None else " in all layers"
        cost = _points(worst.difference, worst.interval)
        lines.append(f"The costliest removal is {worst.name}{where}: {cost} points.")
    return lines


def _points(difference: float, interval: float) -> str:
    return f"{100 * difference:+.2f} ± {100 * interval:.2f}"


def write_page(found: Findings, pictures: Sequence[Picture], tables: Sequence[Path], folder: Path) -> Path:
    """Write `index.html` and `index.md` into the folder of the pictures and tables; returns the path of the first."""
    markdown = [f"# Routing of {_escape_markdown(found.title)}", ""]
    markdown += [f"- {_escape_markdown(line)}" for line in summary(found)]
    body = [f"<h1>Routing of {html.escape(found.title)}</h1>", "<ul>"]
    body += [f"<li>{html.escape(line)}</li>" for line in summary(found)] + ["</ul>"]
    for each in pictures:
        markdown += ["", f"## {_escape_markdown(each.title)}", "", each.explanation, "", f"![]({each.name}.png)"]
        body.append(
            f"<section><h2>{html.escape(each.title)}</h2><p>{html.escape(each.explanation)}</p>"
            f'<a href="{each.name}.svg"><img src="{each.name}.png" alt="{html.escape(each.title)}" loading="lazy"></a>'
            f"</section>"
        )
    links = [path.name for path in tables]
    markdown += ["", "## Numbers", "", ", ".join(f"[{name}]({name})" for name in links), ""]
    items = ", ".join(f'<a href="{name}">{name}</a>' for name in links)
    body.append(f"<section><h2>Numbers</h2><p>{items}</p></section>")
    (folder / "index.md").write_text("\n".join(markdown), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(_document(found.title, "\n".join(body)), encoding="utf-8")
    return page


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text)


def _document(title: str, body: str) -> str:
    style = (
        f"body{{margin:2rem auto;max-width:70rem;padding:0 1rem;font:16px/1.5 system-ui,sans-serif;color:{INK};"
        f"background:{PAPER}}}h1{{line-height:1.2}}h2{{margin:2.5rem 0 .3rem}}p{{max-width:46rem;color:{MUTED}}}"
        f"img{{max-width:100%;border:1px solid {GRID};border-radius:6px}}a{{color:#0072b2}}"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Routing of {html.escape(title)}'
        f"</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
