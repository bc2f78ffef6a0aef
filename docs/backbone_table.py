"""Computes the table of backbones in README.md: parameters and MADDs of every network, static and with CondConv.

Usage: make docs (rewrites the table in place), or python docs/backbone_table.py --print
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from condconv.complexity import Complexity, complexity
from models import create_model

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- table: docs/backbone_table.py -->\n\n", "\n<!-- end of table -->"
EXPERTS = 8
# Name, how it is written, what the placement replaces.
BACKBONES = (
    ("mobilenet_v1", "MobileNetV1", "blocks 6 to 13, classifier"),
    ("mobilenet_v2", "MobileNetV2", "last 6 blocks, classifier"),
    ("mnasnet_a1", "MnasNet-A1", "last 6 blocks, classifier"),
    ("resnet18", "ResNet-18", "last 3 blocks, classifier"),
    ("resnet50", "ResNet-50", "last 3 blocks, classifier"),
    ("resnext50_32x4d", "ResNeXt-50 32x4d", "last 3 blocks, classifier"),
    ("efficientnet_b0", "EfficientNet-B0", "last 3 stages"),
    ("efficientnet_b0_depth", "EfficientNet-B0-depth", "last 3 stages"),
)


def measure(name: str) -> Complexity:
    """Parameters and MADDs of one backbone at 224 x 224 and 1000 classes, without allocating its weights."""
    with torch.device("meta"):
        network = create_model(name, num_classes=1000, experts=EXPERTS)
    return complexity(network, input_size=(3, 224, 224))


def table() -> str:
    """The table in Markdown, one line per backbone."""
    lines = [
        "| `model=` | network | layers with experts | static: params | MADDs | "
        f"CondConv, {EXPERTS} experts: params | MADDs |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, title, placement in BACKBONES:
        counted = measure(name)
        params = [f"{count / 1e6:.2f}M" for count in (counted.static_params, counted.params)]
        madds = [f"{count / 1e6:.0f}M" for count in (counted.static_madds, counted.madds)]
        added = f"{100 * (counted.madds / counted.static_madds - 1):+.1f} %"
        cells = (f"`{name}`", title, placement, params[0], madds[0], params[1], f"{madds[1]} ({added})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_readme() -> tuple[str, str, str]:
    """README.md as (text before the table, the table, text after it)."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    current, after = rest.split(END)
    return before + BEGIN, current, END + after


def main() -> None:
    """Prints the table, or writes it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it into README.md")
    if parser.parse_args().print:
        print(table(), end="")
        return
    before, _, after = in_readme()
    README.write_text(before + table() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
