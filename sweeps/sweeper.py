"""The sweep itself: plans the jobs, leaves out what is done, runs the rest, and can be stopped at any time."""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.utils import JobStatus
from hydra.core.utils import run_job as run_hydra_job
from omegaconf import DictConfig, OmegaConf, open_dict

from configs.messages import EXIT_REQUEUE, UserError, explain
from configs.results import code_version, read_result
from sweeps.display import Display
from sweeps.folder import only_one, save_plan
from sweeps.jobs import JobRun, quoted, state_on_disk
from sweeps.launchers import InProcess, InTurn, make_launcher
from sweeps.names import short_hash
from sweeps.plan import Job, Plan, belongs_to_sweep, is_harmless, key_of, make_plan, select, varied

REFRESH_S = 1.0
# How much of a sweep is run, and how: what does not make another sweep of it.
NOT_OF_THE_FOLDER = tuple(f"hydra.sweeper.{key}" for key in ("launcher", "trials", "only", "list_only"))


class Sweep:
    """What every kind of sweep shares: its folder, its jobs' command lines, launching, showing, stopping.

    Args:
        hydra_context, task_function, config: as Hydra gives them to a sweeper.
        launcher: `kind` and the options of `sweeps.launchers.make_launcher`.
        params, unless_given, variants, keep_variants, static_twin: see `sweeps.plan.make_plan`.
        generator: a function that returns `variants`, by its dotted name; see `sweeps.generators`.
        needs: values that every job must have from elsewhere; see `check_needs`.
        only: names of jobs, or patterns of them; see `sweeps.plan.select`.
        list_only: print the jobs, run none.
    """

    def __init__(
        self,
        *,
        hydra_context: Any,
        task_function: Any,
        config: DictConfig,
        launcher: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        unless_given: Mapping[str, Any] | None = None,
        variants: Sequence[Sequence[str]] | None = None,
        keep_variants: bool = False,
        static_twin: bool = False,
        generator: str | None = None,
        needs: Mapping[str, Any] | None = None,
        only: str | Sequence[str] | None = None,
        list_only: bool = False,
        **others: Any,
    ) -> None:
        self.context = hydra_context
        self.task_function = task_function
        self.config = config
        self.options = dict(others)
        self.params = dict(params or {})
        self.unless_given = dict(unless_given or {})
        self.variants = [list(variant) for variant in variants or ()]
        self.keep_variants = keep_variants
        self.static_twin = static_twin
        self.needs = dict(needs or {})
        self.only = only
        self.list_only = list_only
        self.generator = generator
        self.launcher = make_launcher(**{str(key): value for key, value in (launcher or {}).items()})
        self.metric = "val/top1"
        if "basic" not in str(OmegaConf.select(config, "hydra.launcher._target_")):
            raise UserError(
                "hydra/launcher= is not used here: choose launcher=in_turn, joblib, submitit or in_process."
            )

    def folder(self, arguments: Sequence[str]) -> Path:
        """`sweep_dir=`, or one that follows from the command, so that the same command finds it again."""
        if self.config.sweep_dir is not None:
            return Path(self.config.sweep_dir).expanduser().absolute()
        words = [a for a in arguments if not belongs_to_sweep(key_of(a)) and not is_harmless(key_of(a))]
        kind = [a for a in arguments if key_of(a) in ("sweep", "hparams_search") or a.startswith("hydra.sweeper.")]
        kind = [a for a in kind if not a.startswith(NOT_OF_THE_FOLDER)]
        name = next((a.partition("=")[2] for a in kind if "." not in key_of(a)), "sweep")
        label = f"{name}-{short_hash([*words, *kind])}"
        return Path(self.config.paths.outputs).expanduser().absolute() / "sweeps" / label

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job; an impossible one raises before anything is started.

        The sweep's own groups are composed too: Hydra repeats all `hydra.` overrides, which may be of their settings.
        """
        groups = [o for o in self.config.hydra.overrides.task if key_of(o) in ("sweep", "hparams_search", "launcher")]
        cfg = self.context.config_loader.load_sweep_config(self.config, [*groups, *overrides])
        cfg.hydra.overrides.task = list(overrides)
        return cfg

    def job_run(self, plan: Plan, job: Job, folder: Path) -> JobRun:
        """A job with its folder and all its overrides, its name, W&B group and tags among them."""
        overrides = plan.command_line(job)
        cfg = self.compose(overrides)
        check_needs(cfg, self.needs)
        self.metric = str(OmegaConf.select(cfg, "callbacks.checkpoint.monitor") or self.metric)
        given = {key_of(override) for override in overrides}
        labels = {"name": quoted(Path(job.name))}
        if OmegaConf.select(cfg, "logger.wandb") is not None:
            tags = ",".join(quoted(Path(tag)) for tag in ("sweep", *map(short, job.overrides)))
            labels |= {"logger.wandb.group": quoted(Path(folder.name)), "logger.wandb.tags": f"[{tags}]"}
        overrides += [f"{key}={value}" for key, value in labels.items() if key not in given]
        script = Path(inspect.getsourcefile(inspect.unwrap(self.task_function)) or "train.py").resolve()
        return JobRun(job, folder / job.name, overrides, script, devices=count_devices(cfg))

    def launch(self, runs: Sequence[JobRun], display: Display) -> None:
        """Run the jobs; Ctrl-C or SIGTERM lets the running ones save their state, a second one does not."""
        launcher = self.launcher
        if held := [run.name for run in runs if run.is_held()]:
            display.line(f"waiting for jobs of an earlier start that still train: {', '.join(held)}")
        if isinstance(launcher, InProcess):
            launcher.call = self._call_here
        if not launcher.threaded:
            launcher.launch(runs)
            return
        failure: list[BaseException] = []

        def work() -> None:
            try:
                launcher.launch(runs)
            except BaseException as error:  # shown by the main thread
                failure.append(error)

        with stopping(launcher, display):
            thread = threading.Thread(target=work, name="launcher")
            thread.start()
            while thread.is_alive():
                thread.join(REFRESH_S)
                display.refresh()
        if failure:
            raise failure[0]

    def _call_here(self, run: JobRun, arguments: list[str]) -> int:
        """Run a job in this process, as Hydra's own launcher would."""
        cfg = self.compose(arguments)
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = 0, run.name
            cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(run.folder.parent), run.name
        done = run_hydra_job(
            hydra_context=self.context,
            task_function=self.task_function,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if done.status == JobStatus.COMPLETED:
            return 0
        run.failure = explain(done._return_value)
        return 1


class GridSweep(Sweep):
    """All jobs are known from the start."""

    def run(self, arguments: Sequence[str]) -> list[JobRun]:
        """Run or continue the sweep.

        Raises:
            UserError: the command cannot be planned, or the folder belongs to another sweep.
            SystemExit: with `exit_code` if that is not 0.
        """
        folder = self.folder(arguments)
        plan = self.plan(arguments)
        runs = [self.job_run(plan, job, folder) for job in plan.jobs]
        if self.list_only:
            for run in runs:
                print(f"{run.name:<40} {state_on_disk(run.folder):<10} python train.py {shlex.join(run.overrides)}")
            return runs
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder) as lock:
            self.launcher.keep_open = (lock,)
            save_plan(folder, plan)
            todo = [run for run in runs if not self.skip(run)]
            display = Display(runs, self.metric, folder.name, min(self.launcher.slots, max(len(todo), 1)))
            with display:
                warn_of_other_code(runs, display)
                self.launch(todo, display)
            display.summary(folder)
        if code := exit_code(runs, self.launcher.stop.is_set()):
            sys.exit(code)
        return runs

    def plan(self, arguments: Sequence[str]) -> Plan:
        """The jobs, with what the generator found if there is one; those that `only` names."""
        options = {"params": self.params, "unless_given": self.unless_given}
        variants = self.variants if self.generator is None else self.generate(arguments, options)
        options |= {"variants": variants, "keep_variants": self.keep_variants, "static_twin": self.static_twin}
        plan = make_plan(arguments, **options)
        return select(plan, self.only)

    def generate(self, arguments: Sequence[str], options: Mapping[str, Any]) -> list[list[str]]:
        """The generator's variants. Keys of theirs may have several values on the command line, which replace them."""
        several = varied(make_plan(arguments, **options)) - {"seed"}
        if several and self.keep_variants:
            raise one_value(several)
        single = [argument for argument in arguments if key_of(argument) not in several]
        first = make_plan(single, **options)
        variants: list[list[str]] = find_generator(self.generator)(self.compose(first.command_line(first.jobs[-1])))
        own = {key_of(override) for row in variants for override in row}
        if several - own:
            raise one_value(several - own)
        return variants

    def skip(self, run: JobRun) -> bool:
        """Whether a job stays as it is: finished, or failed and not to be retried."""
        found = state_on_disk(run.folder)
        if found == "finished" or (found == "failed" and not self.config.retry_failed):
            run.state, run.skipped = found, True
        return run.skipped


def check_needs(cfg: DictConfig, needs: Mapping[str, Any]) -> None:
    """A job is of the study that its sweep is about: it has these values, or any at all where null is needed.

    Raises:
        UserError: it has another.
    """
    for key, needed in needs.items():
        found = OmegaConf.select(cfg, key)  # None also for ???
        if found is None or needed not in (None, found):
            raise UserError(
                f"This sweep needs {key}={'...' if needed is None else needed}, and its jobs have {found}: give it, or "
                "the experiment that the head of the sweep's file names."
            )


def count_devices(cfg: DictConfig) -> int:
    """How many devices of this machine a job trains on; "auto" and -1 are all of them."""
    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, int) and devices >= 0:
        return devices
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = [word for word in devices.split(",") if word.strip()]
    return torch.cuda.device_count() if isinstance(devices, int | str) else len(devices)


def exit_code(runs: Sequence[JobRun], stopped: bool) -> int:
    """130 if the sweep was stopped, 1 if a job failed, `EXIT_REQUEUE` if one is to go on (a time limit), else 0."""
    states = {run.state for run in runs}
    if stopped:
        return 130
    return 1 if "failed" in states else EXIT_REQUEUE if states - {"finished"} else 0


def one_value(keys: set[str]) -> UserError:
    """For a generator, which computes variants of one network."""
    return UserError(f"{', '.join(sorted(keys))}: this sweep computes its jobs for one value. Start it once for each.")


def find_generator(name: str) -> Any:
    """The function of a dotted name."""
    from hydra.utils import get_method

    return get_method(name)


def short(override: str) -> str:
    """`experts=8` of `condconv.experts=8`: a tag of W&B, which takes 64 letters."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"[:64]


def warn_of_other_code(runs: Sequence[JobRun], display: Display) -> None:
    """Jobs that another version of the code finished are kept, but it is said."""
    commit = code_version()["commit"]
    done = [read_result(run.folder) or {} for run in runs if run.skipped]
    others = {str(result.get("commit"))[:7] for result in done if result.get("commit") != commit}
    if others:
        display.line(
            f"  jobs of other versions of the code are kept: {', '.join(sorted(others))}, now {str(commit)[:7]}"
        )


@contextmanager
def stopping(launcher: InTurn, display: Display) -> Iterator[None]:
    """While entered, Ctrl-C and SIGTERM stop the launcher: the first gently, the second at once."""

    def handle(number: int, frame: object) -> None:
        if launcher.stop.is_set():
            launcher.kill.set()
            return
        launcher.stop.set()
        display.line("Stopping: running jobs save their state. Once more to end them at once.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
