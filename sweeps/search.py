"""A search for hyperparameters with Optuna: every trial is a job of a sweep, the study is an SQLite file in its folder.

Optuna is used directly, by its ask-and-tell interface: Hydra's own Optuna sweeper runs trials inside its process and
knows nothing of finished or unfinished jobs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.messages import EXIT_REQUEUE, UserError
from configs.results import read_result
from sweeps.display import Display
from sweeps.folder import only_one, save_plan
from sweeps.jobs import JobRun, state_on_disk
from sweeps.names import job_name
from sweeps.plan import Job, Plan, as_text, make_plan
from sweeps.sweeper import Sweep

STUDY_FILE = "optuna.db"
JOB = "job"  # a trial's attribute: the name of its job
DIRECTIONS = ("maximize", "minimize")


class OptunaSearch(Sweep):
    """Trials one after the other, or as many at a time as the launcher runs.

    `options` are those of configs/hparams_search/optuna.yaml: space, trials, metric, direction, sampler_seed.
    """

    def run(self, arguments: Sequence[str]) -> Any:
        """Run or continue the search; returns Optuna's study.

        Raises:
            UserError: the space or the options are wrong, or the folder belongs to another search.
            SystemExit: with 130 if the search was stopped, with `EXIT_REQUEUE` if a trial was (a time limit), with 1 if
                none was finished.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if self.options.get("direction") not in DIRECTIONS:
            raise UserError(f"hydra.sweeper.direction={self.options.get('direction')}: maximize or minimize.")
        space = distributions(self.options.get("space") or {})
        folder = self.folder(arguments)
        shared = make_plan(arguments, unless_given=self.unless_given)
        if len(shared.jobs) > 1:
            raise UserError("A search takes one value of each setting; what it may vary stands in hydra.sweeper.space.")
        self.compose(shared.fixed)  # a mistake comes to light before the first trial
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder) as lock:
            self.launcher.keep_open = (lock,)
            save_plan(folder, Plan(shared.fixed, ()))
            study = optuna.create_study(
                study_name="search",
                storage=f"sqlite:///{folder / STUDY_FILE}",
                direction=self.options["direction"],
                load_if_exists=True,
            )
            seed = self.options.get("sampler_seed")
            # The seed of a start counts the trials so far: one and the same would draw the first start's points again.
            study.sampler = optuna.samplers.TPESampler(seed=None if seed is None else seed + len(study.trials))
            runs = self.search(study, space, shared, folder)
            self.summary(study, folder, runs)
        if self.launcher.stop.is_set():
            sys.exit(130)
        if is_interrupted(runs):
            sys.exit(EXIT_REQUEUE)
        if not any(trial.state.name == "COMPLETE" for trial in study.trials):
            sys.exit(1)
        return study

    def search(self, study: Any, space: dict[str, Any], shared: Plan, folder: Path) -> list[JobRun]:
        """Ask, run and tell, in rounds of as many jobs as run at a time, until there are enough trials.

        A trial that its own time limit interrupts ends the search for now: Optuna hears nothing of it before it has
        gone on to its end, so there would never be enough.
        """
        import optuna

        runs: list[JobRun] = []
        unfinished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.RUNNING]
        while not self.launcher.stop.is_set():
            # Trials that were running when the search was stopped come first; their jobs go on from their checkpoints.
            batch = [(trial.number, trial.params) for trial in unfinished[: self.launcher.slots]]
            unfinished = unfinished[len(batch) :]
            ended = sum(trial.state.is_finished() for trial in study.trials)
            wanted = min(self.launcher.slots, int(self.options["trials"]) - ended) - len(batch)
            for trial in (study.ask(space) for _ in range(wanted)):
                batch.append((trial.number, trial.params))
            if not batch:
                return runs
            runs += self.run_trials(study, batch, shared, folder)
            if is_interrupted(runs):
                return runs
        return runs

    def run_trials(
        self, study: Any, batch: Sequence[tuple[int, Mapping[str, Any]]], shared: Plan, folder: Path
    ) -> list[JobRun]:
        """Run the jobs of some trials and tell Optuna what came out of those that ended."""
        import optuna

        jobs = []
        for number, params in batch:
            overrides = tuple(as_overrides(params))
            job = Job(f"trial-{number:03d}_{job_name(overrides)}", overrides)
            jobs.append(self.job_run(shared, job, folder))
            state = state_on_disk(jobs[-1].folder)
            if state in ("finished", "failed"):  # the search was killed between the end of the job and the telling
                jobs[-1].state, jobs[-1].skipped = state, True
        metric = str(self.options.get("metric") or self.metric)
        with Display(jobs, metric, folder.name, self.launcher.slots) as display:
            self.launch([job for job in jobs if not job.skipped], display)
        for (number, _), job in zip(batch, jobs, strict=True):
            if job.state == "finished":
                value = figure(read_result(job.folder), metric)
                state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
                study.tell(number, value, state=state)
            elif job.state == "failed":
                study.tell(number, state=optuna.trial.TrialState.FAIL)
        return jobs

    def summary(self, study: Any, folder: Path, runs: Sequence[JobRun]) -> None:
        """Print the trials of this start, and the best of all."""
        display = Display(runs, str(self.options.get("metric") or self.metric), folder.name)
        display.summary(folder)
        done = [trial for trial in study.trials if trial.value is not None]
        if done:
            best = study.best_trial
            words = " ".join(as_overrides(best.params))
            display.line(f"  best of {len(done)}        {best.value:.4f}  trial {best.number}: {words}")
        if is_interrupted(runs):
            display.line("  no more trials are started before the interrupted ones have gone on")
        display.line(f"  study            {folder / STUDY_FILE}")


def is_interrupted(runs: Sequence[JobRun]) -> bool:
    """Whether a trial has yet to go on."""
    return any(run.state == "interrupted" for run in runs)


def as_overrides(params: Mapping[str, Any]) -> list[str]:
    """A trial's parameters as overrides; six digits are enough for anybody."""
    return [
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={as_text(value)}" for key, value in params.items()
    ]


def figure(result: Mapping[str, Any] | None, metric: str) -> float | None:
    """The value of a metric in a result: the best of the run if that was kept, else the final one."""
    for part in ("best", "figures"):
        value = ((result or {}).get(part) or {}).get(metric)
        if isinstance(value, int | float):
            return float(value)
    return None


def distributions(space: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's distributions of a space: `{low: 1e-4, high: 1e-2, log: true}`, `{low: 1, high: 8}` or `[a, b, c]`.

    Raises:
        UserError: the space is empty, or one of its entries is neither.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not space:
        raise UserError("hydra.sweeper.space is empty: say what may vary, as configs/hparams_search/optuna.yaml does.")
    found: dict[str, Any] = {}
    for key, entry in space.items():
        try:
            if isinstance(entry, Sequence) and not isinstance(entry, str):
                found[key] = CategoricalDistribution(list(entry))
                continue
            whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
            kind: Callable[..., Any] = IntDistribution if whole else FloatDistribution
            found[key] = kind(**{str(name): value for name, value in entry.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"hydra.sweeper.space.{key}: expected a list of choices, or low, high and perhaps log, step ({error})."
            ) from error
    return found
