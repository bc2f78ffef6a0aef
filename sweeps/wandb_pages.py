"""The project's workspace and a report in W&B, laid out by W&B's own library.

`python -m sweeps.wandb_pages --entity me --project condconv` prints both as W&B would store them; `--save` writes them
to the server and prints their addresses. Saving was not run so far: it needs a server and a login.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

TITLE = "CondConv"
FIGURE = "test/top1"
COLUMNS = ("condconv.experts", "condconv.routing", "model.name", "model.width", "seed")


def summary(name: str) -> Any:
    """A metric's last value."""
    return wr.SummaryMetric(name)


def cost_panels() -> list[Any]:
    """What accuracy costs: one point for each run."""
    costs = {"model/madds": "MADDs per image", "model/params": "parameters"}
    panels: list[Any] = [
        wr.ScatterPlot(title=f"{FIGURE} against {words}", x=summary(key), y=summary(FIGURE), log_x=True)
        for key, words in costs.items()
    ]
    panels.append(wr.ScatterPlot(title=f"{FIGURE} against experts", x=wr.Config("condconv.experts"), y=summary(FIGURE)))
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric)
        for metric in (wr.Config("condconv.experts"), summary("model/madds"), summary("model/params"), summary(FIGURE))
    ]
    panels.append(wr.ParallelCoordinatesPlot(title="Experts, cost, accuracy", columns=columns))
    return panels


def curve_panels() -> list[Any]:
    """How training went."""
    step = "trainer/global_step"
    metrics = ("val/top1", "train/top1", "train/loss", "val/loss")
    return [wr.LinePlot(title=metric, x=step, y=[metric]) for metric in metrics]


def routing_panels() -> list[Any]:
    """Routing by depth: one line for each CondConv block."""
    step = "trainer/global_step"
    whole = {"dead experts": "routing/dead_experts"}
    panels: list[Any] = [
        wr.LinePlot(title=f"Routing {what} by depth", x=step, metric_regex=f"routing/.*/{what}$")
        for what in ("entropy", "saturation", "mean")
    ]
    return [*panels, *(wr.LinePlot(title=words, x=step, y=[key]) for words, key in whole.items())]


def speed_panels() -> list[Any]:
    """Throughput and memory."""
    step = "trainer/global_step"
    return [
        wr.LinePlot(title="Images per second", x=step, y=["speed/images_per_second"]),
        wr.LinePlot(title="Share of time waiting for data", x=step, y=["speed/data_wait"]),
        wr.BarPlot(title="Images per second, median", metrics=["result/images_per_second"]),
        wr.BarPlot(title="Peak memory, MB", metrics=["result/peak_memory_mb"]),
    ]


SECTIONS = {
    "Accuracy and cost": cost_panels,
    "Learning curves": curve_panels,
    "Routing": routing_panels,
    "Throughput and memory": speed_panels,
}


def workspace(entity: str, project: str) -> Any:
    """A saved view of the project with a section for each subject, runs grouped by sweep."""
    sections = [ws.Section(name=name, panels=panels(), is_open=True) for name, panels in SECTIONS.items()]
    columns = [*(f"config:{column}.value" for column in COLUMNS), f"summary:{FIGURE}"]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step", max_runs=100),
        runset_settings=ws.RunsetSettings(pinned_columns=columns),
    )


def report(entity: str, project: str) -> Any:
    """A report with the same panels, and a word before each group of them."""
    words = {
        "Accuracy and cost": "One point is one run; runs of a pair differ in `condconv.experts` alone (0 is static).",
        "Learning curves": "Validation and training: does the larger capacity overfit?",
        "Routing": "Entropy of the routing weights by block: near the maximum every example gets the same kernel.",
        "Throughput and memory": "What experts cost in time and memory while training.",
    }
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in SECTIONS.items():
        # Without an entity a run set is of the report's own project, and the report can be built without a server.
        grid = wr.PanelGrid(runsets=[wr.Runset(name="all runs")], panels=panels())
        blocks += [wr.H1(name), wr.P(words[name]), grid]
    return wr.Report(entity=entity, project=project, title=TITLE, description="Sweeps of CondConv", blocks=blocks)


def as_json(page: Any) -> dict[str, Any]:
    """What W&B would store."""
    found: dict[str, Any] = json.loads(page._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.wandb_pages", description=__doc__)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="condconv")
    parser.add_argument("--save", action="store_true", help="write both to the server")
    given = parser.parse_args(arguments)
    pages = {"workspace": workspace(given.entity, given.project), "report": report(given.entity, given.project)}
    if not given.save:
        print(json.dumps({name: as_json(page) for name, page in pages.items()}, indent=2))
        return
    for name, page in pages.items():
        try:
            page.save()
        except Exception as error:  # the library raises what its layers raise: no login, no network, no such entity
            sys.exit(f"error: W&B did not take the {name}: {error}. Log in with `wandb login`; is --entity right?")
        print(f"{name}: {page.url}")


if __name__ == "__main__":
    main()
