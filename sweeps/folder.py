"""The folder of a sweep: what it says it holds, and that one process at a time works on it."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.messages import UserError
from configs.results import code_version, now
from sweeps.plan import Plan, is_harmless, key_of

SWEEP_FILE = "sweep.json"
LOCK_FILE = ".sweep.lock"
# How long jobs of a killed sweep may take to end before a new start gives up.
LOCK_WAIT_S = 120.0


def save_plan(folder: Path, plan: Plan) -> None:
    """Write sweep.json: what the folder holds.

    Raises:
        UserError: it holds a sweep with other settings, whose finished jobs would be taken for this one's.
    """
    path = folder / SWEEP_FILE
    fixed = sorted(o for o in plan.fixed if not is_harmless(key_of(o)))
    jobs = {job.name: list(job.overrides) for job in plan.jobs}
    started = now()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        known, held, started = before["fixed"], before["jobs"], before["started"]
    except FileNotFoundError:
        known, held = fixed, {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: repair it, delete it, or choose another sweep_dir=") from error
    if known != fixed:
        here, there = sorted(set(fixed) - set(known)), sorted(set(known) - set(fixed))
        raise UserError(
            f"{folder} holds a sweep with other settings (there: {' '.join(there) or 'none'}; here: "
            f"{' '.join(here) or 'none'}): its jobs would be taken for these. Choose another sweep_dir="
        )
    if other := sorted(name for name in jobs.keys() & held.keys() if sorted(jobs[name]) != sorted(held[name])):
        there, here = (" ".join(sorted(of[other[0]])) for of in (held, jobs))
        raise UserError(
            f"{folder} holds another job of the name {other[0]} (there: {there}; here: {here}): its result would be "
            "taken for this one's. Choose another sweep_dir="
        )
    text = {"started": started, "command": list(sys.argv), "fixed": fixed, "jobs": {**held, **jobs}, **code_version()}
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Hold the sweep's lock; its jobs hold it too, so it is free when the last job of a killed sweep has ended.

    Raises:
        UserError: another sweep holds it.
    """
    path = folder / LOCK_FILE
    with path.open("a") as file:
        deadline, told = time.monotonic() + LOCK_WAIT_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another process works on {folder}: stop it, or choose another sweep_dir="
                    ) from None
                if not told:
                    print(f"Waiting for the jobs of an earlier start in {folder} to end ...", flush=True)
                    told = True
                time.sleep(0.5)
        yield file.fileno()
