"""Loggers: metrics.csv in the run's folder, always, and Weights & Biases beside it.

wandb is imported when a W&B run is started and not before, so `logger=none` works where it is not installed.
"""

from __future__ import annotations

import csv
import netrc
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

# What W&B's table of runs shows of a metric, where that is not its last value.
SUMMARIES = {
    "val/top1": "max,last",
    "val_ema/top1": "max,last",
    "val/AP": "max,last",
    "val/loss": "min,last",
    "train/loss": "min,last",
    "speed/images_per_second": "mean,last",
    "speed/data_wait": "mean,last",
}
# W&B's own server has a new name in recent versions of wandb; a login may be saved under the one before.
EARLIER_NAME = {"api.forge.coreweave.com": "api.wandb.ai"}


class MetricsCsv(Logger):
    """Appends metrics to `<folder>/metrics.csv`, one line per step at which something was logged.

    Lightning's CSVLogger deletes the file when a run is resumed; this one reads it and goes on. A line is on disk as
    soon as the next step begins; the file is rewritten, through a temporary one, only when a new metric appears.
    """

    FILE = "metrics.csv"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / self.FILE
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config has its own file, config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        if self._row and self._row["step"] != step:
            self._write()
        self._row = {"step": step, **self._row, **values}

    @rank_zero_only
    def checkpoint_state(self) -> dict[str, Any]:
        """How far the file has come, for a checkpoint: the rows in it, its columns, and the row not yet written."""
        rows = 0
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
            rows = len(self._read())
        row = {key: value.item() if hasattr(value, "item") else value for key, value in self._row.items()}
        return {"rows": rows, "columns": list(self._columns), "row": row}

    @rank_zero_only
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to `checkpoint_state`: what was logged after it will be logged again."""
        self._columns, self._row = list(state["columns"]), dict(state["row"])
        kept = self._read()[: state["rows"]] if self.path.exists() else []
        if self._columns:
            self._rewrite([{key: row.get(key, "") for key in self._columns} for row in kept])
        else:
            self.path.unlink(missing_ok=True)

    def save(self) -> None:
        """Nothing: Lightning calls this after every `log_metrics`, and a step's metrics come in several calls."""

    def _write(self) -> None:
        if not self._row:
            return
        row, self._row = self._row, {}
        if not self._columns and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
        new = [key for key in row if key not in self._columns]
        if new:
            self._add_columns(new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _add_columns(self, new: list[str]) -> None:
        rows = self._read() if self.path.exists() else []
        self._columns = [*self._columns, *new]
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".csv.tmp")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(unfinished, self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            self._write()
        except OSError as error:
            if status == "success":
                raise
            print(f"warning: {self.path}: {error.strerror}", file=sys.stderr)  # the training's own error is the news


class WandbRun(WandbLogger):
    """Lightning's WandbLogger that never asks and never fails for want of a login or a network.

    Args:
        folder: the run's folder; W&B's files go to `<folder>/wandb`, and the run's id to `<folder>/wandb_id`, so that a
            resumed training continues the same W&B run.
        mode: "auto" is online if there is an API key (environment, netrc) and the server (WANDB_BASE_URL, or that of
            `wandb login --host=...`) can be reached, else offline; "online" and "offline" as they say. The environment
            variable WANDB_MODE wins over "auto".
    """

    ID_FILE = "wandb_id"

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str = "condconv",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | tuple[str, ...] = (),
        mode: str = "auto",
    ) -> None:
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"logger.wandb.mode={mode}: there are auto, online and offline (and logger=none).")
        options = {"entity": entity, "group": group, "tags": list(tags)}
        super().__init__(name=name, save_dir=str(folder), project=project, **options)
        self.folder = Path(folder)
        self.mode = mode

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, started on first use."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    def _start(self) -> Any:
        import wandb

        if wandb.run is not None:  # of an earlier job of this process: one W&B run for each job
            wandb.finish()
        self.folder.mkdir(parents=True, exist_ok=True)
        mode, reason = choose_mode(self.mode)
        if reason:
            print(f"W&B runs offline ({reason}). To upload it later: wandb sync {self.folder}/wandb/offline-run-*")
        options = {**self._wandb_init, "id": self._saved_id(), "resume": "allow"}
        # Console output and code stay here: they may hold what nobody wants on a server.
        settings = wandb.Settings(console="off", init_timeout=30, quiet=True, save_code=False)
        try:
            run = wandb.init(mode=mode, settings=settings, **options)
        except Exception as error:  # whatever keeps W&B from the server must not keep anybody from training
            if mode != "online" or self.mode == "online":
                raise
            print(f"W&B runs offline ({type(error).__name__}: {error})")
            run = wandb.init(mode="offline", settings=settings, **options)
        (self.folder / self.ID_FILE).write_text(run.id, encoding="utf-8")
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        for metric, kept in SUMMARIES.items():
            run.define_metric(metric, step_metric="trainer/global_step", summary=kept)
        return run

    def _saved_id(self) -> str | None:
        path = self.folder / self.ID_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    @rank_zero_only
    def log_histograms(self, counts: Mapping[str, Tensor], step: int) -> None:
        """Log histograms over [0, 1]; each tensor holds the counts of equal bins."""
        import numpy
        import wandb

        edges = {key: numpy.linspace(0.0, 1.0, len(count) + 1) for key, count in counts.items()}
        histograms = {
            key: wandb.Histogram(np_histogram=(count.cpu().numpy(), edges[key])) for key, count in counts.items()
        }
        self.experiment.log({**histograms, "trainer/global_step": step})

    @rank_zero_only
    def summarize(self, result: Mapping[str, Any]) -> None:
        """Put what result.json says of a run into the table of runs: speed, memory, time, size."""
        if self._experiment is None:
            return
        kept = ("status", "seconds", "images_per_second", "peak_memory_mb", "error")
        values = {f"result/{key}": result.get(key) for key in kept}
        values |= {f"model/{key}": value for key, value in (result.get("model") or {}).items()}
        self._experiment.summary.update({key: value for key, value in values.items() if value is not None})

    @rank_zero_only
    def log_files(self, name: str, pictures: Mapping[str, Path], folder: Path) -> None:
        """Log pictures by their titles, and a folder with all its files as an artifact, "<name>-<run id>"."""
        import wandb

        run = self.experiment
        run.log({f"{name}/{title}": wandb.Image(str(path)) for title, path in pictures.items()})
        artifact = wandb.Artifact(f"{name}-{run.id}", type=name)
        for path in sorted(folder.iterdir()):
            if path.suffix in (".png", ".svg", ".csv", ".html", ".md"):
                artifact.add_file(str(path))
        run.log_artifact(artifact)

    def place(self) -> str:
        """Where the run can be looked at: its address, or the folder to sync."""
        run = self._experiment
        if run is None:
            return "not started"
        return str(Path(run.dir).parent) if run.offline else str(run.url)

    @rank_zero_only
    def mark_preempted(self) -> None:
        """Tell W&B that the run was stopped from outside and will go on: it becomes "preempted", not "crashed"."""
        if self._experiment is not None:
            self._experiment.mark_preempting()

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, so that the next job of this process gets its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None


@contextmanager
def finishing(configured: Mapping[str, Logger | None]) -> Iterator[list[Logger]]:
    """The loggers among the values of a config group; they end well or badly, but they end."""
    loggers = [logger for logger in configured.values() if logger is not None]
    failed = True
    try:
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            logger.finalize("failed" if failed else "success")
            if hasattr(logger, "finish"):
                logger.finish(exit_code=int(failed))


def choose_mode(wanted: str) -> tuple[str, str | None]:
    """("online" or "offline", or what WANDB_MODE says; why offline, if that is not what was asked for)."""
    if wanted != "auto":
        return wanted, None
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"], None
    url = urlparse(server_url())
    if not find_api_key(url.netloc):
        return "offline", f"not logged in at {url.hostname}: `wandb login`"
    behind_proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not behind_proxy and not _reachable(url.hostname or "", url.port or (443 if url.scheme == "https" else 80)):
        return "offline", f"no connection to {url.hostname}"
    return "online", None


def server_url() -> str:
    """Of W&B's server: the environment's, or what `wandb login --host=...` wrote into W&B's settings file."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def find_api_key(server: str) -> str | None:
    """The API key of the environment, or the one that `wandb login` saved for the server (a host, perhaps a port).

    W&B itself would tell it only by signing in (messages, settings rewritten): so its netrc file is read here.
    """
    import wandb

    key: str | None = os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]  # the last one on Windows
    file = next((path for place in places if (path := Path(place).expanduser()).is_file()), None)
    if key or file is None:
        return key
    try:
        saved = netrc.netrc(file)
    except (netrc.NetrcParseError, OSError):  # nobody's login can be read from it, W&B's neither
        return None
    names = (server, server.partition(":")[0], EARLIER_NAME.get(server, server))
    return next((found[2] for name in names if (found := saved.authenticators(name))), None)


def _reachable(host: str, port: int, timeout_s: float = 3.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False
