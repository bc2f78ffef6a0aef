"""The same training and the same figures on one, two and three processes (gloo)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from survival import TINY, compose_train, read_metrics, run
from torch.distributed import is_initialized

from eval import evaluate
from models.classification import ClassificationModule
from train import build_network

pytestmark = pytest.mark.forks

# No dropout: processes draw their own. SGD: Adam makes large steps of tiny gradients, rounding included. float64: this
# untrained network normalises 1x1 maps over 12 images: rounding grows 100 times in each step, less at a small rate.
# 359 evaluation images: neither 2 nor 3 divides them. ResNet: MobileNet convolves for 25 s in float64, not 2.
LEFT_OUT = ("model", "data", "condconv.dropout", "trainer.limit_val", "trainer.limit_test")
SAME = (
    *(each for each in TINY if not each.startswith(LEFT_OUT)),
    "model=resnet18",
    "model.width=0.125",
    "model.depth=0.5",
    "model.drop_rate=0",
    "optim=sgd",
    "optim.lr=0.0001",
    "trainer.precision=64-true",
    "callbacks.batchnorm.examples=all",
    "data.eval_batch_size_per_device=50",
    "trainer.max_epochs=2",
)
GLOBAL_BATCH = 12
FIGURES = {f"{stage}/{name}" for stage in ("val", "val_ema", "test", "test_ema") for name in ("top1", "top5", "loss")}


# Two processes also train, in test_survival.py and test_detection_survival.py.
SEVERAL = [pytest.param(2, marks=pytest.mark.slow), 3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a training on so many processes, which is made when it is first asked for."""

    @cache
    def folder_of(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        overrides = [*SAME, f"data.batch_size_per_device={GLOBAL_BATCH // ranks}", f"paths.run={folder}"]
        codes = run(overrides, folder / "log", ranks, prepare)
        assert codes == [0] * ranks, "".join((folder / f"log.{rank}.log").read_text() for rank in range(ranks))
        return folder

    return folder_of


def prepare(rank: int) -> None:
    """The training fails if a parameter has no gradient."""

    def check(self: ClassificationModule, optimizer: Any) -> None:
        assert not is_initialized() or not self.trainer.strategy.model.find_unused_parameters
        without = [name for name, value in self.named_parameters() if value.grad is None]
        assert not without, without

    ClassificationModule.on_before_optimizer_step = check  # type: ignore[method-assign]


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_same_weights(ranks: int, trained: Callable[[int], Path]) -> None:
    one, several = checkpoint(trained(1)), checkpoint(trained(ranks))
    assert one["global_step"] == several["global_step"] == 8
    # How far the weights went says how large a difference is: a wrong order of images or other statistics give 1.
    start = compose_network()
    for key, prefix in (("raw", "net."), ("average", "")):
        wanted, found = (weights(each, key) for each in (one, several))
        for name, value in wanted.items():
            if value.is_floating_point() and not name.startswith("metrics"):
                moved = (value - start[name.removeprefix(prefix)]).norm()
                assert (found[name] - value).norm() <= 1e-4 * moved + 1e-10 * value.norm(), (key, name)
    states = [each["optimizer_states"][0]["state"] for each in (one, several)]
    for index, state in states[0].items():
        torch.testing.assert_close(states[1][index]["momentum_buffer"], state["momentum_buffer"], rtol=1e-3, atol=1e-7)


def weights(saved: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
    return saved["state_dict"] if key == "raw" else saved["weight_average"]["state_dict"]


def compose_network() -> dict[str, torch.Tensor]:
    cfg = compose_train(*SAME)
    torch.manual_seed(cfg.seed)
    return build_network(cfg.model, cfg.condconv, 10).state_dict()


@pytest.mark.parametrize("ranks", SEVERAL)
def test_every_image_is_evaluated_once(ranks: int, trained: Callable[[int], Path]) -> None:
    """Accuracy is a whole number of 359 images, and all figures are those of one process, in every epoch."""
    wanted, found = figures_of(trained(1)), figures_of(trained(ranks))
    assert found.keys() == FIGURES
    for key, values in found.items():
        assert len(values) == (1 if key.startswith("test") else 2), key
        assert values == pytest.approx(wanted[key], rel=1e-6), key
        for value in values if not key.endswith("loss") else ():
            assert abs(value * 359 - round(value * 359)) < 1e-3, (key, value)


def figures_of(folder: Path) -> dict[str, list[float]]:
    """What metrics.csv says of evaluations, by the name of the figure, one value for each."""
    rows = read_metrics(folder)
    given = {key: [float(row[key]) for row in rows if row.get(key)] for key in FIGURES}
    return {key: values for key, values in given.items() if values}


def evaluating(out: Path, overrides: list[str]) -> Callable[[int], None]:
    def before(rank: int) -> None:
        from hydra import compose, initialize_config_dir

        several = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
        given = [*overrides, *(several if "LOCAL_RANK" in os.environ else ["trainer=cpu"])]
        with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
            cfg = compose("eval", overrides=given)
        out.with_suffix(f".{rank}.json").write_text(json.dumps(evaluate(cfg)))
        os._exit(0)

    return before


@pytest.mark.parametrize("ranks", SEVERAL)
def test_eval_gives_the_same_figures_on_any_number_of_processes(
    ranks: int, trained: Callable[[int], Path], tmp_path: Path
) -> None:
    weights = trained(1) / "checkpoints" / "last.ckpt"
    figures = {}
    for count in (1, ranks):
        overrides = [f"ckpt={weights}", f"trainer.devices={count}", "data.eval_batch_size_per_device=50"]
        out = tmp_path / str(count)
        codes = run([], tmp_path / f"log{count}", count, evaluating(out, overrides))
        assert codes == [0] * count, (tmp_path / f"log{count}.0.log").read_text()
        figures[count] = [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(count)]
    wanted = figures[1][0]
    assert wanted["top1"] == float(read_metrics(trained(1))[-1]["test/top1"])
    for found in figures[ranks]:
        for key in ("top1", "top5", "ema/top1", "ema/top5"):
            assert found[key] == wanted[key]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


def test_what_a_training_without_validation_tests_is_what_it_saves(tmp_path: Path) -> None:
    """Without synchronised BatchNorm every process has running statistics of its own; the first one's are saved."""
    folder = tmp_path / "run"
    own = [*(each for each in SAME if "examples" not in each), "callbacks.batchnorm.examples=null"]
    own += [
        "trainer.limit_val_batches=0",
        "trainer.max_epochs=1",
        "model.classifier_std=1",
        f"paths.run={folder}",
    ]
    codes = run([*own, "data.batch_size_per_device=6"], tmp_path / "log", 2, prepare)
    assert codes == [0, 0], (tmp_path / "log.0.log").read_text()
    assert not any(row.get("val_ema/top1") for row in read_metrics(folder))
    overrides = [f"ckpt={folder}", "trainer.devices=1", "data.eval_batch_size_per_device=50"]
    out = tmp_path / "out"
    assert run([], tmp_path / "log-eval", 1, evaluating(out, overrides)) == [0]
    found = json.loads(out.with_suffix(".0.json").read_text())
    tested = read_metrics(folder)[-1]
    assert found["ema/loss"] == pytest.approx(float(tested["test_ema/loss"]), rel=1e-6)
    assert found["loss"] == pytest.approx(float(tested["test/loss"]), rel=1e-6)
    assert found["ema/loss"] != pytest.approx(found["loss"], rel=1e-6)


def test_too_few_images_for_the_processes_are_an_error() -> None:
    from data.digits import DigitsDataModule

    module = DigitsDataModule(batch_size_per_device=4)
    module._process = lambda: (0, 400)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="400 processes cannot share 359 evaluation images"):
        module.val_dataloader()
