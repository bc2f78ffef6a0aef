"""Published figures beside ours, where ours were measured on the same data; "not run" where they were not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reports.comparison import Comparison, Row

TABLE = Path(__file__).with_name("published.yaml")
NOT_RUN = "not run"
TITLES = {"imagenet": "ImageNet, top-1 (%)", "coco": "COCO minival, mAP (%)", "cifar10": "CIFAR-10, top-1 (%)"}
# By class and name of the data module: the same classes read other data sets too.
MODULES = {
    ("ImageNetDataModule", None): "imagenet",
    ("CocoDataModule", None): "coco",
    ("TorchvisionDataModule", "cifar10"): "cifar10",
}
# Pixels of the published networks; CIFAR-10's are of no backbone of ours.
IMAGE_SIZES = {"imagenet": 224, "coco": 300}
# Settings that leave out a part of the images.
PARTS = ("max_train", "max_val", "max_train_per_class", "max_val_per_class", "holdout")
LEAVES = {"imagenet": ("top1",), "coco": ("AP", "mAP"), "cifar10": ("top1",)}


@dataclass(frozen=True)
class Published:
    """One published figure, and ours of the same network on the same data."""

    data: str
    network: str
    experts: int
    value: str
    tag: str
    cost: str
    note: str
    ours: str
    is_ours_here: bool  # a network of this kind is in the report, on whatever data


def published(comparison: Comparison) -> list[Published]:
    """The whole table, networks of this report first."""
    table: dict[str, list[dict[str, Any]]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    models = {_model(row) for row in comparison.rows}
    found = [_entry(data, line, comparison, models) for data, lines in table.items() for line in lines]
    return sorted(found, key=lambda entry: not entry.is_ours_here)


def _entry(data: str, line: dict[str, Any], comparison: Comparison, models: set[str]) -> Published:
    network = line["model"] + (f" {line['width']}" if "width" in line else "")
    cost = ", ".join(f"{line[key]} {name}" for key, name in (("params", "params"), ("madds", "MADDs")) if key in line)
    return Published(
        TITLES[data],
        network,
        line["experts"],
        f"{line['value']}",
        line["tag"],
        cost,
        line.get("note", ""),
        _ours(data, line, comparison),
        line["model"] in models,
    )


def _ours(data: str, line: dict[str, Any], comparison: Comparison) -> str:
    metric = comparison.metric
    if metric.name.rsplit("/", 1)[-1] not in LEAVES[data]:
        return NOT_RUN
    wanted = (line["model"], float(line.get("width", 1.0)), line["experts"])
    rows = [row for row in comparison.rows if (_model(row), _width(row), row.group.experts) == wanted]
    rows = [row for row in rows if _data(row) == data]
    return "; ".join(_text(comparison, row, rows) for row in rows) or NOT_RUN


def _text(comparison: Comparison, row: Row, rows: Sequence[Row]) -> str:
    metric = comparison.metric
    sd = f" ± {metric.text(row.value.sd)}" if row.value.sd is not None else ""
    whose = f"{row.label}: " if len(rows) > 1 else ""
    return f"{whose}{metric.text(row.value.mean)}{sd} (n = {row.value.n})"


def _model(row: Row) -> str:
    return str(row.group.settings.get("model.name"))


def _width(row: Row) -> float:
    width = row.group.settings.get("model.width")
    return float(width) if isinstance(width, int | float) else 1.0


def _data(row: Row) -> str:
    """Which data set a group was trained and tested on, all of it, at the published size; "" for none of the table."""
    settings = row.group.settings
    limits = [settings.get(f"trainer.limit_{split}_batches") for split in ("train", "test")]
    # A float of 1 is all batches, an integer one batch; a holdout of 0 is none.
    if any(limit is not None and repr(limit) != "1.0" for limit in limits):
        return ""
    if any(settings.get(f"data.{key}") not in (None, 0) for key in PARTS):
        return ""
    module = str(settings.get("data._target_", "")).rpartition(".")[2]
    data = MODULES.get((module, settings.get("data.dataset", settings.get("data.name"))), "")
    size = settings.get("data.image_size")
    return data if size == IMAGE_SIZES.get(data, size) else ""
