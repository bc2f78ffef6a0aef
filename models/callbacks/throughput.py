"""Images per second and the share of time spent waiting for data."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


@dataclass
class Times:
    """Of some steps: their images on all devices, how long they took, and how much of that they waited for data."""

    steps: int = 0
    images: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0

    def add(self, images: int, busy_s: float, waited_s: float) -> None:
        """Count one more step."""
        self.steps += 1
        self.images += images
        self.busy_s += busy_s
        self.waited_s += waited_s


class Throughput(Callback):
    """Logs `speed/images_per_second`, `speed/step_time_ms` and `speed/data_wait` (a share, 0 to 1) over all devices.

    Time runs from the end of one step to the end of the next; data wait is the part before the step begins (fetching
    the batch and moving it to the device). Validation and checkpoints between steps are left out. The first
    `skip_steps` steps, in which memory is allocated and kernels are chosen, do not count. A resumed training goes on in
    the window where it stopped, so that its lines are at the steps of an uninterrupted one. Its own first `skip_steps`
    have their place in the window, but their times count only where it holds no others.

    In evaluation it measures the images per second of the whole loop, `images_per_second` afterwards.

    Args:
        every_n_steps: batches of a window; each window is one line of the log.
        skip_steps: batches left out at the start of a training, and of each resumed part of it.
    """

    def __init__(self, every_n_steps: int = 50, skip_steps: int = 3) -> None:
        self.every_n_steps = every_n_steps
        self.skip_steps = skip_steps
        self.images_per_second = 0.0
        self.data_wait = 0.0
        self._seen_steps = 0
        self._cold_steps = 0  # of a resumed training, still to come
        self._restart()
        self._mark: float | None = None
        self._wait_s = 0.0

    def _restart(self) -> None:
        self._steps = 0
        self._warm, self._cold = Times(), Times()

    def state_dict(self) -> dict[str, Any]:
        return {"seen_steps": self._seen_steps, "steps": self._steps, "warm": asdict(self._warm)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen_steps, self._steps = state_dict["seen_steps"], state_dict["steps"]
        warm = state_dict.get("warm") or {key: state_dict[key] for key in ("steps", "images", "busy_s", "waited_s")}
        self._warm, self._cold = Times(**warm), Times()
        self._cold_steps = self.skip_steps

    def leave_out(self, seconds: float) -> None:
        """Do not count this time, in which a checkpoint was written, as part of the step."""
        if self._mark is not None:
            self._mark += seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between the epochs lie validation and checkpoints; starting the loader's workers is data wait.
        self._mark = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self._wait_s = now - self._mark if self._mark is not None else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_of_window = self._steps + 1 >= self.every_n_steps or trainer.is_last_batch
        if last_of_window or 1 in (self.skip_steps - self._seen_steps, self._cold_steps):  # the clock starts after it
            _finish_device_work(pl_module)
        now = time.perf_counter()
        previous, self._mark = self._mark, now
        self._seen_steps += 1
        is_cold = self._cold_steps > 0
        self._cold_steps -= is_cold
        if self._seen_steps <= self.skip_steps or previous is None:
            return
        self._steps += 1
        times = self._cold if is_cold else self._warm
        times.add(len(batch[0]) * trainer.world_size, now - previous, self._wait_s)
        if last_of_window:
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        times = self._warm if self._warm.steps else self._cold
        self.images_per_second = times.images / times.busy_s
        self.data_wait = times.waited_s / times.busy_s
        values = {
            "speed/images_per_second": self.images_per_second,
            "speed/step_time_ms": 1000 * times.busy_s / times.steps,
            "speed/data_wait": self.data_wait,
        }
        for logger in pl_module.loggers:
            # Lightning numbers the metrics of a step by the steps before it.
            logger.log_metrics(values, step=max(pl_module.global_step - 1, 0))
        self._restart()


class EvaluationSpeed(Callback):
    """Images per second of an evaluation over all devices, loading included.

    The first batch, a warm-up, does not count if there are others.
    """

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self._images = 0
        self._start_s = 0.0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._start(0)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        _finish_device_work(pl_module)
        self._images += len(batch[0]) * trainer.world_size
        self.images_per_second = self._images / (time.perf_counter() - self._start_s)
        if batch_idx == 0:
            self._start(0)

    def _start(self, images: int) -> None:
        self._images = images
        self._start_s = time.perf_counter()


def _finish_device_work(pl_module: LightningModule) -> None:
    """A GPU works behind the clock's back."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
