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
from dataclasses import dataclass
from pathlib import Path

from configs.messages import UserError, did_you_mean
from configs.results import ROOT, read_result
from configs.runs import LAST, newest_good
from sweeps.jobs import quoted

HELP = """Run the studies of docs/results/cifar10.md, go on where they stopped, write the report and a routing analysis.

  python -m sweeps.evidence data.root=/cifar10                  everything, one job for each core at a time
  python -m sweeps.evidence data.root=/cifar10 studies=experts  one study; several with commas
  python -m sweeps.evidence data.root=/cifar10 --dry-run        what would be run, and how long it may take

  data.root=   folder with train/ and val/, one folder of CIFAR-10's image files per class
  studies=     some of {studies} [all of the protocol]
  protocol=    reduced (CPUs: 20,000 images, 25 epochs) or full (GPUs: all images, 100 epochs) [reduced]
  runs=        folder of the runs [outputs/evidence/<protocol>]
  jobs=        how many at a time, one thread each [as many as cores; 1 with a GPU]
  seeds=       [1,2,3; full: 1,2,3,4,5]
  order=       studies: one study after the other; seeds: all studies of the first seed first [studies]
  keep=        a folder of collected runs that count as done: docs/results/cifar10/runs; null: from scratch [null]
  out=         folder of the report; null: none [<runs>/report]

Any other key=value is passed on to every training (trainer=gpu, trainer.max_epochs=2, ...). Ctrl-C: running jobs save
their state; the same command goes on. Exit code: 0, 1 if a job failed, 130 if stopped.
"""
OPTIONS = ("studies", "protocol", "runs", "jobs", "seeds", "order", "keep", "out")
STUDIES = ("experts", "second_backbone", "upcycled", "router_gain", "controls", "first_block", "routing")
STUDIES += ("causes", "regimes")
"""In the order in which they are run; `upcycled` needs the static networks of `experts`."""
PROTOCOLS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "reduced": (STUDIES, "1,2,3"),
    "full": (("backbones", *STUDIES), "1,2,3,4,5"),
}
STUDIES_FILE = ROOT / "docs" / "results" / "cifar10" / "studies.yaml"
STATIC = "experts/experts-0_seed-${seed}/checkpoints/last.ckpt"
MINUTES: Mapping[str, float] = {
    "experts-0": 25, "experts-1": 35, "experts-4": 40, "experts-8": 45, "experts-16": 55, "width-0.27": 30,
    "width-0.709": 150, "resnet18": 40,
}  # fmt: skip
"""Rough CPU minutes of a run of the reduced protocol on one core, by a part of its name; the last that fits counts."""


@dataclass(frozen=True)
class Evidence:
    """What the command asks for; see `HELP`."""

    data: Path
    studies: tuple[str, ...]
    protocol: str
    runs: Path
    jobs: int
    seeds: tuple[str, ...]
    by_seed: bool
    keep: Path | None
    out: Path | None
    others: tuple[str, ...]

    def command(self, study: str, seeds: Sequence[str], *more: str) -> list[str]:
        """The command line of a study's sweep."""
        upcycled = study == "upcycled"
        name = "upcycled" if upcycled else self.protocol
        words = [sys.executable, str(ROOT / "train.py"), "-m", f"experiment=cifar10/{name}", f"sweep=cifar10/{study}"]
        words += [f"data.root={_value(self.data)}", f"sweep_dir={_value(self.runs / study)}", f"seed={','.join(seeds)}"]
        words += [f"pretrained={_value(self.runs / STATIC)}"] if upcycled else []
        words += ["launcher=joblib", f"hydra.sweeper.launcher.n_jobs={self.jobs}"] if self.jobs > 1 else []
        return [*words, *self.others, *more]

    def steps(self) -> list[tuple[str, tuple[str, ...]]]:
        """(study, seeds) in the order in which they are run."""
        if self.by_seed:
            return [(study, (seed,)) for seed in self.seeds for study in self.studies]
        return [(study, self.seeds) for study in self.studies]


def parse(words: Sequence[str]) -> Evidence:
    """The words of the command line.

    Raises:
        UserError: something is missing or not known; the message says what to give.
    """
    given: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or word.startswith("-"):
            raise UserError(f"{word}: expected key=value or --dry-run; --help lists the keys.")
        if key in OPTIONS or key == "data.root":
            given[key] = value
        elif key in ("seed", "sweep", "sweep_dir", "experiment", "launcher"):
            raise UserError(f"{key}= is the studies' own: use seeds=, studies=, runs=, protocol= or jobs=.")
        else:
            others.append(word)
    if not given.get("data.root"):
        raise UserError(
            "Where is CIFAR-10? Give the folder with train/ and val/, one folder of image files per class: "
            'make evidence ARGS="data.root=/cifar10"'
        )
    data = Path(given["data.root"]).expanduser()
    if not (data / "train").is_dir():
        raise UserError(f"data.root={data}: there is no {data / 'train'}; it must hold train/ and val/.")
    protocol = given.get("protocol", "reduced")
    _known("protocol", protocol, list(PROTOCOLS))
    studies, seeds = PROTOCOLS[protocol]
    chosen = tuple(filter(None, given.get("studies", "").split(","))) or studies
    for study in chosen:
        _known("studies", study, list(studies))
    _known("order", given.get("order", "studies"), ["studies", "seeds"])
    jobs = given.get("jobs", str(_slots()))
    if not jobs.isdigit() or int(jobs) < 1:
        raise UserError(f"jobs={jobs}: expected a whole number of at least 1.")
    runs = Path(given.get("runs", f"outputs/evidence/{protocol}")).expanduser()
    return Evidence(
        data,
        tuple(sorted(chosen, key=studies.index)),
        protocol,
        runs,
        int(jobs),
        tuple(given.get("seeds", seeds).split(",")),
        given.get("order") == "seeds",
        _path(given.get("keep", "null")),
        _path(given.get("out", str(runs / "report"))),
        tuple(others),
    )


def _path(text: str) -> Path | None:
    return None if text == "null" else Path(text).expanduser()


def _value(path: Path) -> str:
    """A path as it is typed: in quotes only where it must be, since a sweep compares the words."""
    return str(path) if re.fullmatch(r"[\w./${}-]+", str(path)) else quoted(path)


def _known(key: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(
            f"{key}={value}: there is no such choice. {did_you_mean(value, choices)}Choose from: {', '.join(choices)}."
        )


def _slots() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if shutil.which("nvidia-smi") else cores


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


def planned(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(study, job, how it stands) of everything, as the sweeps list it.

    Raises:
        UserError: a sweep cannot be planned.
    """
    found = []
    for study, seeds in evidence.steps():
        command = evidence.command(study, seeds, "hydra.sweeper.list_only=true")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{study}: {done.stderr.strip().removeprefix('error: ') or done.stdout.strip()}")
        lines = [line.split()[:2] for line in done.stdout.splitlines() if " python train.py " in line]
        found += [(study, name, state) for name, state in lines]
    return found


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
    print(f"\n{len(jobs)} jobs, {left} to run: about {total / 60:.1f} hours of one core", end="")
    print(f", {total / 60 / evidence.jobs:.1f} hours with {evidence.jobs} at a time", end="")
    print(f"; nothing is known about {unknown}" if unknown else "")


def run(evidence: Evidence) -> int:
    """Run all steps; returns the exit code. A failed job does not end the others."""
    code = 0
    for study, seeds in evidence.steps():
        command = evidence.command(study, seeds)
        print(f"\n== {study}, seeds {','.join(seeds)}: {shlex.join(['python', *command[1:]])}", flush=True)
        ended = _call(command)
        if ended not in (0, 1):
            return ended
        code = max(code, ended)
    return code


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
    found = []
    for folder in (evidence.runs / "experts").glob("experts-8_seed-*"):
        result = read_result(folder) or {}
        figure = (result.get("figures") or {}).get("test/top1")
        if result.get("status") == "finished" and figure is not None and newest_good(folder / LAST):
            found.append((figure, folder))
    if not found:
        print("no routing analysis: no finished run with 8 experts and a checkpoint in studies=experts")
        return 0
    best = max(found)[1]
    print(f"\n== routing analysis of {best}", flush=True)
    if not (best / "analysis" / "index.md").is_file():
        words = [f"ckpt={_value(best / LAST)}", "analysis=routing", "logger=none"]
        code = _call([sys.executable, str(ROOT / "eval.py"), *words])
        if code:
            return code
    words = [f"analysis={(best / 'analysis').absolute()}", f"out={(evidence.out / 'analysis').absolute()}"]
    return subprocess.run([sys.executable, "-m", "reports.collect", *words], cwd=ROOT).returncode


def report(evidence: Evidence) -> int:
    """Write the report of what is finished so far."""
    if evidence.out is None:
        return 0
    words = [f"runs={evidence.runs}", f"out={evidence.out}", f"studies={STUDIES_FILE}"]
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
        if code in (0, 1):
            code = analyse(evidence) or report(evidence) or code
        sys.exit(code)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
