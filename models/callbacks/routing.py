"""Statistics of the routing weights of a network in training, from a few validation batches."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from condconv.analysis import DEAD, RoutingSummary, record_routing
from condconv.analysis import RoutingStatistics as Accumulator
from condconv.routing import Router


class RoutingStatistics(Callback):
    """Logs for each router `routing/<block>/mean`, `entropy`, `saturation`, `dead_experts` and so on after validation.

    The figures are defined in `condconv.analysis`. Loggers with `log_histograms` (W&B) also get, for each router, the
    histogram of all its weights. Networks without routers (experts=0) are left alone. The figures are of the raw
    weights, also where a moving average is evaluated beside them. A block all of whose experts are dead passes nothing
    on; it is said once.

    Args:
        max_batches: validation batches that are looked at; hooks are on the routers only while these pass.
    """

    def __init__(self, max_batches: int = 8) -> None:
        if max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {max_batches}; to log none: callbacks.routing=null")
        self.max_batches = max_batches
        self._hooks = ExitStack()
        self._statistics: dict[str, Accumulator] = {}
        self._said: set[str] = set()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics = {}
        if any(isinstance(module, Router) for module in pl_module.net.modules()) and trainer.is_global_zero:
            average = getattr(pl_module, "weight_average", None)
            raw = record_routing(pl_module.net, counts=lambda: average is None or not average.is_applied)
            self._statistics = self._hooks.enter_context(raw)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx + 1 >= self.max_batches:
            self._hooks.close()

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooks.close()
        scalars: dict[str, float] = {}
        histograms: dict[str, torch.Tensor] = {}
        for block, statistics in self._statistics.items():
            if not statistics.num_examples:
                continue
            summary = statistics.compute()
            self._say_if_closed(block, summary)
            scalars |= {f"routing/{block}/{key}": value for key, value in summary.scalars().items()}
            histograms[f"routing/{block}/weights"] = summary.histogram.sum(0)
        if not scalars:
            return
        scalars["routing/dead_experts"] = sum(v for key, v in scalars.items() if key.endswith("/dead_experts"))
        step = max(trainer.global_step - 1, 0)  # where Lightning puts this validation's metrics
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
            if hasattr(logger, "log_histograms"):
                logger.log_histograms(histograms, step=step)

    def _say_if_closed(self, block: str, summary: RoutingSummary) -> None:
        if summary.num_dead < len(summary.mean) or block in self._said:
            return
        self._said.add(block)
        rank_zero_warn(
            f"{block}: its router has closed. No routing weight was above {DEAD} on any of {summary.num_examples} "
            "validation images, so its CondConv layers pass nothing on, and the network may not recover. Seen with one "
            "expert: take more of them, or slower routers (+optim.optimizer.lr_factor_by_role.router=0.1, "
            "and .router_bias)."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooks.close()
