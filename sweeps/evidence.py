"""All studies of the evidence on CIFAR-10 from one command: `python -m sweeps.evidence data.root=/cifar10`.

Each study is a sweep of its own (`configs/sweep/cifar10/`), so a command that was stopped goes on there: finished
jobs are kept, others go on from their last checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from condconv.files import LAST, newest_good
from configs.messages import EXIT_REQUEUE, UserError
from configs.results import ROOT, read_result
from sweeps.evidence_options import HELP, STATIC, STUDIES, Evidence, parse, typed

STUDIES_FILE = ROOT / "docs" / "results" / "cifar10" / "studies.yaml"
PLAIN = ("experts", "second_backbone", "backbones", "tuned")
"""The studies whose networks with experts have nothing else changed about these: the best of them is analysed."""
MINUTES: Mapping[str, float] = {
    "experts-0": 25, "experts-1": 30, "experts-4": 35, "experts-8": 36, "experts-16": 45, "width-0.27": 30,
    "width-0.709": 150, "resnet18": 45, "augment": 50, "max_epochs-50": 65, "max_train_per_class-5000": 80,
}  # fmt: skip
"""Rough CPU minutes of a run of the reduced protocol on one core, by a part of its name; the last that fits counts."""


def keep_runs(evidence: Evidence) -> int:
    """Copy collected runs that the root lacks, so that they count as done; returns how many.

    They have no checkpoints, so `upcycled` cannot start from them.
    """
    if evidence.keep is None:
        return 0
    if not evidence.keep.is_dir():
        raise UserError(f"keep={evidence.keep}: there is no such folder.")
    count = 0
    for result in sorted(evidence.keep.glob("*/*/result.json")):
        target = evidence.runs / result.parent.relative_to(evidence.keep)
        if not target.exists():
            shutil.copytree(result.parent, target)
            count += 1
    return count


def is_kept(evidence: Evidence, study: str, name: str) -> bool:
    """Whether `keep=` holds a job that a start would copy."""
    if evidence.keep is None or (evidence.runs / study / name).exists():
        return False
    return is_finished(evidence.keep / study / name)


def is_finished(folder: Path) -> bool:
    """Whether a run's training has come to its end."""
    return (read_result(folder) or {}).get("status") == "finished"


def planned(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(study, job, how it stands) of everything, as the sweeps list it, several of them at a time.

    Raises:
        UserError: a sweep cannot be planned.
    """

    def listed(step: tuple[str, tuple[str, ...]]) -> list[tuple[str, str, str]]:
        study, seeds = step
        command = evidence.command(study, seeds, "hydra.sweeper.list_only=true")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{study}: {done.stderr.strip().removeprefix('error: ') or done.stdout.strip()}")
        lines = [line.split()[:2] for line in done.stdout.splitlines() if " python train.py " in line]
        return [(study, name, "finished" if is_kept(evidence, study, name) else state) for name, state in lines]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(chain.from_iterable(pool.map(listed, evidence.steps())))


def minutes(evidence: Evidence, study: str, name: str) -> float | None:
    """CPU minutes that a job may take: the mean of its finished runs with other seeds, else `MINUTES`."""
    stem = name.rpartition("_seed-")[0]
    results = [read_result(folder) or {} for folder in (evidence.runs / study).glob(f"{stem}_seed-*")]
    taken = [float(r.get("cpu_seconds") or r["seconds"]) / 60 for r in results if r.get("status") == "finished"]
    if taken:
        return statistics.fmean(taken)
    known = [value for part, value in MINUTES.items() if re.search(rf"{re.escape(part)}(?![\d.])", name)]
    return known[-1] if known and evidence.protocol == "reduced" else None


def show_plan(evidence: Evidence, jobs: Sequence[tuple[str, str, str]]) -> None:
    """Print the jobs, how each stands, and an estimate."""
    total, unknown = 0.0, 0
    for study, name, state in jobs:
        needed = None if state == "finished" else minutes(evidence, study, name)
        total += needed or 0.0
        unknown += state != "finished" and needed is None
        estimate = "" if state == "finished" else "?" if needed is None else f"about {needed:.0f} CPU minutes"
        print(f"{study:<16} {name:<48} {state:<10} {estimate}")
    left = sum(state != "finished" for *_, state in jobs)
    print(f"\n{len(jobs)} jobs, {left} to run", end="")
    if total:
        hours = total / 60
        print(
            f": about {hours:.1f} hours of one core, {hours / evidence.jobs:.1f} with {evidence.jobs} at a time", end=""
        )
    print(f"; nothing is known about the time of {unknown}" if unknown else "")


def run(evidence: Evidence) -> int:
    """Run all steps; returns the exit code. A job that failed, or reached its time limit, does not end the others."""
    code = 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the committed runs, whose CPU times compare
    for study, seeds in evidence.steps():
        if study == "upcycled":
            seeds = with_static_network(evidence, seeds)
            if not seeds:
                code = code or 1
                continue
        command = evidence.command(study, seeds)
        print(f"\n== {study}, seeds {','.join(seeds)}: {shlex.join(['python', *command[1:]])}", flush=True)
        ended = _call(command)
        if ended not in (0, 1, EXIT_REQUEUE):
            return ended
        code = 1 if 1 in (code, ended) else max(code, ended)
    return code


def with_static_network(evidence: Evidence, seeds: Sequence[str]) -> tuple[str, ...]:
    """The seeds whose upcycled networks are done, or have the finished one they start from; the others are said."""
    found = []
    for seed in seeds:
        start = Path(str(evidence.runs / STATIC).replace("${seed}", seed))
        if (start.is_file() and is_finished(start.parents[1])) or all(
            is_finished(evidence.runs / "upcycled" / f"experts-{n}_seed-{seed}") for n in (0, 8)
        ):
            found.append(seed)
        else:
            what = "not finished:" if start.is_file() else "there is no"
            print(
                f"upcycled, seed {seed}: {what} {start}. Run studies=experts for it first; runs that keep= "
                f"brought have no checkpoints, so delete that one to train it again.",
                file=sys.stderr,
            )
    return tuple(found)


def _call(command: Sequence[str]) -> int:
    """Run a command to its end; what stops this process is passed on to it, and it may save its state."""
    process = subprocess.Popen(command)

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGTERM:  # Ctrl-C reaches it by itself, as a process of the same terminal
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def analyse(evidence: Evidence) -> int:
    """Routing analysis of the best network with 8 experts, beside the report; returns the exit code."""
    if evidence.out is None:
        return 0
    best = best_with_experts(evidence.runs)
    if best is None:
        print(f"no routing analysis: no finished run with 8 experts and a checkpoint in studies={','.join(PLAIN)}")
        return 0
    print(f"\n== routing analysis of {best}", flush=True)
    if not (best / "analysis" / "index.md").is_file():
        words = [f"ckpt={typed(best / LAST)}", "analysis=routing", "logger=none"]
        code = _call([sys.executable, str(ROOT / "eval.py"), *words])
        if code:
            return code
    words = [f"analysis={(best / 'analysis').absolute()}", f"out={(evidence.out / 'analysis').absolute()}"]
    return subprocess.run([sys.executable, "-m", "reports.collect", *words], cwd=ROOT).returncode


def best_with_experts(runs: Path) -> Path | None:
    """The finished run, with a checkpoint, that is best on test images of those with 8 plain experts: its folder."""
    found = []
    for folder in (folder for study in PLAIN for folder in (runs / study).glob("*experts-8*_seed-*")):
        figure = ((read_result(folder) or {}).get("figures") or {}).get("test/top1")
        if is_finished(folder) and figure is not None and newest_good(folder / LAST):
            found.append((figure, folder))
    return max(found)[1] if found else None


def report(evidence: Evidence) -> int:
    """Write the report of what is finished, from copies without paths, so that kept runs and new ones compare."""
    if evidence.out is None:
        return 0
    copies, out = (evidence.out / "runs").absolute(), evidence.out.absolute()
    words = [f"runs={evidence.runs.absolute()}", f"out={copies}"]
    code = subprocess.run([sys.executable, "-m", "reports.collect", *words], cwd=ROOT).returncode
    if code:
        return code
    words = [f"runs={copies}", f"out={out}", "links=false"]
    words += [f"studies={STUDIES_FILE}"] if evidence.protocol == "reduced" else []
    return subprocess.run([sys.executable, str(ROOT / "report.py"), *words]).returncode


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(HELP.format(studies=", ".join(STUDIES)), end="")
        return
    try:
        evidence = parse([word for word in words if word != "--dry-run"])
        if "--dry-run" in words:
            show_plan(evidence, planned(evidence))
            return
        kept = keep_runs(evidence)
        if kept:
            print(f"{kept} runs of {evidence.keep} count as done")
        code = run(evidence)
        if code in (0, 1, EXIT_REQUEUE):
            code = analyse(evidence) or report(evidence) or code
        sys.exit(code)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
