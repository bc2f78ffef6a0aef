"""What people see of a sweep: a live table at a terminal, a line for each change elsewhere, a summary at the end."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from configs.results import read_result
from sweeps.jobs import STATES, JobRun, Progress, final_figure, progress, training_length

STYLES = {"running": "cyan", "finished": "green", "failed": "bold red", "interrupted": "yellow", "waiting": "dim"}
# Rows of the live table; a terminal with fewer lines gets fewer, since rich cuts off the end of what does not fit.
MOST_ROWS = 24
# Lines around them: title, head and borders, and up to three below, which may wrap.
OTHER_LINES = 8


class Display:
    """Shows the jobs of a sweep.

    Args:
        runs: all jobs, the skipped ones included.
        metric: of validation; the test figure that goes with it is shown for finished jobs.
        title: of the tables.
        slots: jobs that run at the same time, for the time left.
        console: where to write; a terminal gets the live table.
    """

    def __init__(
        self, runs: Sequence[JobRun], metric: str, title: str, slots: int = 1, console: Console | None = None
    ) -> None:
        self.runs = runs
        self.metric = metric
        self.title = title
        self.slots = slots
        self.console = console or Console()
        self._shown = {id(run): run.state for run in runs}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        counts = Counter(run.state for run in self.runs if run.skipped)
        skipped = ", ".join(f"{count} {state}" for state, count in counts.items())
        self.line(
            f"{self.title}: {len(self.runs)} jobs" + (f", of which left as they are: {skipped}" if skipped else "")
        )
        if self.console.is_terminal:
            self._live = Live(self.table(), console=self.console, refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None
        self.refresh()

    def refresh(self) -> None:
        """Take over what has changed since the last call."""
        if self._live is not None:
            self._live.update(self.table())
        for run in self.runs:
            if self._shown[id(run)] != run.state:
                self._shown[id(run)] = run.state
                if self._live is None or run.state == "failed":
                    self.line(self._change(run))

    def line(self, text: str) -> None:
        """Print a line, above the live table if there is one."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _change(self, run: JobRun) -> str:
        done = sum(each.state in ("finished", "failed") for each in self.runs)
        words = [f"[{done}/{len(self.runs)}] {run.name} {run.state}"]
        if run.state == "running":
            resumed = run.arguments()[0].startswith("resume=")
            return "  ".join([*words, "goes on from its checkpoint"] if resumed else words)
        figure = final_figure(read_result(run.folder), self.metric) if run.state == "finished" else None
        if figure is not None:
            words.append(f"{figure[0]} {figure[1]:.4f}")
        if run.state == "failed":
            words.append(run.error())
        left = self.seconds_left()
        return "  ".join([*words, f"{run.seconds:.0f} s", *([f"about {duration(left)} left"] if left else [])])

    def seconds_left(self) -> float | None:
        """Estimate from the finished jobs, else from how far the running ones are; None before either says anything."""
        mine = [run for run in self.runs if not run.skipped]
        known = [run.seconds for run in mine if run.state == "finished"]
        shares = {id(run): self._progress(run).share for run in mine if run.state == "running"}
        if not known:
            now = time.time()
            known = [(now - run.started_s) / shares[id(run)] for run in mine if shares.get(id(run), 0.0) > 0.02]
        if not known:
            return None
        waiting = sum(run.state == "waiting" for run in mine)
        return statistics.mean(known) * (waiting + sum(1 - share for share in shares.values())) / self.slots

    def _progress(self, run: JobRun) -> Progress:
        return progress(run.folder, self.metric, training_length)

    def table(self) -> Group:
        """The live table: all jobs, or those around the running ones if there are too many."""
        counts = Counter(run.state for run in self.runs)
        left = self.seconds_left()
        words = [f"{counts[state]} {state}" for state in STATES if counts[state]]
        words += [f"about {duration(left)} left"] if left else []
        table = Table(title=self.title, title_justify="left")
        table.add_column("job", overflow="fold")
        for column in ("state", "done", self.metric, "time"):
            table.add_column(column, justify="right")
        for run in self._rows():
            table.add_row(Text(run.name), Text(run.state, STYLES[run.state]), *self._cells(run))
        return Group(table, Text("  ".join(words) + "    Ctrl-C stops; the same command goes on"))

    def _rows(self) -> Sequence[JobRun]:
        count = max(1, min(MOST_ROWS, self.console.height - OTHER_LINES))
        # Not the first of both: Slurm starts jobs as it likes, and one may wait for a process of an earlier start.
        places = [[i for i, run in enumerate(self.runs) if run.state == state] for state in ("running", "waiting")]
        first = next((place[0] for place in places if place), 0)
        start = max(0, min(first - count // 6, len(self.runs) - count))
        return self.runs[start : start + count]

    def _cells(self, run: JobRun) -> tuple[str, str, str]:
        if run.state == "running":
            far = self._progress(run)
            figure = "" if far.figure is None else f"{far.figure:.4f}"
            return f"{100 * far.share:.0f} %", figure, duration(time.time() - run.started_s)
        result = read_result(run.folder) or {}
        best = (result.get("figures") or {}).get(self.metric, (result.get("best") or {}).get(self.metric))
        done = {"finished": "100 %"}.get(run.state, "")
        seconds = result.get("seconds")
        return done, "" if best is None else f"{best:.4f}", duration(seconds) if seconds else ""

    def summary(self, folder: Path) -> None:
        """Print the final table, the errors, and what to do next."""
        results = [(run, read_result(run.folder)) for run in self.runs]
        table = Table(title=self.title, title_justify="left")
        table.add_column("job", overflow="fold")
        for column in ("state", self.metric.replace("val", "test", 1), "parameters", "MADDs", "time"):
            table.add_column(column, justify="right")
        for run, result in results:
            figure = final_figure(result, self.metric) if run.state == "finished" else None
            model = (result or {}).get("model") or {}
            counts = [f"{model[key] / 1e6:.2f}M" if key in model else "" for key in ("params", "madds")]
            seconds = (result or {}).get("seconds")
            shown = f"{figure[1]:.4f}" if figure else ""
            state = Text(run.state, STYLES[run.state])
            table.add_row(Text(run.name), state, shown, *counts, duration(seconds) if seconds else "")
        self.console.print(table)
        for run in self.runs:
            if run.state == "failed":
                self.line(f"  {run.name} failed: {run.error()}")
        counts = Counter(run.state for run in self.runs)
        self.line("  " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
        if counts["failed"]:
            self.line("  the failed ones again: the same command with retry_failed=true")
        if counts["interrupted"] or counts["waiting"]:
            self.line("  the rest: the same command again")
        self.line(f"  runs             {folder}")
        self.line(f"  make a report    python report.py runs={folder}")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
