"""Folders as train.py leaves them, made of invented numbers: for tests of whatever reads runs."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "seed": 1,
    "name": "run",
    "resume": None,
    "test": True,
    "batch_size": 64,
    "condconv": {"experts": 0, "routing": "fc", "dropout": 0.0, "layers": None},
    "model": {"_target_": "models.create_model", "name": "mobilenet_v1", "width": 0.25, "timm_options": {}},
    "data": {"_target_": "data.digits.DigitsDataModule", "image_size": 32, "seed": 1},
    "optim": {"lr": 0.001, "optimizer": {"name": "adamw", "lr": 0.001}},
    "trainer": {"max_epochs": 8, "precision": "32-true", "default_root_dir": ""},
    "callbacks": {"checkpoint": {"dirpath": ""}, "progress": {"_target_": "models.callbacks.progress_bar"}},
    "logger": {"csv": {"folder": ""}},
    "paths": {"outputs": "outputs", "run": ""},
}


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        config = config[part]
    config[leaf] = value


def write_run(
    root: Path,
    experts: int = 0,
    seed: int = 1,
    top1: float = 0.6,
    status: str = "finished",
    folder: str = "",
    overrides: dict[str, Any] | None = None,
    epochs: int = 8,
    **result: Any,
) -> Path:
    """One run's folder; `result` changes keys of result.json."""
    name = folder or f"mobilenet_v1-e{experts}-s{seed}" + "".join(f"-{k}-{v}" for k, v in (overrides or {}).items())
    path = root / name.replace("/", "_")
    path.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    changes = {"condconv.experts": experts, "seed": seed, "name": name, "data.seed": seed, "paths.run": str(path)}
    changes |= {"trainer.default_root_dir": str(path), "callbacks.checkpoint.dirpath": f"{path}/checkpoints"}
    changes |= {"logger.csv.folder": str(path), "trainer.max_epochs": epochs, **(overrides or {})}
    for key, value in changes.items():
        set_key(config, key, value)
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _write_metrics(path / "metrics.csv", seed, top1, epochs)
    typed = [
        f"{key}={value}" for key, value in {"condconv.experts": experts, "seed": seed, **(overrides or {})}.items()
    ]
    content = {
        "status": status,
        "name": name,
        "command": ["/usr/bin/python", "train.py", *typed],
        "overrides": typed,
        "started": "2026-01-31T10:00:00+00:00",
        "ended": f"2026-01-31T10:{seed:02d}:00+00:00",
        "seconds": 100.0 * (1 + 0.1 * experts),
        "epochs": epochs,
        "steps": 10 * epochs,
        "figures": {"test/top1": top1, "val/top1": top1, "test/loss": 1.2, "train/top1": top1 + 0.05 + 0.004 * experts},
        "best": {"val/top1": top1 + 0.01},
        "model": {
            "params": 200_000 * (1 + experts),
            "madds": 800_000 + 30_000 * experts,
            "static_params": 200_000,
            "static_madds": 800_000,
        },
        "images_per_second": 500.0 / (1 + 0.1 * experts),
        "peak_memory_mb": 900.0 + 20 * experts,
        "memory_kind": "peak RSS of the process",
        "device": "cpu",
        "threads": 1,
        "devices": 1,
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.11", "torch": "2.14"},
        "error": None,
    } | result
    (path / "result.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def _write_metrics(path: Path, seed: int, top1: float, epochs: int) -> None:
    noise = random.Random(seed)
    columns = ["step", "epoch", "train/loss", "train/top1", "val/top1", "val/loss"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for epoch in range(epochs):
            share = 1 - math.exp(-3 * (epoch + 1) / epochs)
            for step in range(10 * epoch, 10 * epoch + 9, 3):
                row = {"step": step, "epoch": epoch, "train/loss": 2.3 - 1.8 * share + noise.gauss(0, 0.02)}
                writer.writerow(row)
            accuracy = 0.1 + (top1 - 0.1) * share
            row = {"step": 10 * epoch + 9, "epoch": epoch, "val/top1": accuracy, "val/loss": 2.3 - 1.5 * share}
            writer.writerow(row | {"train/top1": min(accuracy + 0.05 * share + noise.gauss(0, 0.004), 1.0)})


def write_sweep(root: Path, experts: tuple[int, ...] = (0, 1, 2, 4, 8, 16), seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """A sweep over experts whose accuracy rises a little with the experts, with noise of its own for each seed."""
    gains = {0: 0.0, 1: -0.006, 2: 0.004, 4: 0.009, 8: 0.012, 16: 0.006, 32: 0.0}
    for seed in seeds:
        of_seed = random.Random(100 + seed).gauss(0, 0.01)
        for count in experts:
            noise = random.Random(1000 * seed + count).gauss(0, 0.003)
            write_run(root, count, seed, top1=0.62 + gains[count] + of_seed + noise)
