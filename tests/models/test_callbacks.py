"""Callbacks and loggers, on a network of a few layers."""

from __future__ import annotations

import csv
import re
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from condconv import CondConv2d
from condconv.complexity import complexity
from models.callbacks import (
    BestCheckpoint,
    EvaluationSpeed,
    FinalValidation,
    FiniteLoss,
    LastCheckpoint,
    ModelTable,
    RoutingStatistics,
    SavedConfig,
    Throughput,
    final_figures,
)
from models.callbacks.display import EpochLines, progress_bar
from models.callbacks.divergence import Diverged
from models.checkpoint_files import save
from models.classification import ClassificationModule
from models.ema import WeightAverage
from models.loggers import MetricsCsv, WandbRun, choose_mode, find_api_key
from models.optim import build_optimizer
from models.progress import BETWEEN_BATCHES


class Net(nn.Module):
    """Two layers, one of them CondConv with its own router."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.first = CondConv2d(3, 8, 3, num_experts=experts) if experts else nn.Conv2d(3, 8, 3)
        self.classifier = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.first(images).mean((2, 3)))


def module(experts: int = 3) -> ClassificationModule:
    return ClassificationModule(Net(experts), 4, optimizer=partial(build_optimizer, name="sgd", lr=0.01))


def loader(count: int = 6, size: int = 4) -> DataLoader:
    data = TensorDataset(torch.randn(count * size, 3, 8, 8), torch.randint(4, (count * size,)))
    return DataLoader(data, batch_size=size)


class Loaders(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        train, val = loader(), loader(3)
        self.train_dataloader, self.val_dataloader = lambda: train, lambda: val


def fit(model: pl.LightningModule, *callbacks: pl.Callback, logger: object = False, **options: object) -> pl.Trainer:
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_checkpointing": False, **options}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), logger=logger, **options)
    trainer.fit(model, loader(), loader(3))
    return trainer


class Recorder(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[float]] = {}
        self.steps: dict[str, list[int]] = {}
        self.histograms: dict[str, Tensor] = {}

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append(float(value))
            self.steps.setdefault(key, []).append(step)

    def log_histograms(self, counts: dict[str, Tensor], step: int) -> None:
        self.histograms |= counts


def test_routing_statistics_of_a_few_batches() -> None:
    model, recorder = module(), Recorder()
    with torch.no_grad():
        model.net.first.router.fc.bias.copy_(torch.tensor([0.0, 8.0, -8.0]))
        model.net.first.router.fc.weight.zero_()
    model.optimizer = partial(build_optimizer, name="sgd", lr=0.0)
    fit(model, RoutingStatistics(max_batches=2), logger=recorder)
    figures = {key: values[-1] for key, values in recorder.metrics.items()}
    expected = torch.tensor([0.0, 8.0, -8.0]).sigmoid()
    assert figures["routing/first/mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert figures["routing/first/saturation"] == pytest.approx(2 / 3)
    assert figures["routing/first/dead_experts"] == 1 == figures["routing/dead_experts"]
    share = expected / expected.sum()
    entropy = -(share * share.log()).sum() / torch.tensor(3.0).log()
    assert figures["routing/first/entropy"] == pytest.approx(entropy.item(), rel=1e-3)
    # Two batches of four images, three experts.
    assert recorder.histograms["routing/first/weights"].sum() == 2 * 4 * 3
    # On the step of this validation's other figures.
    assert recorder.steps["routing/first/mean"] == recorder.steps["val/top1"]


def test_routing_statistics_are_of_the_raw_weights_alone() -> None:
    """The average, evaluated beside them, still has the expert that the raw weights have lost."""
    model, statistics, recorder = module(), RoutingStatistics(), Recorder()
    bias = model.net.first.router.fc.bias
    model.weight_average = WeightAverage(model.net)
    with torch.no_grad():
        bias.copy_(torch.tensor([0.0, 0.0, -50.0]))
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=1, loggers=[recorder])
    statistics.on_validation_start(trainer, model)
    images = torch.randn(4, 3, 8, 8)
    model.net.eval()(images)
    with model.weight_average.applied(model.net):
        model.net(images)
    statistics.on_validation_end(trainer, model)
    assert recorder.histograms["routing/first/weights"].sum() == 4 * 3
    assert recorder.metrics["routing/dead_experts"] == [1]


@pytest.mark.parametrize(("bias", "count"), [([-8.0, -8.0, -8.0], 1), ([0.0, -8.0, -8.0], 0)])
def test_a_block_without_a_living_expert_is_said_once(bias: list[float], count: int) -> None:
    model = module()
    with torch.no_grad():
        model.net.first.router.fc.bias.copy_(torch.tensor(bias))
        model.net.first.router.fc.weight.zero_()
    model.optimizer = partial(build_optimizer, name="sgd", lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, RoutingStatistics(), max_epochs=2)
    said = [str(each.message) for each in caught if "router has closed" in str(each.message)]
    assert len(said) == count and all(text.startswith("first: ") and "12 validation images" in text for text in said)


def test_routing_statistics_leave_no_hooks_and_no_trace_in_static_networks() -> None:
    model = module()
    fit(model, RoutingStatistics(max_batches=100), logger=Recorder())
    assert not model.net.first.router._forward_hooks
    recorder = Recorder()
    fit(module(experts=0), RoutingStatistics(), logger=recorder)
    assert not [key for key in recorder.metrics if key.startswith("routing")]
    with pytest.raises(ValueError, match="max_batches"):
        RoutingStatistics(max_batches=0)


class SlowImages(Dataset):
    """Each batch takes 20 ms to arrive."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.005)
        return torch.zeros(3, 8, 8), index % 4


def test_throughput_tells_waiting_from_working() -> None:
    shares, speeds = {}, {}
    for name, wait_s, work_s in (("waiting", 0.005, 0.0), ("working", 0.0, 0.02)):
        recorder, speed = Recorder(), Throughput(every_n_steps=4, skip_steps=2)

        class Working(ClassificationModule):
            def training_step(self, batch: object, batch_idx: int, work_s: float = work_s) -> Tensor:
                time.sleep(work_s)
                return super().training_step(batch, batch_idx)

        model = Working(Net(), 4, optimizer=partial(build_optimizer, name="sgd", lr=0.01))
        data = DataLoader(SlowImages(), batch_size=4) if wait_s else loader(12)
        options = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, callbacks=[speed], logger=recorder, accelerator="cpu", **options)
        trainer.fit(model, data)
        shares[name], speeds[name] = speed.data_wait, speed.images_per_second
        assert recorder.metrics["speed/data_wait"][-1] == speed.data_wait
        assert recorder.metrics["speed/step_time_ms"][-1] > 15
        assert len(recorder.metrics["speed/images_per_second"]) == 3  # 10 steps count: 4, 4 and 2
    assert shares["waiting"] > 0.5 > shares["working"], shares
    assert all(0 < value < 4 / 0.015 for value in speeds.values()), speeds


def test_the_first_steps_of_a_resumed_training_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take a second, the first three of each process ten; the lines stay where they are without a resume."""
    clock, recorder = SimpleNamespace(now=0.0), Recorder()
    monkeypatch.setattr("models.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer: Any = SimpleNamespace(is_last_batch=False, world_size=1)
    part: Any = SimpleNamespace(loggers=[recorder], device=torch.device("cpu"), global_step=0)

    def go_on(speed: Throughput, steps: int) -> None:
        speed.on_train_start(trainer, part)
        for step in range(steps):
            part.global_step += 1
            speed.on_train_batch_start(trainer, part, None, 0)
            clock.now += 10 if step < 3 else 1
            speed.on_train_batch_end(trainer, part, None, [torch.zeros(4)], 0)

    first, second, third = (Throughput(every_n_steps=5, skip_steps=3) for _ in range(3))
    go_on(first, 10)
    second.load_state_dict(first.state_dict())
    go_on(second, 12)
    state = second.state_dict()
    third.load_state_dict({**state, **state.pop("warm"), "steps": state["steps"]})  # of an earlier version
    go_on(third, 2)
    assert [step + 1 for step in recorder.steps["speed/step_time_ms"]] == [8, 13, 18, 23]
    assert recorder.metrics["speed/step_time_ms"] == [1000] * 4
    assert recorder.metrics["speed/images_per_second"] == [4] * 4
    alone = Throughput(every_n_steps=1)
    alone.load_state_dict(third.state_dict())
    go_on(alone, 2)  # windows of nothing else: they have their lines
    assert recorder.metrics["speed/step_time_ms"][4:] == [10_000] * 2


def test_writing_checkpoints_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Five seconds of a checkpoint before a step of one second."""
    clock, recorder = SimpleNamespace(now=0.0), Recorder()
    now = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    for place in ("throughput", "checkpoints"):
        monkeypatch.setattr(f"models.callbacks.{place}.time", now)

    def write(trainer: Any, path: Path) -> None:
        clock.now += 5

    monkeypatch.setattr("models.callbacks.checkpoints.save", write)
    speed, last = Throughput(every_n_steps=1, skip_steps=0), LastCheckpoint(tmp_path)
    trainer: Any = SimpleNamespace(is_last_batch=False, world_size=1, global_step=0, callbacks=[last, speed])
    part: Any = SimpleNamespace(loggers=[recorder], device=torch.device("cpu"), global_step=0)
    speed.leave_out(5)  # before the training there is nothing to leave it out of
    speed.on_train_start(trainer, part)
    for wait_s in (0.0, 1.0):
        last._save(trainer, BETWEEN_BATCHES)
        clock.now += wait_s
        speed.on_train_batch_start(trainer, part, None, 0)
        clock.now += 1
        speed.on_train_batch_end(trainer, part, None, [torch.zeros(4)], 0)
    assert recorder.metrics["speed/step_time_ms"] == [1000, 2000]
    assert recorder.metrics["speed/data_wait"] == [0, 0.5]
    assert recorder.metrics["speed/images_per_second"] == [4, 2]


class Guarded(SimpleNamespace):
    """A trainer that may be asked to save after step 7, and does so if nobody objects."""

    def __init__(self, model: pl.LightningModule) -> None:
        self.saved: list[str] = []
        strategy = SimpleNamespace(checkpoint_io=None, broadcast=lambda value: value)
        super().__init__(
            world_size=1, lightning_module=model, global_step=7, current_epoch=0, checkpoint_callbacks=[],
            callbacks=[FiniteLoss()], strategy=strategy, save_checkpoint=self.saved.append,
        )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("net", ", first in net.classifier.weight"),
        ("buffer", ", first in net.seen"),
        ("average", ""),  # the network's own weights are good
    ],
    ids=["net", "buffer", "average"],
)
def test_weights_that_are_not_finite_are_never_saved(place: str, name: str, value: float) -> None:
    """The loss would tell of them only one step later."""
    model = module()
    model.net.register_buffer("seen", torch.zeros(2))
    model.net.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.weight_average = WeightAverage(model.net)
    trainer: Any = Guarded(model)
    save(trainer, "good.ckpt")
    assert trainer.saved == ["good.ckpt"]
    averages = model.weight_average.state_dict()["state_dict"]
    bad = {"net": model.net.classifier.weight, "buffer": model.net.seen, "average": averages["first.weight"]}[place]
    with torch.no_grad():
        bad.view(-1)[-1] = value
    said = f"The weights are NaN or infinite after step 7{name}. Training stops."
    with pytest.raises(Diverged, match=re.escape(said)):
        save(trainer, "bad.ckpt")
    assert trainer.saved == ["good.ckpt"]


def test_evaluation_speed_counts_every_image_once() -> None:
    speed = EvaluationSpeed()
    trainer = pl.Trainer(callbacks=[speed], logger=False, accelerator="cpu", enable_progress_bar=False)
    start = time.perf_counter()
    trainer.test(module(), loader(10), verbose=False)
    assert speed._images == 9 * 4  # the first batch is the warm-up
    assert speed.images_per_second > 36 / (time.perf_counter() - start)


def test_the_table_shows_and_logs_what_the_network_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr("models.module.complexity", lambda net, size: counts.append(size) or complexity(net, size))
    recorder, classifier = Recorder(), module()
    before = classifier.complexity(8)
    fit(classifier, ModelTable(8, title="small"), logger=recorder)
    assert recorder.metrics["model/params"] == [before.params]
    params = sum(p.numel() for p in Net().parameters())
    assert recorder.metrics["model/params"] == [params]
    # 6 x 6 positions of 8 kernels of 27 weights, 3 experts mixed, router 3 -> 3, classifier 8 -> 4.
    assert recorder.metrics["model/madds"] == [36 * 216 + 3 * 224 + 9 + 32]
    assert recorder.metrics["model/static_madds"] == [36 * 216 + 32]
    shown = capsys.readouterr().out
    assert counts == [8]  # an image of that size, once: result.json of a training takes the same figures
    assert "small, input 3x8x8" in shown and "classifier" in shown and "MADDs" in shown
    fit(module(), ModelTable(8, layers=True))
    assert "first.router" in capsys.readouterr().out


def test_one_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fit(module(), EpochLines(), max_epochs=2, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "val/top1" in lines[0] and "train/loss" in lines[0]


def test_no_epoch_shows_the_validation_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    fit(module(), EpochLines(), max_epochs=4, check_val_every_n_epoch=2, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val/top1" in line for line in lines] == ["val/loss" in line for line in lines] == [False, True] * 2
    assert all("train/loss" in line for line in lines)


@pytest.mark.parametrize(("variable", "kind"), [("1", pl.callbacks.RichProgressBar), ("", EpochLines)])
def test_a_bar_where_the_output_ends_in_a_terminal(
    variable: str, kind: type[pl.Callback], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make train` pipes it through tee; elsewhere a bar would leave rubbish."""
    monkeypatch.setenv("TTY_COMPATIBLE", variable)
    assert type(progress_bar()) is kind


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_epochs": 3}, [11, 17]),  # of 6 batches each; Lightning numbers a validation by the steps before its own
        ({"max_epochs": -1, "max_steps": 14}, [11, 13]),
        ({"max_epochs": 9, "max_steps": 2, "accumulate_grad_batches": 2}, [1]),
    ],
)
def test_the_last_step_is_validated_whatever_is_due(length: dict[str, int], steps: list[int]) -> None:
    recorder, last = Recorder(), FinalValidation()
    trainer = fit(module(), last, logger=recorder, check_val_every_n_epoch=2, **length)
    assert recorder.steps["val/top1"] == steps
    assert last.validated_step == trainer.global_step == steps[-1] + 1
    seen = float(trainer.callback_metrics["val/loss"])
    assert float(final_figures(trainer, trainer.lightning_module, None)["val/loss"]) == seen
    assert recorder.steps["val/top1"] == steps  # not made again


def test_a_last_validation_that_was_cut_off_is_made_after_the_fit(tmp_path: Path) -> None:
    options = {"max_epochs": -1, "max_steps": 8, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "accelerator": "cpu", "logger": False}
    before = pl.Trainer(limit_val_batches=0, callbacks=[FinalValidation()], **options)
    before.fit(module(), loader(), loader(3))
    before.save_checkpoint(tmp_path / "last.ckpt")
    trainer, again, data = pl.Trainer(callbacks=[FinalValidation()], **options), module(), Loaders()
    trainer.fit(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert "val/loss" not in trainer.callback_metrics  # the training is complete
    figures = final_figures(trainer, again, data)
    assert figures["val/loss"] == trainer.validate(again, datamodule=data, verbose=False)[0]["val/loss"]


def test_checkpoints_carry_the_config(tmp_path: Path) -> None:
    trainer = fit(module(), SavedConfig({"seed": 3, "model": {"name": "x"}}))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["config"] == {"seed": 3, "model": {"name": "x"}}


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("val/top1", None, "max"),
        ("val/loss", None, "min"),
        ("val_ema/loss_box", None, "min"),
        ("val/loss", "max", "max"),
    ],
)
def test_the_best_of_a_loss_is_the_smallest(monitor: str, mode: str | None, expected: str) -> None:
    assert BestCheckpoint(monitor=monitor, mode=mode).mode == expected


def test_the_best_epochs_move_with_their_folder(tmp_path: Path) -> None:
    old, new = (
        BestCheckpoint(monitor="val/top1", dirpath=tmp_path / "old"),
        BestCheckpoint(monitor="val/top1", dirpath=tmp_path / "new"),
    )
    old.best_model_path = old.kth_best_model_path = str(tmp_path / "old" / "best.ckpt")
    old.best_model_score, old.best_k_models = torch.tensor(0.7), {old.best_model_path: torch.tensor(0.7)}
    new.load_state_dict(old.state_dict())
    moved = str(tmp_path / "new" / "best.ckpt")
    assert new.best_model_score == 0.7 and new.best_model_path == new.kth_best_model_path == moved
    assert list(new.best_k_models) == [moved] and new.dirpath == str(tmp_path / "new")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_step_share_a_line_and_columns_grow(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "run")
    logger.log_metrics({"loss": torch.tensor(2.5)}, step=0)
    logger.log_metrics({"lr": 0.1}, step=0)
    logger.save()
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"top1": 0.5}, step=2)
    assert len(read(logger.path)) == 2  # all but the last step are on disk already
    logger.finalize("success")
    assert read(logger.path) == [
        {"step": "0", "loss": "2.5", "lr": "0.1", "top1": ""},
        {"step": "1", "loss": "2.0", "lr": "", "top1": ""},
        {"step": "2", "loss": "", "lr": "", "top1": "0.5"},
    ]
    assert not list(logger.folder.glob("*.tmp"))


def test_a_resumed_run_keeps_its_metrics(tmp_path: Path) -> None:
    for step, metrics in enumerate(({"loss": 1.0}, {"lr": 0.1, "loss": 0.5})):
        logger = MetricsCsv(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.finalize("success")
    rows = [(row["step"], row["loss"], row["lr"]) for row in read(logger.path)]
    assert rows == [
        ("0", "1.0", ""),
        ("1", "0.5", "0.1"),
    ]


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    assert choose_mode("offline") == ("offline", None)
    assert choose_mode("online") == ("online", None)
    assert choose_mode("auto") == ("offline", None)  # WANDB_MODE of conftest.py
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    monkeypatch.setattr("models.loggers.find_api_key", lambda server: None)
    mode, reason = choose_mode("auto")
    assert mode == "offline" and "wandb login" in reason
    monkeypatch.setattr("models.loggers.find_api_key", lambda server: "x" * 40)
    monkeypatch.setattr("models.loggers._reachable", lambda host, port: False)
    mode, reason = choose_mode("auto")
    assert mode == "offline" and "no connection to api.wandb.ai" in reason
    monkeypatch.setattr("models.loggers._reachable", lambda host, port: True)
    assert choose_mode("auto") == ("online", None)
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=on"):
        WandbRun(".", mode="on")


def test_the_server_that_wandb_login_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb login --host=...` writes the address into a settings file, the key into netrc."""
    wandb = pytest.importorskip("wandb")
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.corp.example\n")
    (tmp_path / "netrc").write_text(f"machine wandb.corp.example\n  login user\n  password {'k' * 40}\n")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = []
    monkeypatch.setattr("models.loggers._reachable", lambda host, port: asked.append((host, port)) or True)
    wandb.teardown()  # the settings file is read once for a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # wandb.api is deprecated
            assert choose_mode("auto") == ("online", None)
        assert asked == [("wandb.corp.example", 443)]
        monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
        assert choose_mode("auto") == ("offline", "not logged in at localhost: `wandb login`")
        (tmp_path / "netrc").write_text(f"machine localhost:8080\n  login user\n  password {'k' * 40}\n")
        assert choose_mode("auto") == ("online", None) and asked[1:] == [("localhost", 8080)]
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key")
        assert find_api_key("api.wandb.ai") == find_api_key("api.forge.coreweave.com") == "key"
        (tmp_path / "netrc").write_text("machine\n")
        assert choose_mode("auto")[0] == "offline"
    finally:
        wandb.teardown()


def test_wandb_falls_back_when_the_server_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logged in, reachable, and still no run: training goes on offline, with the same id after a resume."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr("models.loggers.choose_mode", lambda wanted: ("online", None))
    real = wandb.init

    def init(mode: str, **options: object) -> object:
        if mode == "online":
            raise wandb.errors.CommError("server error 500")
        return real(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", init)
    ids = []
    for _ in range(2):
        logger = WandbRun(tmp_path)
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_histograms({"routing/a/weights": torch.tensor([1, 2, 3])}, step=0)
        ids.append(logger.experiment.id)
        assert str(tmp_path) in logger.place()
        logger.finish()
        assert wandb.run is None
    assert ids[0] == ids[1]
