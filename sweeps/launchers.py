"""Where jobs run: in turn, several at once on this machine (joblib), on a cluster (submitit), or in this process."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from configs.messages import UserError
from sweeps.jobs import JobRun

# Lightning's word for an allocation in which a training starts its processes itself, as without SLURM (trainer=ddp):
# otherwise it takes submitit's one task for all there are, and requeues jobs behind the sweep's back.
OWN_PROCESSES = {"SLURM_JOB_NAME": "bash"}


class InTurn:
    """One job after the other, each in a process of its own.

    A job that crashes, leaks or runs out of memory takes nothing with it, its peak memory is its own, and a distributed
    job starts its processes as it would without a sweep.
    """

    slots = 1
    threaded = True

    def __init__(self) -> None:
        self.stop = Event()
        self.kill = Event()
        self.keep_open: tuple[int, ...] = ()

    def launch(self, runs: Sequence[JobRun]) -> None:
        """Run all; returns when all have ended, or the running ones after `stop` or `kill` was set."""
        for run in runs:
            run.run(self.stop, self.kill, self.keep_open)


class Joblib(InTurn):
    """Several at once on this machine: joblib's threads, each of which waits for the process of its job.

    Args:
        n_jobs: as joblib takes it: a number of jobs, -1 for one for each core.
        gpus: give each job with one device a GPU of its own, in turn; None: if there are several.
    """

    def __init__(self, n_jobs: int = 2, gpus: bool | None = None) -> None:
        super().__init__()
        import joblib

        if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs == 0:
            raise UserError(f"launcher.n_jobs={n_jobs}: expected a number of jobs, or -1 for one for each core.")
        self.slots = joblib.effective_n_jobs(n_jobs)
        self.gpus = gpus

    def launch(self, runs: Sequence[JobRun]) -> None:
        import joblib
        import torch

        places: queue.Queue[int] = queue.Queue()
        for place in range(self.slots):
            places.put(place)
        gpus = _visible_gpus(torch.cuda.device_count())
        share_gpus = len(gpus) > 1 if self.gpus is None else self.gpus and bool(gpus)
        threads = str(max(1, joblib.cpu_count() // self.slots))

        def run_one(run: JobRun) -> None:
            place = places.get()
            try:
                # Without this every job starts a thread for each core, and they fight.
                run.environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", threads))
                if share_gpus and run.devices == 1:
                    run.environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
                run.run(self.stop, self.kill, self.keep_open)
            finally:
                places.put(place)

        joblib.Parallel(n_jobs=self.slots, backend="threading")(joblib.delayed(run_one)(run) for run in runs)


class Submitit(InTurn):
    """Through submitit: jobs of SLURM, or processes of this machine (cluster="local", for trying things out).

    The sweep's process waits for the jobs. If it is stopped, it cancels them; they save their state, and go on when the
    sweep is started again. If it is killed, they run on, and the next start waits for those that have begun.

    Args:
        cluster: slurm, local, or None for what there is.
        max_at_once: jobs that wait or run at the same time.
        options: parameters of `submitit.AutoExecutor`, e.g. timeout_min, cpus_per_task, slurm_partition.
    """

    poll_s = 1.0

    def __init__(self, cluster: str | None = None, max_at_once: int = 64, **options: Any) -> None:
        super().__init__()
        if cluster not in (None, "slurm", "local"):
            raise UserError(f"launcher.cluster={cluster}: choose slurm, local or null.")
        self.cluster = cluster
        self.slots = max_at_once
        self.options = {key: value for key, value in options.items() if value is not None}

    def launch(self, runs: Sequence[JobRun]) -> None:
        import submitit

        waiting, running = list(runs), dict[int, tuple[JobRun, Any]]()
        while (waiting and not self.stop.is_set()) or running:
            for run in [run for run in waiting if not run.is_held()]:
                if len(running) >= self.slots or self.stop.is_set():
                    break
                waiting.remove(run)
                if run.ended_meanwhile():
                    continue
                command = run.prepare()
                executor = submitit.AutoExecutor(folder=str(run.folder / "submitit"), cluster=self.cluster)
                executor.update_parameters(name=run.name[:60], **self.options)
                # CommandFunction(env=...) would be the whole environment; so the job has its node's and what is added.
                added = {**OWN_PROCESSES, **run.environment, **run.own_environment("any")}
                command = ["env", *(f"{name}={value}" for name, value in added.items()), *command]
                function = submitit.helpers.CommandFunction(command, verbose=False, cwd=os.getcwd())
                running[id(run)] = (run, executor.submit(function))
            for key, (run, job) in list(running.items()):
                if self.stop.is_set() or self.kill.is_set():
                    job.cancel()
                if job.done():
                    del running[key]
                    run.end(_exit_code(job), stopped=self.stop.is_set())
            time.sleep(self.poll_s)


class InProcess(InTurn):
    """In this process: starts at once, for tests and very short jobs. Nothing keeps jobs apart from each other.

    Peak memory is that of all jobs so far, a crash ends the sweep, and distributed jobs do not work.
    """

    threaded = False

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[[JobRun, list[str]], int] = lambda run, arguments: 1  # set by the sweeper

    def launch(self, runs: Sequence[JobRun]) -> None:
        for run in runs:
            if run.is_to_run(self.stop):
                arguments = run.prepare()[3:]
                try:
                    run.end(self.call(run, arguments))
                except (KeyboardInterrupt, SystemExit):
                    self.stop.set()
                    run.end(1, stopped=True)


LAUNCHERS: dict[str, Callable[..., InTurn]] = {
    "in_turn": InTurn,
    "joblib": Joblib,
    "submitit": Submitit,
    "in_process": InProcess,
}


def make_launcher(kind: str = "in_turn", **options: Any) -> InTurn:
    """A launcher by its name.

    Raises:
        UserError: there is none of this name, it lacks its package, or does not take these options.
    """
    try:
        return LAUNCHERS[kind](**options)
    except KeyError:
        raise UserError(f"launcher={kind}: choose one of {', '.join(LAUNCHERS)}.") from None
    except ImportError as error:
        raise UserError(f"launcher={kind} needs a package: {error}. pip install -e '.[train]'") from error
    except TypeError as error:
        raise UserError(f"launcher={kind}: {error}.") from error


def _visible_gpus(count: int) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs, MIG instances."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else [str(number) for number in range(count)]


def _exit_code(job: Any) -> int:
    """0, or 1 for whatever went wrong: the command failed, was cancelled, timed out, or its node was lost."""
    return 0 if job.exception() is None else 1
