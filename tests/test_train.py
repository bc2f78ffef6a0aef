"""train.py for real, in miniature: what a run leaves behind, resume, sweeps, loggers, presets."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import TINY, Commands
from hydra import compose, initialize_config_dir

from condconv import CondConv2d
from condconv.ops.choice import forget
from configs.results import read_result
from train import build_network, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def compose_train(*overrides: str) -> object:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def only_run(commands: Commands) -> Path:
    (checkpoint,) = commands.outputs.rglob("last.ckpt")
    return checkpoint.parent.parent


def test_a_run_leaves_everything_behind(commands: Commands) -> None:
    code, out, err = commands.train(*TINY, "model.drop_rate=0.1")
    assert code == 0, err
    folder = only_run(commands)
    assert folder.name.endswith("-mobilenet_v1-e2-s1")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "result.json",
    ]
    # The terminal: what is trained, what came out, where it is.
    for said in ("digits: 1438 training", "MADDs", "epoch 1/1", "test/top1", str(folder / "checkpoints" / "last.ckpt")):
        assert said in out
    # The config: resolved, complete, with what the data told.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert "${" not in (folder / "config.yaml").read_text()
    assert config["model"]["num_classes"] == 10 and config["model"]["drop_rate"] == 0.1
    assert config["paths"]["run"] == str(folder)
    # The metrics.
    rows = read_metrics(folder)
    columns = set(rows[0])
    assert {"step", "epoch", "train/loss", "train/top1", "val/loss", "val/top1", "val/top5", "test/top1"} <= columns
    assert {"model/params", "model/madds", "lr-AdamW/expert", "routing/blocks.3.0/entropy"} <= columns
    assert {"routing/blocks.4.1/saturation", "routing/classifier/mean", "routing/dead_experts"} <= columns
    assert len([row for row in rows if row["train/loss"]]) == 3


def test_checkpoints_hold_plain_types_and_the_config(commands: Commands) -> None:
    assert commands.train(*TINY).code == 0
    folder = only_run(commands)
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(folder / "checkpoints" / name, weights_only=True)
        assert checkpoint["config"] == yaml.safe_load((folder / "config.yaml").read_text())
        assert checkpoint["config"]["condconv"]["experts"] == 2
        assert checkpoint["state_dict"]["net.blocks.4.1.conv_pw.weight"].shape[0] == 2
        assert checkpoint["global_step"] == 3


def test_zero_experts_is_the_untouched_network_with_the_same_values() -> None:
    static = compose_train("model=mobilenet_v1", "model.width=0.25", "condconv.experts=0")
    conditional = compose_train("model=mobilenet_v1", "model.width=0.25", "condconv.experts=3")
    torch.manual_seed(5)
    twin = build_network(static.model, static.condconv, 10)
    torch.manual_seed(5)
    net = build_network(conditional.model, conditional.condconv, 10)
    assert not any(isinstance(module, CondConv2d) for module in twin.modules())
    assert any(isinstance(module, CondConv2d) for module in net.modules())
    torch.testing.assert_close(net.conv_stem.weight, twin.conv_stem.weight, rtol=0, atol=0)


def test_the_same_command_gives_the_same_weights(tmp_path: Path) -> None:
    figures, weights = [], []
    for run in ("a", "b"):
        figures.append(train(compose_train(*TINY, f"paths.run={tmp_path / run}", "callbacks=none")))
        checkpoint = torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    assert figures[0] == figures[1]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """A little training gets well above chance, and CondConv's own parameters move; tests/test_overfit.py is faster."""
    overrides = [*TINY, "trainer.max_epochs=9", "trainer.limit_train_batches=1.0", "callbacks=none", "seed=3"]
    overrides += ["optim.lr=0.01"]
    cfg = compose_train(*overrides, f"paths.run={tmp_path}")
    figures = train(cfg)
    assert figures["test/top1"] > 0.5, figures
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(3)
    fresh = build_network(cfg.model, cfg.condconv, 10).state_dict()
    assert not torch.equal(state["net.blocks.4.1.router.fc.weight"], fresh["blocks.4.1.router.fc.weight"])


def test_resume_goes_on_in_the_same_folder(commands: Commands) -> None:
    assert commands.train(*TINY).code == 0
    folder = only_run(commands)
    code, out, err = commands.train(f"resume={folder}", "trainer.max_epochs=2")
    assert code == 0, err
    assert "epoch 2/2" in out and "epoch 1/" not in out
    assert only_run(commands) == folder
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6 and checkpoint["config"]["trainer"]["max_epochs"] == 2
    steps = [int(row["step"]) for row in read_metrics(folder) if row["train/loss"]]
    assert steps == [0, 1, 2, 3, 4, 5]
    # A natural mistake.
    code, _, err = commands.train(f"resume={folder}/checkpoints/last.ckpt")
    assert code == 1 and "last.ckpt is a file: give the folder of the run" in err
    # A run that was moved remembers its best epoch.
    best = folder / "checkpoints" / "best.ckpt"
    before = torch.load(best, weights_only=True)["epoch"]
    moved = folder.rename(folder.parent / "moved")
    code, _, err = commands.train(f"resume={moved}", "trainer.max_epochs=3")
    assert code == 0 and "won't be reloaded" not in err, err
    states = torch.load(moved / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("BestCheckpoint"))
    best_now = torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)
    assert state["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    top1 = [float(row["val/top1"]) for row in read_metrics(moved) if row["val/top1"]]
    assert float(state["best_model_score"]) == pytest.approx(max(top1)) and best_now["epoch"] >= before
    folder = moved.rename(folder)
    # What changes the meaning of the run cannot be changed in passing.
    code, _, err = commands.train(f"resume={folder}", "model=resnet18")
    assert code == 1 and "not the same training any more" in err and "model.name: mobilenet_v1 -> resnet18" in err


def test_a_longer_and_a_forced_resume_take_the_new_settings(commands: Commands) -> None:
    """The optimiser's state is the run's, its rates and decays are the command's: what was printed is what is done."""
    assert commands.train(*TINY).code == 0
    folder = only_run(commands)
    changes = ["trainer.max_epochs=2", "optim.lr=0.05", "optim.optimizer.weight_decay=0.7"]
    code, _, err = commands.train(f"resume={folder}", *changes, "resume_force=true")
    assert code == 0, err
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,), (schedule,) = saved["optimizer_states"], saved["lr_schedulers"]
    decays = {group["name"]: group["weight_decay"] for group in optimizer["param_groups"]}
    assert decays["weight"] == decays["expert"] == 0.7 and decays["norm"] == 0
    assert all(group["initial_lr"] == 0.05 for group in optimizer["param_groups"])
    assert set(schedule["base_lrs"]) == {0.05} and schedule["last_epoch"] == 6
    (first,) = (row for row in read_metrics(folder) if row["step"] == "3" and row["lr-AdamW/expert"])
    assert float(first["lr-AdamW/expert"]) == pytest.approx(0.05 / 2)  # halfway down the cosine of two epochs


def test_a_sweep_makes_one_folder_for_each_job(commands: Commands) -> None:
    overrides = [*TINY, "condconv.experts=0,1", "debug=fast", "callbacks=none", "launcher=in_process"]
    code, _, err = commands.train("-m", *overrides)
    assert code == 0, err
    folders = sorted(path.parent.parent.name for path in commands.outputs.rglob("last.ckpt"))
    assert folders == ["experts-0", "experts-1"]


def test_a_failed_job_does_not_end_the_sweep(commands: Commands) -> None:
    overrides = [*TINY, "condconv.experts=-1,1", "debug=fast", "callbacks=none", "launcher=in_process"]
    code, _, err = commands.train("-m", *overrides)
    assert code == 1 and err.count("error: condconv.experts=-1") == 1
    assert [path.parent.parent.name for path in commands.outputs.rglob("last.ckpt")] == ["experts-1"]


def test_a_length_in_steps_and_a_start_from_a_run(commands: Commands) -> None:
    code, _, err = commands.train(*TINY, "trainer.max_epochs=-1", "trainer.max_steps=5")
    assert code == 0, err
    folder = only_run(commands)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    # The second epoch ends in its middle: its weights are validated all the same, and are those of the figures.
    validated = [row for row in read_metrics(folder) if row["val/top1"]]
    assert [row["step"] for row in validated] == ["2", "4"]
    assert read_result(folder)["figures"]["val/loss"] == pytest.approx(float(validated[-1]["val/loss"]))
    code, _, err = commands.train(*TINY, f"pretrained={folder}", "name=second", "debug=fast")
    assert code == 0, err


@pytest.mark.parametrize("preset", ["fast", "profile"])
def test_debug_presets(preset: str, commands: Commands, recwarn: pytest.WarningsRecorder) -> None:
    batches = {"fast": 2, "profile": 6}[preset]
    code, _, err = commands.train(*TINY, f"debug={preset}", f"trainer.limit_train_batches={batches}")
    assert code == 0, err
    assert not any("warmup_epochs" in str(each.message) for each in recwarn.list), "so short on purpose"
    folder = only_run(commands)
    if preset == "profile":
        (trace,) = folder.glob("*.training_step.*.pt.trace.json")
        events = json.loads(trace.read_text())["traceEvents"]
        assert trace.stat().st_size < 50e6, "a few steps, not all of them"
        names = {event["name"] for event in events if event.get("cat") == "user_annotation" and event["dur"] > 0}
        for phase in ("train_dataloader_next", "training_step", "backward", "optimizer_step"):
            assert any(name.endswith((f".{phase}", f"].{phase}")) for name in names), phase
        steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep#")]
        assert 1 <= len(set(steps)) <= 3


def test_logger_none_imports_no_wandb(tmp_path: Path) -> None:
    code = "import sys; from commands import TINY; import train; from configs.messages import run_as_command\n"
    code += f"sys.argv = ['train.py', *TINY, 'debug=fast', 'paths.outputs={tmp_path}']\n"
    code += "run_as_command(train.main, 'train'); print('wandb imported:', 'wandb' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wandb imported: False" in done.stdout, done.stdout


def test_wandb_offline_by_default_and_without_secrets(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The default logger, as a user without a login and a network has it: no prompt, no crash, one run for each job."""
    wandb = pytest.importorskip("wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    tiny = [override for override in TINY if not override.startswith("logger")]
    code, out, err = commands.train(*tiny, "trainer.limit_train_batches=1")
    assert code == 0, err
    folder = only_run(commands)
    assert "W&B runs offline (no connection to 127.0.0.1)" in out and "W&B run" in out
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert run.name.endswith((folder / "wandb_id").read_text()) and wandb.run is None
    assert (folder / "metrics.csv").exists()
    for path in commands.outputs.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), f"the API key is in {path}"


def test_the_help_lists_groups_and_examples(commands: Commands) -> None:
    code, out, _ = commands.train("--help")
    assert code == 0
    for said in ("python train.py", "model: ", "efficientnet_b0", "condconv.experts", "debug=fast", "resume="):
        assert said in out


def test_autotune_prints_its_choice_and_trains(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request.addfinalizer(forget)  # other tests must not find the choices made here
    outcome = commands.train(*TINY, "condconv.autotune=true", "data.batch_size_per_device=8")
    assert outcome.code == 0, outcome.err
    assert "autotune, batch 8, 32 pixels" in outcome.out and " ms" in outcome.out
    assert (tmp_path / "cache" / "condconv" / "autotune.json").is_file()
    (last,) = commands.outputs.rglob("last.ckpt")
    assert commands.eval(f"ckpt={last}").code == 0
