"""The live table of a sweep at a terminal: what it draws, and which jobs it shows where there are too many."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.results import write_result
from sweeps.display import MOST_ROWS, Display
from sweeps.jobs import STATES, JobRun
from sweeps.plan import Job

STOPS = "Ctrl-C stops; the same command goes on"


def sweep(folder: Path, states: list[str]) -> list[JobRun]:
    """A job for each state: the running ones began a minute ago and are half way, the finished ones took 30 s."""
    runs = []
    for number, state in enumerate(states):
        run = JobRun(Job(f"job-{number:02d}", ()), folder / f"job-{number:02d}", [], state=state)
        if state == "running":
            run.folder.mkdir()
            (run.folder / "config.yaml").write_text("trainer: {max_epochs: 4, max_steps: -1}")
            (run.folder / "metrics.csv").write_text("epoch,step,val/top1\n2,9,0.1234\n")
            run.started_s = time.time() - 60
        elif state in ("finished", "failed"):
            run.seconds = 30.0
            write_result(run.folder, {"status": state, "seconds": 30.0, "error": "the sky fell", "figures": {}})
        runs.append(run)
    return runs


def terminal(height: int = 60) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200, height=height, color_system=None)


def drawn(console: Console) -> str:
    """What was written since the last call."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    console.file.seek(0)
    console.file.truncate()
    return text


def rows(text: str) -> dict[str, str]:
    """The last table of the text: the line of each job, by its name."""
    lines = re.findall(r"│ (job-\d\d)(.*)", text.rpartition("a sweep\n")[2])
    assert len(dict(lines)) == len(lines)
    return dict(lines)


def test_a_terminal_gets_a_live_table(tmp_path: Path) -> None:
    runs = sweep(tmp_path, ["finished"] * 8 + ["failed", "interrupted", "running", "running"] + ["waiting"] * 18)
    console = terminal()
    with Display(runs, "val/top1", "a sweep", slots=2, console=console) as display:
        assert "a sweep: 30 jobs" in drawn(console)
        display.refresh()
        display._live.refresh()  # type: ignore[union-attr]  # as its thread does twice a second
        text = drawn(console)
        shown = rows(text)
        assert len(shown) == MOST_ROWS
        assert re.search(r"running .* 50 % .* 0\.1234 .* 6\d s", shown["job-10"])
        assert re.search(r"finished .* 100 % .* 30 s", shown["job-07"]) and "failed" in shown["job-08"]
        counts = "18 waiting  2 running  8 finished  1 failed  1 interrupted"
        assert f"{counts}  about 5 min left    {STOPS}" in text  # (18 + 2 halves) * 30 s, two at a time
        runs[10].state, runs[11].state = "finished", "failed"
        write_result(runs[11].folder, {"status": "failed", "error": "out of memory"})
        display.refresh()
        text = drawn(console)
        assert "job-11 failed  out of memory" in text and "job-10 finished" not in text, "the table says it"


@pytest.mark.parametrize(
    ("states", "running"),
    [
        (["running"] * 2 + ["waiting"] * 28, {0, 1}),
        (["finished"] * 14 + ["running"] * 2 + ["waiting"] * 14, {14, 15}),
        (["finished"] * 28 + ["running"] * 2, {28, 29}),
        # Another process still trains the first one, or Slurm starts them as it likes.
        (["waiting"] * 28 + ["running"] * 2, {28, 29}),
    ],
)
@pytest.mark.parametrize("height", [60, 24])
def test_running_jobs_are_on_the_screen(states: list[str], running: set[int], height: int, tmp_path: Path) -> None:
    console = terminal(height)
    with Display(sweep(tmp_path, states), "val/top1", "a sweep", console=console) as display:
        drawn(console)
        display._live.refresh()  # type: ignore[union-attr]
        text = drawn(console)
    shown = rows(text)
    assert {f"job-{number:02d}" for number in running} <= set(shown)
    assert len(shown) <= MOST_ROWS and STOPS in text


def test_elsewhere_a_line_says_what_has_changed(tmp_path: Path) -> None:
    runs = sweep(tmp_path, ["finished", "waiting"])
    console = Console(file=io.StringIO(), width=200)
    with Display(runs, "val/top1", "a sweep", console=console) as display:
        runs[1].state = "running"
        display.refresh()
        assert drawn(console) == "a sweep: 2 jobs\n[1/2] job-01 running\n"
    assert drawn(console) == ""


def test_every_state_has_a_row(tmp_path: Path) -> None:
    console = terminal()
    console.print(Display(sweep(tmp_path, list(STATES)), "val/top1", "a sweep", console=console).table())
    assert [line.split()[1] for line in rows(drawn(console)).values()] == list(STATES)
