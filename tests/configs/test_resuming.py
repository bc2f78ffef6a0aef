"""What may be changed in a run that is resumed, and which checkpoint it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from condconv.files import save_sealed
from configs.checks import without_regularization
from configs.messages import UserError
from configs.resolvers import register_resolvers
from configs.results import write_result
from configs.resuming import check_changes, checkpoint_to_resume, resumed_config
from configs.runs import load_checkpoint, plain, save_config

register_resolvers()
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=mobilenet_v1", "model.width=0.25", "logger=none")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    cfg = composed(*SMALL, f"paths.run={run}")
    cfg.model.num_classes = 10
    save_config(plain(cfg), run)
    return run


def resume(folder: Path, *overrides: str) -> DictConfig:
    return resumed_config(folder, [f"resume={folder}", *overrides], composed(f"resume={folder}", *overrides))


def test_harmless_changes_pass_and_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["trainer.max_epochs=50", "data.num_workers=3", "callbacks.last.every_n_minutes=5"]
    changes += ["trainer.max_time=00:01:00:00", "condconv.backend=mixture"]
    cfg = resume(folder, *changes)
    assert cfg.trainer.max_epochs == 50 and cfg.data.num_workers == 3 and cfg.resume == str(folder)
    said = capsys.readouterr().out
    assert "resume: trainer.max_epochs: 25 -> 50\n" in said and said.count("resume: ") == len(changes)
    assert resume(folder, "trainer.max_time={hours: 5}").trainer.max_time == {"hours": 5}
    capsys.readouterr()
    resume(folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [
        "seed=5",
        "data.batch_size_per_device=32",
        "optim.lr=0.5",
        "condconv.experts=3",
        "trainer.precision=bf16-mixed",
        "trainer.devices=2",
        "callbacks.batchnorm.examples=all",
        "task.label_smoothing=0.0",
        "data.augment=false",
    ],
)
def test_what_makes_another_training_is_refused_unless_forced(
    change: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=f"{key}: .* -> .*resume_force=true"):
        resume(folder, change, "trainer.max_epochs=50")
    resume(folder, change, "resume_force=true")
    assert f"resume: {key}: " in capsys.readouterr().out


def test_what_follows_from_a_changed_value_changes_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved config has values where the configs have `${...}`."""
    cfg = resume(folder, "compile=true", "channels_last=false", "trainer.log_every_n_steps=3")
    assert cfg.task.compile is True and cfg.task.channels_last is False
    assert cfg.callbacks.finite.every_n_steps == cfg.callbacks.throughput.every_n_steps == 3
    assert "resume: task.compile: False -> True\n" in capsys.readouterr().out
    before = resume(folder)
    cfg = resume(folder, "seed=7", "data.batch_size_per_device=32", "data.image_size=64", "resume_force=true")
    assert cfg.data.seed == 7 and cfg.batch_size == 32 and cfg.callbacks.summary.image_size == 64
    assert cfg.optim.lr == cfg.optim.optimizer.lr == before.optim.lr / 2
    assert cfg.name == before.name, "a run keeps its name"
    with pytest.raises(UserError, match=r"data\.batch_size_per_device: 64 -> 32.*optim\.lr: .* -> "):
        resume(folder, "data.batch_size_per_device=32")
    # A value of its own does not follow.
    cfg = resume(folder, "seed=7", "data.seed=9", "resume_force=true")
    assert (cfg.seed, cfg.data.seed) == (7, 9)
    cfg.task.compile = True
    save_config(plain(cfg), folder)
    assert resume(folder, "compile=true").task.compile is True
    assert resume(folder, "channels_last=false").task.compile is True


DETECTOR = ("model=ssd_mobilenet_v1", "logger=none", "data.batch_size_per_device=8")


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A run whose optim.lr follows from model.width, where that of the default groups follows from the batch."""
    run = tmp_path / "detector"
    cfg = composed(*DETECTOR, f"paths.run={run}")
    cfg.model.num_classes = 10
    save_config(plain(cfg), run)
    return run


def test_what_follows_is_computed_as_the_runs_own_groups_do(detector: Path) -> None:
    write_result(detector, {"status": "interrupted", "overrides": [*DETECTOR, f"paths.run={detector}"]})
    forced = (f"resume={detector}", "optim.base_lr=0.001", "resume_force=true")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):  # as within Hydra's main
        cfg = resumed_config(detector, forced, compose("train", overrides=list(forced)))
        assert cfg.optim.lr == cfg.optim.optimizer.lr == pytest.approx(0.001 / 0.25)
        batch = (f"resume={detector}", "data.batch_size_per_device=4", "resume_force=true")
        assert resumed_config(detector, batch, compose("train", overrides=list(batch))).optim.lr == 0.003 / 0.25
        # A run of groups that are no more: nothing is known of what follows from what.
        write_result(detector, {"status": "interrupted", "overrides": ["experiment=no_more"]})
        with pytest.raises(UserError, match=r"optim\.lr=\.\.\.$"):
            resumed_config(detector, forced, compose("train", overrides=list(forced)))


def test_what_would_follow_but_cannot_be_computed_is_asked_for(
    detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the run's words; optim.lr would stay, and the changed base would be one in name alone."""
    asked = r"optim\.lr \(now 0\.012\) would follow .* Say what it shall be: optim\.lr=\.\.\.$"
    for change in ("optim.base_lr=0.001", "data.batch_size_per_device=16"):
        with pytest.raises(UserError, match=asked):
            resume(detector, change, "resume_force=true")
    cfg = resume(detector, "optim.base_lr=0.001", "optim.lr=0.004", "resume_force=true")
    assert cfg.optim.lr == cfg.optim.optimizer.lr == 0.004
    assert "resume: optim.optimizer.lr: 0.012 -> 0.004  (forced)\n" in capsys.readouterr().out
    # Where nothing that is changed leads to it, nobody is asked.
    assert resume(detector, "trainer.max_epochs=50", "seed=5", "resume_force=true").optim.lr == 0.012


def test_biases_of_routers_keep_their_group_in_the_optimiser(tmp_path: Path) -> None:
    def config(**factors: float) -> dict[str, object]:
        return {"optim": {"optimizer": {"lr_factor_by_role": factors}}}

    check_changes(config(router=0.1, router_bias=0.1), config(router=0.1, router_bias=0.2), True, tmp_path)
    for before, after in (
        (config(router=0.1), config(router=0.1, router_bias=0.1)),
        (config(router_bias=1.0), config()),
    ):
        with pytest.raises(UserError, match=r"router_bias: .* could not go on from the state"):
            check_changes(before, after, True, tmp_path)


def test_the_temperature_is_the_checkpoints(folder: Path) -> None:
    """It would be printed as changed, and come back with the routers' weights."""
    soft = (*SMALL, "condconv.routing=softmax", "condconv.temperature=3.0")
    cfg = composed(*soft, f"paths.run={folder}")
    cfg.model.num_classes = 10
    save_config(plain(cfg), folder)
    for words in (("condconv.temperature=0.3",), (*soft[:-1], "condconv.temperature=0.3")):
        with pytest.raises(UserError, match=r"condconv\.temperature: 3\.0 -> 0\.3.*[Ss]tart a new run\.$") as refused:
            resume(folder, *words)
        assert "resume_force" not in str(refused.value)
        with pytest.raises(
            UserError, match=r"temperature: 3\.0 -> 0\.3: the checkpoint holds .*Leave it out, or start"
        ):
            resume(folder, *words, "resume_force=true")
    assert resume(folder, *soft, "trainer.max_epochs=50").condconv.temperature == 3.0


@pytest.fixture
def upcycled(tmp_path: Path) -> Path:
    """A run whose weights brought another normalisation and an epsilon of their own."""
    run = tmp_path / "upcycled"
    cfg = composed(*SMALL, "pretrained=static.pth", "condconv.init=upcycle", f"paths.run={run}")
    cfg.model.num_classes, cfg.data.normalize = 10, "half"
    cfg.model.timm_options = {"bn_eps": 0.001}
    save_config(plain(cfg), run)
    return run


@pytest.mark.parametrize(
    "words", [(), (*SMALL, "pretrained=static.pth", "condconv.init=upcycle")], ids=["single", "whole"]
)
def test_what_pretrained_weights_brought_stays_unless_it_is_typed(
    words: tuple[str, ...], upcycled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = resume(upcycled, *words)
    assert cfg.data.normalize == "half" and cfg.model.timm_options == {"bn_eps": 0.001} and cfg.model.num_classes == 10
    assert resume(upcycled, *words, "data.normalize=half").data.normalize == "half"
    assert capsys.readouterr().out == ""
    for change, said in (
        ("data.normalize=imagenet", "data.normalize: half -> imagenet"),
        ("+model.timm_options.bn_eps=0.01", "model.timm_options.bn_eps: 0.001 -> 0.01"),
        ("model.num_classes=7", "model.num_classes: 10 -> 7"),
    ):
        with pytest.raises(UserError, match=f"not the same training any more: {said}"):
            resume(upcycled, *words, change)
        cfg = resume(upcycled, *words, change, "resume_force=true")
        key, _, value = change.lstrip("+").partition("=")
        assert str(OmegaConf.select(cfg, key)) == value
        assert f"resume: {said}  (forced)\n" in capsys.readouterr().out


def test_callbacks_and_loggers_are_left_out_or_exchanged(folder: Path) -> None:
    cfg = resume(folder, "callbacks.routing=null", "logger=csv", "trainer.max_epochs=30")
    assert cfg.callbacks.routing is None and list(cfg.logger) == ["csv"] and cfg.trainer.max_epochs == 30
    assert cfg.model.name == "mobilenet_v1" and cfg.logger.csv.folder == str(folder)


def test_a_run_without_regularization_may_be_repeated(folder: Path) -> None:
    words = [*SMALL, "debug=overfit", f"paths.run={folder}"]
    cfg = composed(*words)
    without_regularization(cfg)
    cfg.model.num_classes = 10
    assert cfg.task.label_smoothing == cfg.optim.optimizer.weight_decay == 0
    save_config(plain(cfg), folder)
    assert resume(folder, *words).task.label_smoothing == 0


def test_a_group_may_be_changed_by_force(folder: Path) -> None:
    with pytest.raises(UserError, match="resume_force=true"):
        resume(folder, *SMALL, "condconv=default", "condconv.experts=3")
    assert resume(folder, *SMALL, "condconv=default", "condconv.experts=3", "resume_force=true").condconv.experts == 3


def test_another_optimiser_is_refused_by_force_too(folder: Path) -> None:
    """It could not use the state in the checkpoint, so nobody is told to force it."""
    for words in ([*SMALL, "optim=sgd"], ["optim.optimizer.name=adam", "optim.optimizer.weight_decay=0"]):
        with pytest.raises(UserError, match=r"optim\.optimizer\.name: adamw -> .*[Ss]tart a new run\.$"):
            resume(folder, *words)
        with pytest.raises(UserError, match=r"name: adamw -> .*optimiser\. Start a new run; pretrained=.*last\.ckpt"):
            resume(folder, *words, "resume_force=true")


def test_a_group_alone_is_refused_with_what_to_do(folder: Path) -> None:
    """Nobody typed a model: it is what the command line has without the run's own words."""
    advice = (
        r"because of trainer= .*repeat it whole, or .*trainer\.accelerator=gpu.*model\.name: .*all of these changes"
    )
    with pytest.raises(UserError, match=advice):
        resume(folder, "trainer=gpu")
    with pytest.raises(UserError, match=r"seed: 1 -> 5\. Leave them out, start a new run, or add resume_force=true\."):
        check_changes({"seed": 1}, {"seed": 5}, False, folder)


def test_a_whole_command_line_may_be_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = resume(folder, *SMALL, "trainer.max_epochs=30")
    assert cfg.trainer.max_epochs == 30 and cfg.model.num_classes == 10 and cfg.paths.run == str(folder)
    assert capsys.readouterr().out.count("resume: ") == 1
    with pytest.raises(UserError, match=r"model\.name: mobilenet_v1 -> resnet18; .*resume_force=true"):
        resume(folder, "model=resnet18", "logger=none")
    with pytest.raises(UserError, match=r"no value trainer\.max_epoch\."):
        resumed_config(folder, ["trainer.max_epoch=3"])
    with pytest.raises(UserError, match=r"not the folder of a run \(it has no config.yaml\)"):
        resume(folder.parent)


def test_a_moved_run_takes_its_paths_along(folder: Path) -> None:
    moved = folder.rename(folder.parent / "moved")
    cfg = resume(moved)
    assert cfg.callbacks.last.dirpath == f"{moved}/checkpoints" and cfg.trainer.default_root_dir == str(moved)


def save(path: Path, step: int) -> None:
    save_sealed({"state_dict": {"w": torch.ones(99)}, "step": step, "config": {}}, path, keep=3)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    for step in (1, 2, 3):
        save(last, step)
    assert checkpoint_to_resume(folder) == last and capsys.readouterr().err == ""
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 255
    last.write_bytes(data)
    assert checkpoint_to_resume(folder) == last.with_name("last-1.ckpt")
    assert f"warning: {last} is damaged or truncated" in capsys.readouterr().err
    assert load_checkpoint(folder)["step"] == 2
    with pytest.raises(UserError, match=r"damaged: its checksum.*Newest in .*last-1\.ckpt"):
        load_checkpoint(last)
    last.with_name("last-1.ckpt").write_bytes(data[:300])  # truncated
    assert checkpoint_to_resume(folder) == last.with_name("last-2.ckpt")
    last.unlink()
    assert checkpoint_to_resume(folder) == last.with_name("last-2.ckpt")
    last.with_name("last-2.ckpt").unlink()
    with pytest.raises(UserError, match=r"last-1\.ckpt are damaged or truncated"):
        checkpoint_to_resume(folder)
    with pytest.raises(UserError, match=r"last-1\.ckpt are damaged or truncated, and there is no other"):
        load_checkpoint(folder)
    last.with_name("last-1.ckpt").unlink()
    (folder / "metrics.csv").write_text("step\n")
    assert checkpoint_to_resume(folder) is None  # killed before the first: from the beginning
    assert "no checkpoint yet" in capsys.readouterr().out and not (folder / "metrics.csv").exists()
