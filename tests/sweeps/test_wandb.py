"""What sweeps leave for W&B: sweep files whose commands work, the project's pages, offline runs that can be synced."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import TINY, Commands
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs.checks import check_condconv
from reports.wandb_files import log_records
from sweeps.jobs import state_on_disk
from train import register_resolvers

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "wandb").glob("*.yaml"))
register_resolvers()


def agent_command(config: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command line that W&B's agent makes, by its own functions (wandb.wandb_agent, `_command_run`)."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    parts = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    parts |= {"interpreter": ["python"], "program": [config["program"]], "env": ["/usr/bin/env"]}
    command: list[str] = []
    for chunk in utils.create_sweep_command(list(config["command"])):
        macro = str(chunk).startswith("${") and str(chunk).endswith("}")
        command += parts[chunk[2:-1]] if macro else [str(chunk)]
    return command


def values_of(parameter: dict[str, Any]) -> list[Any]:
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_of_an_agent_composes(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"program", "project", "name", "method", "metric", "command", "parameters"}
    assert config["method"] in ("grid", "random", "bayes") and config["metric"]["goal"] in ("maximize", "minimize")
    assert (ROOT / config["program"]).is_file() and config["name"] == path.stem
    parameters = config["parameters"]
    for key, parameter in parameters.items():
        assert config["method"] != "grid" or parameter["values"], key
    # Every value of every parameter.
    lists = {key: values_of(parameter) for key, parameter in parameters.items()}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for i in range(max(map(len, lists.values()))):
            values = {key: entries[i % len(entries)] for key, entries in lists.items()}
            command = agent_command(config, values)
            assert command[:3] == ["/usr/bin/env", "python", "train.py"]
            cfg = compose("train", overrides=command[3:])
            check_condconv(cfg.condconv)
            for key, value in values.items():
                assert OmegaConf.select(cfg, key) == value


def test_sweeps_and_their_wandb_files_vary_the_same() -> None:
    for name in ("experts", "width_x_experts", "routing"):
        ours = yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]
        theirs = yaml.safe_load((ROOT / "configs" / "wandb" / f"{name}.yaml").read_text())
        for key, values in ours["params"].items():
            assert [str(value) for value in theirs["parameters"][key]["values"]] == str(values).split(","), (name, key)
        fixed = {f"{key}={value}" for key, value in ours["unless_given"].items()}
        assert fixed <= set(theirs["command"]), name


def test_an_agents_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """With W&B's variables in the environment, as the agent sets them: the run carries the agent's id."""
    # wandb reads its variables once in a process; an agent's command has a process of its own.
    forget = pytest.importorskip("wandb").teardown
    forget()
    request.addfinalizer(forget)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    config = yaml.safe_load((ROOT / "configs" / "wandb" / "experts.yaml").read_text())
    command = agent_command(config, {"seed": 1, "condconv.experts": 2})
    tiny = [each for each in TINY if each.partition("=")[0] not in ("logger", "model", "model.width")]
    code, _, err = Commands(tmp_path / "outputs", monkeypatch, capsys).train(
        *command[3:], *tiny, "trainer.limit_train_batches=6"
    )
    assert code == 0, err
    (folder,) = (path.parent for path in tmp_path.rglob("wandb_id"))
    assert (folder / "wandb_id").read_text() == "agent123" and state_on_disk(folder) == "finished"
    offline_run_has_everything(folder)


def finished_records(path: Path) -> list[Any]:
    """All records of a run's file. W&B's own process writes the last ones a moment after the training has ended."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(100):
        records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(path.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no exit record")


def offline_run_has_everything(folder: Path) -> None:
    """History, config and summary, as `wandb sync` reads them."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: set[str] = set()
    config: dict[str, str] = {}
    summary: dict[str, str] = {}
    metrics: dict[str, Any] = {}
    for record in finished_records(path):
        history |= {item.key or "/".join(item.nested_key) for item in record.history.item}
        config |= {item.key: item.value_json for item in (*record.run.config.update, *record.config.update)}
        summary |= {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update}
        if record.HasField("metric"):
            metrics[record.metric.name] = record.metric.summary
    assert {"train/loss", "val/top1", "test/top1", "speed/images_per_second", "trainer/global_step"} <= history
    assert any(key.startswith("routing/") and key.endswith("/entropy") for key in history)
    assert json.loads(config["condconv"])["experts"] == 2 and json.loads(config["seed"]) == 1
    assert json.loads(summary["result/status"]) == "finished" and json.loads(summary["result/peak_memory_mb"]) > 0
    assert json.loads(summary["model/madds"]) > json.loads(summary["model/static_madds"]) > 0
    assert metrics["val/top1"].max and metrics["val/loss"].min and metrics["speed/images_per_second"].mean


def test_the_projects_pages(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    from sweeps import wandb_pages

    wandb_pages.main(["--entity", "me", "--project", "condconv"])
    pages = json.loads(capsys.readouterr().out)
    for page in ("workspace", "report"):
        text = json.dumps(pages[page])
        for metric in ("model/madds", "model/params", "test/top1", "entropy", "speed/images_per_second"):
            assert metric in text, (page, metric)
        for section in wandb_pages.SECTIONS:
            assert section in text
        assert "result/peak_memory_mb" in text
    panels = list(itertools.chain.from_iterable(make() for make in wandb_pages.SECTIONS.values()))
    assert len({panel.title for panel in panels}) == len(panels)


def test_pages_are_not_saved_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    from sweeps import wandb_pages

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="wandb login"):
        wandb_pages.main(["--entity", "me", "--save"])
