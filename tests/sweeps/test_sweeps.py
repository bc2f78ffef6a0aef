"""Every sweep file for real, in miniature; starting again, failures, other settings; the search."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from commands import Commands

from configs.results import read_result, write_result
from sweeps.jobs import state_on_disk

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweep").glob("*.yaml"))
# Two steps of the smallest network, in this process, without what callbacks and logs cost.
TINY = (
    "model=mobilenet_v1",
    "model.width=0.25",
    "seed=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "data.batch_size_per_device=8",
    "data.eval_batch_size_per_device=8",
    "test=false",
    "callbacks=none",
    "logger=none",
    "launcher=in_process",
)
# The names of the jobs of each sweep at that size.
JOBS = {
    "experts": ("condconv.experts=0,1,2", "experts-0_seed-1 experts-1_seed-1 experts-2_seed-1"),
    "width_x_experts": (
        "condconv.experts=2 model.width=0.25,0.5",
        "experts-0_width-0.25_seed-1 experts-2_width-0.25_seed-1 experts-0_width-0.5_seed-1 experts-2_width-0.5_seed-1",
    ),
    "routing": (
        "condconv.experts=2",
        "experts-0_seed-1 routing-fc_seed-1 routing-single_seed-1 routing-partially_shared_seed-1 "
        "routing-hidden_small_seed-1 routing-hidden_medium_seed-1 routing-hidden_large_seed-1 "
        "routing-hierarchical_seed-1 routing-softmax_seed-1",
    ),
    "depth": (
        "condconv.experts=2",
        "experts-0_seed-1 from_block-1_seed-1 from_block-3_seed-1 from_block-5_seed-1 from_block-7_seed-1 "
        "from_block-10_seed-1 last_blocks-2_seed-1 last_blocks-1_seed-1 placement-classifier_seed-1",
    ),
    "layer_type": (
        "condconv.experts=2",
        "experts-0_seed-1 layers-depthwise_classifier-false_seed-1 layers-pointwise_classifier-false_seed-1 "
        "layers-depthwise+pointwise_classifier-false_seed-1 placement-classifier_seed-1",
    ),
    "placement": (
        "condconv.experts=2",
        "experts-0_seed-1 placement-from6_seed-1 placement-all_seed-1 placement-blocks_seed-1 "
        "placement-classifier_seed-1",
    ),
    "dropout": (
        "condconv.experts=2",
        "experts-0_seed-1 dropout-0.0_seed-1 dropout-0.1_seed-1 dropout-0.2_seed-1 dropout-0.4_seed-1 "
        "expert_dropout-0.1_seed-1 expert_dropout-0.2_seed-1 expert_dropout-0.4_seed-1",
    ),
    "temperature": (
        "condconv.experts=2",
        "experts-0_seed-1 routing-fc_seed-1 routing-softmax_temperature-0.1_seed-1 "
        "routing-softmax_temperature-0.3_seed-1 routing-softmax_temperature-1.0_seed-1 "
        "routing-softmax_temperature-3.0_seed-1 routing-softmax_temperature-10.0_seed-1",
    ),
    "iso": (
        "condconv.experts=2",
        "experts-0_seed-1 experts-2_seed-1 experts-0_width-_ experts-0_width-_ experts-0_depth-_ experts-0_depth-_",
    ),
}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def test_every_sweep_is_tried() -> None:
    assert sorted(JOBS) == SWEEPS


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_runs_at_tiny_size(sweep: str, commands: Commands) -> None:
    more, names = JOBS[sweep]
    given = {override.partition("=")[0] for override in more.split()}
    overrides = [override for override in TINY if override.partition("=")[0] not in given]
    code, out, err = commands.train("-m", f"sweep={sweep}", *overrides, *more.split())
    assert code == 0, err
    (folder,) = (commands.outputs / "sweeps").iterdir()
    assert folder.name.startswith(f"{sweep}-")
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    found = [re.sub(r"(width|depth)-[\d.]+_seed-1", r"\1-_", name) if sweep == "iso" else name for name in jobs]
    assert sorted(found) == sorted(names.split())
    configs = {}
    for name, own in jobs.items():
        assert state_on_disk(folder / name) == "finished", name
        configs[name] = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert configs[name]["name"] == name and configs[name]["paths"]["run"] == str(folder / name)
        for override in own:  # what the name says is what was trained
            key, _, value = override.partition("=")
            node = configs[name]
            for part in key.split("."):
                node = node[part]
            assert node == value or node == yaml.safe_load(value), override
    # Each is paired: the same seed, everything else the same.
    assert any(config["condconv"]["experts"] == 0 for config in configs.values())
    assert {config["trainer"]["max_epochs"] for config in configs.values()} == {1}
    if sweep == "iso":
        assert "% of the CondConv network's" in out and "static twin" in out


def test_started_again(commands: Commands) -> None:
    """Finished jobs stay, failed ones stay unless asked for, unfinished ones go on; the sweep may grow."""
    overrides = ["-m", *TINY, "condconv.experts=0,2,-3"]
    code, out, err = commands.train(*overrides)
    assert code == 1 and "retry_failed=true" in out and "report.py runs=" in out
    assert err.count("error: condconv.experts=-3") == 1, "said once"
    (folder,) = (commands.outputs / "sweeps").iterdir()
    assert [state_on_disk(folder / f"experts-{e}") for e in (0, 2, -3)] == ["finished", "finished", "failed"]
    ended = {e: read_result(folder / f"experts-{e}")["ended"] for e in (0, 2, -3)}
    # As if the second had been killed after its checkpoint.
    write_result(folder / "experts-2", {**read_result(folder / "experts-2"), "status": "running"})
    code, out, err = commands.train(*overrides)
    assert code == 1 and "left as they are: 1 finished, 1 failed" in out, out + err
    assert "experts-2 finished" in out and "experts-0 finished" not in out
    assert read_result(folder / "experts-0")["ended"] == ended[0] and read_result(folder / "experts-2")["parts"] == 2
    # Again with the failed ones; another logger does not make another sweep.
    code, out, _ = commands.train(*overrides, "retry_failed=true", "logger=csv")
    assert code == 1 and "left as they are: 2 finished" in out and "experts--3 failed" in out
    # By its folder, with another value: the sweep grows.
    grown = [o if not o.startswith("condconv") else "condconv.experts=0,1" for o in overrides]
    code, out, _ = commands.train(*grown, f"sweep_dir={folder}")
    assert code == 0 and "left as they are: 1 finished" in out and "experts-1 finished" in out
    assert sorted(json.loads((folder / "sweep.json").read_text())["jobs"]) == [
        "experts--3",
        "experts-0",
        "experts-1",
        "experts-2",
    ]
    # With other settings the folder is refused: its finished jobs are other trainings.
    code, _, err = commands.train(*grown, f"sweep_dir={folder}", "optim=sgd")
    assert code == 1 and "other settings" in err and "optim=sgd" in err and "sweep_dir=" in err


def test_mistakes_stop_the_sweep_before_its_first_job(commands: Commands) -> None:
    for wrong, message in (
        ("condconv.expert=1,2", "There is no setting 'condconv.expert'"),
        ("sweep=exprts", "There is no sweep=exprts"),
        ("launcher=slurm", "There is no launcher=slurm"),
        ("optim.lr=interval(0,1)", "an interval has no list of values"),
        ("hydra/launcher=submitit", "hydra/launcher"),
        ("seed=", "seed"),
    ):
        code, _, err = commands.train("-m", *TINY, wrong)
        assert code == 1 and message in err, (wrong, err)
        assert "Traceback" not in err
    assert not list(commands.outputs.rglob("result.json"))


def test_two_sweeps_cannot_share_a_folder(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    import sweeps.sweeper as sweeper

    monkeypatch.setattr(sweeper, "LOCK_WAIT_S", 0.1)
    folder = commands.outputs / "held"
    folder.mkdir(parents=True)
    with sweeper.only_one(folder):
        code, out, err = commands.train("-m", *TINY, "condconv.experts=0,1", f"sweep_dir={folder}")
    assert code == 1 and "Another process works on" in err and "Waiting for" in out


def test_wandb_names_groups_and_tags(commands: Commands) -> None:
    tiny = [override for override in TINY if not override.startswith("logger")]
    code, _, err = commands.train("-m", *tiny, "condconv.experts=0,1", "sweep_dir=grid")
    assert code == 0, err
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path("grid").glob("*/config.yaml"))]
    loggers = [config["logger"]["wandb"] for config in configs]
    assert [logger["name"] for logger in loggers] == ["experts-0", "experts-1"]
    assert [logger["group"] for logger in loggers] == ["grid", "grid"]
    assert [logger["tags"] for logger in loggers] == [["sweep", "experts=0"], ["sweep", "experts=1"]]
    ids = [path.read_text() for path in Path("grid").glob("*/wandb_id")]
    assert len(set(ids)) == 2, "one W&B run for each job"


SEARCH = (
    "-m",
    "hparams_search=optuna",
    *(override for override in TINY if not override.startswith("seed")),
    "condconv.experts=1",
    "callbacks=none",
)


def test_a_search_goes_on_where_it_stopped(commands: Commands) -> None:
    optuna = pytest.importorskip("optuna")
    code, out, err = commands.train(*SEARCH, "hydra.sweeper.trials=2")
    assert code == 0 and "best of 2" in out, out + err
    (folder,) = (commands.outputs / "sweeps").iterdir()
    assert folder.name.startswith("optuna-")
    jobs = sorted(path.parent.name for path in folder.glob("*/result.json"))
    assert [name[:12] for name in jobs] == ["trial-000_lr", "trial-001_lr"]
    storage = f"sqlite:///{folder / 'optuna.db'}"
    study = optuna.load_study(study_name="search", storage=storage)
    for trial, name in zip(study.trials, jobs, strict=True):
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert config["optim"]["lr"] == pytest.approx(trial.params["optim.lr"], rel=1e-5)
        assert trial.value == read_result(folder / name)["figures"]["val/top1"]
    # More trials by the same command; a trial that was running when the search was killed is told first.
    study.ask({"optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)})
    code, out, err = commands.train(*SEARCH, "hydra.sweeper.trials=4")
    assert code == 0 and "best of 4" in out, out + err
    study = optuna.load_study(study_name="search", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    code, out, _ = commands.train(*SEARCH, "hydra.sweeper.trials=4")
    assert code == 0 and "best of 4" in out and "running" not in out, "nothing is left to do"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("hydra.sweeper.space={optim.lr: {low: 1}}", "space.optim.lr: expected a list of choices"),
        ("hydra.sweeper.direction=up", "direction=up: maximize or minimize"),
        ("seed=1,2", "A search takes one value of each setting"),
    ],
)
def test_a_search_says_what_is_wrong(wrong: str, message: str, commands: Commands) -> None:
    pytest.importorskip("optuna")
    code, _, err = commands.train(*SEARCH, wrong)
    assert code == 1 and message in err, err
