"""What Hydra needs to find: it takes sweepers from the namespace `hydra_plugins` only. The code is in `sweeps`.

Hydra imports this file whenever anything is composed, so nothing heavy is imported at its top.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper


class JobSweeper(Sweeper):
    """Every combination of the settings as a job of its own; `configs/hydra/sweeper/jobs.yaml` lists the arguments."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.context: dict[str, Any] = {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    def sweep(self, arguments: list[str]) -> Any:
        from sweeps.sweeper import GridSweep

        return GridSweep(**self.options, **self.context).run(arguments)


class SearchSweeper(JobSweeper):
    """An Optuna search; `configs/hparams_search/optuna.yaml` lists the arguments."""

    def sweep(self, arguments: list[str]) -> Any:
        from sweeps.search import OptunaSearch

        return OptunaSearch(**self.options, **self.context).run(arguments)
