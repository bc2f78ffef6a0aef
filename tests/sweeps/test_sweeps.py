"""Every sweep file for real, in miniature; starting again, failures, other settings; the search."""

from __future__ import annotations

import fcntl
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from commands import Commands
from omegaconf import OmegaConf

from configs.messages import EXIT_REQUEUE, UserError
from configs.results import read_result, write_result
from sweeps.display import Display
from sweeps.jobs import JobRun, state_on_disk
from sweeps.plan import Job
from sweeps.sweeper import Sweep, check_needs, count_devices, exit_code

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
# Each sweep: what is added at that size, all its jobs, and what the fast tests run of it (None: nothing, they list it).
JOBS: dict[str, tuple[str, str, str | None]] = {
    "experts": ("condconv.experts=0,1,2", "experts-0 experts-1 experts-2", ""),
    "width_x_experts": (
        "condconv.experts=2 model.width=0.25,0.5",
        "experts-0_width-0.25 width-0.25_experts-2 experts-0_width-0.5 width-0.5_experts-2",
        None,
    ),
    "routing": (
        "condconv.experts=2",
        "experts-0 routing-fc routing-single routing-partially_shared routing-hidden_small routing-hidden_medium "
        "routing-hidden_large routing-hierarchical routing-softmax",
        "condconv.routing=single,hierarchical",
    ),
    "depth": (
        "condconv.experts=2",
        "experts-0 from_block-1 from_block-3 from_block-5 from_block-7 from_block-10 last_blocks-2 last_blocks-1 "
        "placement-classifier",
        "condconv.from_block=10",
    ),
    "layer_type": (
        "condconv.experts=2",
        "experts-0 layers-depthwise_classifier-false layers-pointwise_classifier-false "
        "layers-depthwise+pointwise_classifier-false placement-classifier",
        None,
    ),
    "placement": (
        "condconv.experts=2",
        "experts-0 placement-from6 placement-all placement-blocks placement-classifier",
        None,
    ),
    "dropout": (
        "condconv.experts=2",
        "experts-0 dropout-0.0 dropout-0.1 dropout-0.2 dropout-0.4 expert_dropout-0.1 expert_dropout-0.2 "
        "expert_dropout-0.4",
        None,
    ),
    "temperature": (
        "condconv.experts=2",
        "experts-0 routing-fc routing-softmax_temperature-0.1 routing-softmax_temperature-0.3 "
        "routing-softmax_temperature-1.0 routing-softmax_temperature-3.0 routing-softmax_temperature-10.0",
        None,
    ),
    "iso": ("condconv.experts=1", "experts-1 experts-0 experts-0_width experts-0_depth", None),
}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def test_every_sweep_is_tried() -> None:
    assert sorted(JOBS) == SWEEPS


def sweep_overrides(sweep: str, *more: str) -> list[str]:
    given = {override.partition("=")[0] for override in more}
    return [f"sweep={sweep}", *(each for each in TINY if each.partition("=")[0] not in given), *more]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_its_jobs(sweep: str, commands: Commands) -> None:
    """Listed, not run."""
    more, names, _ = JOBS[sweep]
    seeds = (1, 2) if sweep in ("experts", "iso") else (1,)  # the sweep's own values, and variants
    options = sweep_overrides(sweep, *more.split(), f"seed={','.join(map(str, seeds))}", "hydra.sweeper.list_only=true")
    code, out, err = commands.train("-m", *options)
    assert code == 0, err
    lines = [line.split(maxsplit=2) for line in out.splitlines() if "python train.py" in line]
    assert all(state == "new" for _, state, _ in lines)
    found = [re.sub(r"(width|depth)-[\d.]+", r"\1", name) if sweep == "iso" else name for name, _, _ in lines]
    # Each with every seed, so each is paired with the static twin of its seed.
    assert sorted(found) == sorted(f"{name}_seed-{seed}" for name in names.split() for seed in seeds)
    assert not commands.outputs.exists() or not list(commands.outputs.rglob("*.json"))
    if sweep == "iso":
        assert "% of the CondConv network's" in out and "static twin" in out


@pytest.mark.parametrize("sweep", [sweep for sweep in SWEEPS if JOBS[sweep][2] is not None])
def test_every_sweep_runs_at_tiny_size(sweep: str, commands: Commands) -> None:
    more, _, part = JOBS[sweep]
    assert part is not None
    run_tiny(sweep, [*(each for each in more.split() if each.partition("=")[0] not in part), *part.split()], commands)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_of_every_sweep_runs_at_tiny_size(sweep: str, commands: Commands) -> None:
    more, names, _ = JOBS[sweep]
    assert len(run_tiny(sweep, more.split(), commands)) == len(names.split())


def run_tiny(sweep: str, more: list[str], commands: Commands) -> list[str]:
    """Run a sweep, check every job against what its overrides say; the names of the jobs."""
    code, _, err = commands.train("-m", *sweep_overrides(sweep, *more))
    assert code == 0, err
    (folder,) = (commands.outputs / "sweeps").iterdir()
    assert folder.name.startswith(f"{sweep}-")
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
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
            assert node == yaml.safe_load(value.replace(",", ", ")), override
    assert any(config["condconv"]["experts"] == 0 for config in configs.values())
    assert any(config["condconv"]["experts"] > 0 for config in configs.values())
    assert {config["trainer"]["max_epochs"] for config in configs.values()} == {1}
    return list(jobs)


def test_lists_and_text_vary_alike(commands: Commands) -> None:
    for values in ("[3,4]", "'3,4'", "'range(3,5)'"):
        options = [each for each in TINY if not each.startswith("seed")]
        options += [f"+hydra.sweeper.params.seed={values}", "hydra.sweeper.list_only=true"]
        code, out, err = commands.train("-m", *options)
        assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["seed-3", "seed-4"], out + err


def test_the_command_line_replaces_what_a_generator_varies(commands: Commands) -> None:
    options = ("sweep=depth", "model.width=0.25", "condconv.experts=2", "seed=1", "hydra.sweeper.list_only=true")
    code, out, err = commands.train("-m", *options, "condconv.from_block=1,7")
    expected = ["experts-0_seed-1", "from_block-1_seed-1", "from_block-7_seed-1"]
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == expected, out + err


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 1), ("2", 2), ("auto", 4), (-1, 4), ([0, 3], 2), ("0,1", 2), (0, 0)]
)
def test_devices_of_a_job(devices: object, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert count_devices(OmegaConf.create({"trainer": {"devices": devices}})) == count


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
    # Listed, and in part: still the same sweep.
    code, out, _ = commands.train(*overrides, "hydra.sweeper.only=*-2", "hydra.sweeper.list_only=true")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()] == [["experts-2", "finished"]], out
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
    # Names keep the last part of a key: a job of the same name with another override is refused.
    same_name = ["+optim.optimizer.lr_factor_by_role.expert=0.5", "+optim.optimizer.decay_by_role.expert=0.5"]
    rest = [o for o in grown if not o.startswith("condconv")]
    for number, override in enumerate(same_name):
        variants = f"hydra.sweeper.variants=[['condconv.experts=1','{override}']]"
        options = ["hydra.sweeper.keep_variants=true", "trainer.limit_train_batches=1", "sweep_dir=other"]
        code, _, err = commands.train(*rest, variants, *options)
        assert code == number and ("holds another job of the name" in err) == bool(number), err
    # With other settings the folder is refused: its finished jobs are other trainings.
    code, _, err = commands.train(*grown, f"sweep_dir={folder}", "optim=sgd")
    assert code == 1 and "other settings" in err and "optim=sgd" in err and "sweep_dir=" in err


@pytest.mark.parametrize(
    ("states", "code"),
    [("finished finished", 0), ("finished interrupted", EXIT_REQUEUE), ("interrupted failed", 1), ("waiting", 130)],
)
def test_the_exit_code_says_whether_all_is_done(states: str, code: int) -> None:
    runs = [JobRun(Job(state, ()), Path(state), [], state=state) for state in states.split()]
    assert exit_code(runs, stopped=code == 130) == code


def time_limit(self: Sweep, runs: Sequence[JobRun], display: Display) -> None:
    """In place of `Sweep.launch`: every job reaches trainer.max_time."""
    for run in runs:
        run.state = "interrupted"


def test_a_time_limit_leaves_the_sweep_unfinished(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sweep, "launch", time_limit)
    code, out, _ = commands.train("-m", *TINY, "condconv.experts=0")
    assert code == EXIT_REQUEUE and "1 interrupted" in out and "the same command again" in out


def test_mistakes_stop_the_sweep_before_its_first_job(commands: Commands) -> None:
    for wrong, message in (
        ("condconv.expert=1,2", "There is no setting 'condconv.expert'"),
        ("sweep=exprts", "There is no sweep=exprts. Did you mean 'experts'?"),
        ("sweep=cifar10/one_expertt", "There is no sweep=cifar10/one_expertt. Did you mean 'cifar10/one_expert'?"),
        ("launcher=slurm", "There is no launcher=slurm"),
        ("optim.lr=interval(0,1)", "an interval has no list of values"),
        ("hydra/launcher=submitit", "hydra/launcher"),
        ("sweep=iso condconv.experts=4,8", "condconv.experts: this sweep computes its jobs for one value"),
        ("sweep=cifar10/upcycled", "This sweep needs condconv.init=upcycle, and its jobs have network"),
        ("sweep=depth model.width=0.25,0.5", "model.width: this sweep computes its jobs for one value"),
    ):
        code, _, err = commands.train("-m", *TINY, *wrong.split())
        assert code == 1 and message in err, (wrong, err)
        assert "Traceback" not in err
    assert not list(commands.outputs.rglob("result.json"))


def test_what_a_sweep_needs_may_come_from_anywhere() -> None:
    needs = {"condconv.init": "upcycle", "pretrained": None}
    check_needs(OmegaConf.create({"condconv": {"init": "upcycle"}, "pretrained": "a.ckpt"}), needs)
    for nothing in (None, "???"):
        with pytest.raises(UserError, match=r"needs pretrained=\.\.\., and its jobs have None"):
            check_needs(OmegaConf.create({"condconv": {"init": "upcycle"}, "pretrained": nothing}), needs)


def test_two_sweeps_cannot_share_a_folder(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    import sweeps.folder as folders

    monkeypatch.setattr(folders, "LOCK_WAIT_S", 0.1)
    folder = commands.outputs / "held"
    folder.mkdir(parents=True)
    with folders.only_one(folder):
        code, out, err = commands.train("-m", *TINY, "condconv.experts=0,1", f"sweep_dir={folder}")
    assert code == 1 and "Another process works on" in err and "Waiting for" in out


def test_jobs_that_still_train_are_waited_for_and_named(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = commands.outputs / "again"
    folder.mkdir(parents=True)
    lock = (folder / ".experts-1.lock").open("w")  # as a job of submitit holds it
    fcntl.flock(lock, fcntl.LOCK_EX)
    is_held = JobRun.is_held

    def look(run: JobRun) -> bool:
        found = is_held(run)
        if found:  # it goes on for a while after the sweep has seen it
            threading.Timer(1.0, lock.close).start()
        return found

    monkeypatch.setattr(JobRun, "is_held", look)
    code, out, err = commands.train("-m", *TINY, "condconv.experts=1,2", f"sweep_dir={folder}")
    assert code == 0 and lock.closed, err
    assert "waiting for jobs of an earlier start that still train: experts-1\n" in out


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
    assert len({trial.params["optim.lr"] for trial in study.trials}) == 4, "no start draws what an earlier one drew"
    code, out, _ = commands.train(*SEARCH, "hydra.sweeper.trials=4")
    assert code == 0 and "best of 4" in out and "running" not in out, "nothing is left to do"


def test_a_time_limit_is_not_answered_by_more_trials(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start begins with the interrupted one, as above."""
    pytest.importorskip("optuna")
    rounds: list[str] = []

    def launch(self: Sweep, runs: Sequence[JobRun], display: Display) -> None:
        assert not rounds, "for ever"
        rounds.extend(run.name[:9] for run in runs)
        time_limit(self, runs, display)

    monkeypatch.setattr(Sweep, "launch", launch)
    code, out, _ = commands.train(*SEARCH, "hydra.sweeper.trials=2")
    assert code == EXIT_REQUEUE and rounds == ["trial-000"] and "no more trials are started" in out


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
