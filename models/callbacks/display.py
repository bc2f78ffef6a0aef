"""What people see at the terminal: the network's table, progress, and the results with the paths of everything."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from rich.console import Console
from rich.table import Table

from condconv.complexity import Complexity, readable
from models.callbacks.checkpoints import LastCheckpoint


class ModelTable(Callback):
    """Prints parameters and MADDs before the training starts, and logs the totals.

    Args:
        image_size: side of the images, on which MADDs depend.
        title: the network's name.
        layers: whether the table has a line for every layer; otherwise one for each part of the network.
    """

    def __init__(self, image_size: int, title: str = "network", layers: bool = False) -> None:
        self.image_size = image_size
        self.title = title
        self.layers = layers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        counted = pl_module.complexity(self.image_size)
        print_model(counted, self.title, self.layers)
        if trainer.ckpt_path is not None:  # a resumed run has logged them
            return
        for logger in trainer.loggers:
            logger.log_metrics(model_figures(counted), step=trainer.global_step)


def model_figures(counted: Complexity) -> dict[str, float]:
    """Parameters and MADDs, with those of the static network, as metrics."""
    return {
        "model/params": counted.params,
        "model/madds": counted.madds,
        "model/static_params": counted.static_params,
        "model/static_madds": counted.static_madds,
    }


def print_model(counted: Complexity, title: str, layers: bool) -> None:
    """Print the table of a network: every layer, or sums over its parts (first two components of the names)."""
    if layers:
        print(counted)
        return
    table = Table(title=f"{title}, input {'x'.join(map(str, counted.input_size))}", title_justify="left")
    table.add_column("part")
    for column in ("layers", "CondConv", "experts", "parameters", "MADDs", "static MADDs"):
        table.add_column(column, justify="right")
    for part, rows in _parts(counted).items():
        convs = [row for row in rows if row.num_experts and row.kind != "router"]
        experts = sorted({row.num_experts for row in convs})
        table.add_row(
            part,
            str(sum(row.kind != "router" for row in rows)),
            str(len(convs) or ""),
            ", ".join(map(str, experts)),
            readable(sum(row.params for row in rows)),
            readable(sum(row.madds for row in rows)),
            readable(sum(row.static_madds for row in rows)),
        )
    console = Console()
    console.print(table)
    console.print(f"{counted.summary()}  (parameters include normalisation)")


def _parts(counted: Complexity) -> dict[str, list[Any]]:
    parts: dict[str, list[Any]] = {}
    for layer in counted.layers:
        path = layer.name.split(".")
        # blocks.4.0.conv_pw -> blocks.4: stages of a network are numbered children of one container.
        part = ".".join(path[:2]) if len(path) > 1 and path[1].isdigit() else path[0]
        parts.setdefault(part, []).append(layer)
    return parts


class EpochLines(ProgressBar):
    """One line for each epoch: for logs and pipes, where a moving bar leaves rubbish."""

    def __init__(self) -> None:
        super().__init__()
        self._start_s = 0.0
        self._validated = False  # in this epoch

    def disable(self) -> None:
        """Nothing to switch off: Lightning calls this on all processes but the first, which print nothing anyway."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_s = time.perf_counter()  # an epoch that is resumed in the middle does not start again

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_s = time.perf_counter()
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Validation has run by now: Lightning calls it before the training epoch ends.
        if trainer.is_global_zero:
            # Lightning keeps figures until there are new ones: those of an earlier validation are not this epoch's.
            hidden = ("lr-",) if self._validated else ("lr-", "val/", "val_ema/")
            shown = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(hidden)}
            figures = "  ".join(f"{key} {value:.4f}" for key, value in sorted(shown.items()))
            epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
            seconds = time.perf_counter() - self._start_s
            print(f"epoch {trainer.current_epoch + 1}/{epochs}  {seconds:.1f} s  {figures}", flush=True)


def progress_bar(refresh_rate: int = 1) -> Callback:
    """Rich's bar at a terminal, or where output ends in one (TTY_COMPATIBLE=1), a line for each epoch elsewhere."""
    if sys.stdout.isatty() or os.environ.get("TTY_COMPATIBLE") == "1":
        return RichProgressBar(refresh_rate=refresh_rate, leave=True)
    return EpochLines()


def print_results(title: str, figures: Mapping[str, Any], places: Mapping[str, Any] | None = None) -> None:
    """Print a short table of figures (floats with four digits) and, under it, where things are, one path to a line."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    for name, place in (places or {}).items():
        # Never wrapped: paths are there to be copied.
        console.print(f"  {name:<16} {place}", soft_wrap=True, highlight=False, markup=False)


def print_evaluation(
    title: str, figures: Mapping[str, float], device: object, places: Mapping[str, Any] | None = None
) -> None:
    """Print the figures of an evaluation, counts in a readable form, and where its files are."""
    counts = {name: readable(int(figures[name])) for name in ("params", "madds")}
    speed = f"{figures['images_per_second']:.0f} ({device})"
    print_results(title, {**figures, **counts, "images_per_second": speed}, places)


def print_training_results(trainer: Trainer, figures: Mapping[str, float], folder: Path, seconds: float) -> None:
    """Print the figures of the final weights and where everything is; only on the first process."""
    if not trainer.is_global_zero:
        return
    final = "test" if any(key.startswith("test") for key in figures) else "val"
    rows: dict[str, Any] = {key: value for key, value in figures.items() if key.startswith(final)}
    places: dict[str, Any] = {"run": folder}
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, LastCheckpoint):
            places["last checkpoint"] = saver.path
        elif isinstance(saver, ModelCheckpoint) and saver.best_model_score is not None:
            rows[f"best {saver.monitor}"] = float(saver.best_model_score)
            places["best checkpoint"] = saver.best_model_path
    rows["trained"] = f"{trainer.current_epoch} epochs, {trainer.global_step} steps, {seconds:.0f} s"
    places["metrics"] = folder / "metrics.csv"
    for logger in trainer.loggers:
        if hasattr(logger, "place"):
            places["W&B run"] = logger.place()
    print_results("Results of the final weights", rows, places)
