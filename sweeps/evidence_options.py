"""What `python -m sweeps.evidence` is asked for: studies, protocols, and the command line of each study."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.messages import UserError, did_you_mean
from configs.results import ROOT
from sweeps.jobs import quoted

HELP = """Run the studies of docs/results/cifar10.md, go on where they stopped, write the report and a routing analysis.

  python -m sweeps.evidence data.root=/cifar10                  everything, one job for each core at a time
  python -m sweeps.evidence data.root=/cifar10 studies=experts  one study; several with commas
  python -m sweeps.evidence data.root=/cifar10 --dry-run        what would be run, and how long it may take

  data.root=   folder with train/ and val/, one folder of CIFAR-10's image files per class
  studies=     some of {studies};
               full: backbones too, but not tuned, regimes [all of the protocol]
  protocol=    reduced (CPUs: 20,000 images, 25 epochs) or full (GPUs: all images, 100 epochs) [reduced]
  runs=        folder of the runs [outputs/evidence/<protocol>]
  jobs=        how many at a time, one thread each [as many as cores; 1 with a GPU]
  seeds=       of all but tuning, which has its own [1,2,3; full: 1,2,3,4,5]
  order=       studies: one study after the other; seeds: all studies of the first seed first [studies]
  keep=        a folder of collected runs that count as done: docs/results/cifar10/runs; null: from scratch [null]
  out=         folder of the report; null: none [<runs>-report]

Any other key=value is passed on to every training (trainer=gpu, trainer.max_epochs=2, ...). Ctrl-C: running jobs save
their state; the same command goes on. Exit code: 0, 1 if a job failed, 75 if one reached its trainer.max_time, 130 if
stopped.
"""
OPTIONS = ("studies", "protocol", "runs", "jobs", "seeds", "order", "keep", "out")
STUDIES = ("experts", "second_backbone", "tuning", "tuned", "upcycled", "router_gain", "controls")
STUDIES += ("one_expert", "first_block", "routing", "causes", "regimes")
"""In the order in which they are run; `upcycled` needs the static networks of `experts`."""
OWN_SEEDS: Mapping[str, tuple[str, ...]] = {"tuning": ("11",)}
"""Of studies that seeds= does not reach: what is tuned on held-out images shares no seed with what is compared."""
ONLY_REDUCED = ("tuned", "regimes")
"""`tuned` has the rates of the reduced recipe, and the full recipe holds `regimes` already."""
PROTOCOLS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "reduced": (STUDIES, "1,2,3"),
    "full": (("experts", "backbones", *(study for study in STUDIES[1:] if study not in ONLY_REDUCED)), "1,2,3,4,5"),
}
FULL_EXPERTS = "condconv.experts=0,8,16,4,2,1"
# What experiment=cifar10/upcycled changes of the reduced protocol.
FULL_UPCYCLED = ["condconv.init=upcycle", "optim.base_lr=0.2"]
STATIC = "experts/experts-0_seed-${seed}/checkpoints/last.ckpt"


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
        full = self.protocol == "full"
        name = "upcycled" if upcycled and not full else self.protocol
        words = [sys.executable, str(ROOT / "train.py"), "-m", f"experiment=cifar10/{name}", f"sweep=cifar10/{study}"]
        words += [f"data.root={typed(self.data)}", f"sweep_dir={typed(self.runs / study)}", f"seed={','.join(seeds)}"]
        words += [FULL_EXPERTS] if study == "experts" and full else []
        words += FULL_UPCYCLED if upcycled and full else []
        words += [f"pretrained={typed(self.runs / STATIC)}"] if upcycled else []
        words += ["launcher=joblib", f"hydra.sweeper.launcher.n_jobs={self.jobs}"] if self.jobs > 1 else []
        return [*words, *self.others, *more]

    def steps(self) -> list[tuple[str, tuple[str, ...]]]:
        """(study, seeds) in the order in which they are run."""
        if not self.by_seed:
            return [(study, OWN_SEEDS.get(study, self.seeds)) for study in self.studies]
        own = [(study, OWN_SEEDS[study]) for study in self.studies if study in OWN_SEEDS]
        return own + [(study, (seed,)) for seed in self.seeds for study in self.studies if study not in OWN_SEEDS]


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
        _path(given.get("out", f"{runs}-report")),
        tuple(others),
    )


def _path(text: str) -> Path | None:
    return None if text == "null" else Path(text).expanduser()


def typed(path: Path) -> str:
    """A path as it is typed: in quotes only where it must be, since a sweep compares the words."""
    return str(path) if re.fullmatch(r"[\w./${}-]+", str(path)) else quoted(path)


def _known(key: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(
            f"{key}={value}: there is no such choice. {did_you_mean(value, choices)}Choose from: {', '.join(choices)}."
        )


def _slots() -> int:
    import joblib

    return 1 if shutil.which("nvidia-smi") else joblib.cpu_count()  # of those that this process may use
