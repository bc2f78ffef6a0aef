"""The whole analysis: on a small network for what it writes, and as users call it, from a checkpoint."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, Commands
from PIL import Image
from small_networks import SmallNet
from torch import nn

from condconv.convert import convert
from data.synthetic import SyntheticDataModule
from reports.routing import RoutingAnalysis
from reports.routing.figures import principal_components
from reports.routing.images import Images, class_labels, thumbnails
from reports.routing.page import summary


class Module(nn.Module):
    """As much of a LightningModule as the analysis needs."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.net = SmallNet(num_classes=5)
        if experts:
            convert(self.net, experts, blocks=("blocks.1.*",), classifier="classifier", router_gain=5.0)


class Recorder:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.pictures: dict[str, Path] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics

    def log_files(self, name: str, pictures: dict[str, Path], folder: Path) -> None:
        self.pictures |= pictures


@pytest.fixture
def data() -> SyntheticDataModule:
    data = SyntheticDataModule(num_classes=5, image_size=32, batch_size_per_device=8, num_batches=4)
    data.class_names = ("<b>", "$x$", "c", "d", "e")
    return data


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_written_and_agrees(data: Any, tmp_path: Path) -> None:
    module, logger = Module().train(), Recorder()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    analysis = RoutingAnalysis(images_per_expert=3, ablation_images=16, top_k=[1], layers=["blocks.1.1", "classifier"])
    page = analysis(module, data, tmp_path / "analysis", "<i> on data", [logger])
    folder = page.parent

    assert module.training and all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    text, markdown = page.read_text(encoding="utf-8"), (folder / "index.md").read_text(encoding="utf-8")
    assert "<i>" not in text and "&lt;i&gt;" in text and "\\<i\\>" in markdown
    for name in re.findall(r'(?:src|href)="([^"]+)"', text) + re.findall(r"\]\(([^)]+)\)", markdown):
        assert (folder / name).is_file(), name
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.svg"))) == len(logger.pictures) == 12
    assert all(path.is_file() for path in logger.pictures.values())

    layers = rows(folder / "layers.csv")
    assert [row["layer"] for row in layers] == ["blocks.1.0", "blocks.1.1", "classifier"]
    assert float(layers[2]["entropy"]) == pytest.approx(logger.metrics["analysis/classifier/entropy"], rel=1e-4)
    assert len(rows(folder / "experts.csv")) == 9 and {row["images"] for row in layers} == {"32"}
    tops = rows(folder / "top_images.csv")
    assert len(tops) == 27  # three images of each expert of every layer, drawn or not
    tops = [row for row in tops if row["layer"] == "classifier"]
    assert len(tops) == 9 and float(tops[0]["weight"]) >= float(tops[1]["weight"])
    ablations = rows(folder / "ablations.csv")
    # Undisturbed; shuffled, mean, top 1 twice, three experts; by layer 2 x 3; each expert of two layers.
    assert len(ablations) == 1 + 7 + 6 + 6 and {row["images"] for row in ablations} == {"16"}
    measured = analysis.measure(module.net.eval(), Images(data, None, 1, torch.device("cpu")), "again").ablations
    columns = {"top1": "accuracy", "same_prediction": "agreement"}
    columns |= {"difference": "difference", "interval_95": "interval", "loss": "loss"}
    for row, result in zip(ablations, measured, strict=True):
        assert row["change"] == ("undisturbed" if result.ablation is None else str(result.ablation))
        for column, figure in columns.items():
            assert float(row[column]) == pytest.approx(getattr(result, figure), rel=1e-4, abs=1e-6), (column, row)
    assert any(result.accuracy != result.agreement != 1 for result in measured)


@pytest.mark.parametrize("shape", [(40, 6), (3, 8), (20, 2), (5, 1)], ids=str)
def test_principal_components_have_the_largest_variances(shape: tuple[int, int]) -> None:
    weights = torch.rand(shape) * torch.linspace(1, 3, shape[1]) + 5
    points, shares = principal_components(weights)
    singular = torch.linalg.svdvals(weights.double() - weights.double().mean(0))
    squares = torch.cat([singular**2, torch.zeros(1, dtype=torch.float64)])[:2]
    assert points.shape == (shape[0], 2)
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), squares / (singular**2).sum())
    # Uncorrelated, each with the variance of its direction.
    torch.testing.assert_close(points.T @ points, squares.diag(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(principal_components(weights)[0], points)


def test_the_images_are_a_seeded_sample_in_random_order(data: Any) -> None:
    images = Images(data, 20, seed=3, device=torch.device("cpu"))
    labels = torch.cat([labels for _, labels in images.batches()])
    again = torch.cat([labels for _, labels in Images(data, 20, 3, torch.device("cpu")).batches()])
    assert torch.equal(labels, again) and len(images) == 20 and images.num_batches == 3
    assert [len(part) for _, part in images.first(9).batches()] == [8, 1]
    assert images.order == torch.randperm(32, generator=torch.Generator().manual_seed(3)).tolist()[:20]


def test_thumbnails_are_the_pictures_again(data: Any) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(thumbnails(data.normalize(pixels), data.normalize), pixels)
    assert thumbnails(torch.zeros(1, 3, 200, 200), data.normalize).shape == (1, 3, 64, 64)


def test_detection_targets_count_by_their_largest_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 15], [0, 0, 5, 15]])
    targets = [{"boxes": boxes, "labels": torch.tensor([2, 1, 1])}, {"boxes": boxes[:0], "labels": torch.tensor([])}]
    assert class_labels(targets).tolist() == [1, -1]


def test_networks_with_other_outputs_get_no_ablations(data: Any) -> None:
    module = Module()
    forward = module.net.forward
    module.net.forward = lambda x: (forward(x), x)  # type: ignore[method-assign]
    found = RoutingAnalysis(max_images=16).measure(module.net.eval(), Images(data, 16, 1, torch.device("cpu")), "x")
    assert found.ablations == () and "classifiers only" in " ".join(summary(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 1}, r"analysis.max_images=1: expected a whole number of at least 2"),
        ({"top_k": [0]}, r"analysis.top_k\[0\]=0"),
        ({"renormalize": "yes"}, r"renormalize=yes: expected true, false or both"),
        ({"images_per_expert": 2.5}, "images_per_expert"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingAnalysis(**options)


def test_wrong_names_are_found_before_time_is_spent(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "batches", lambda self: pytest.fail("images were loaded"))
    with pytest.raises(ValueError, match="no class 'f'"):
        RoutingAnalysis(classes=["f"])(Module(), data, tmp_path, "x")
    with pytest.raises(ValueError, match="no router fits"):
        RoutingAnalysis(layers=["stem"]).check(Module().net)
    with pytest.raises(ValueError, match="has no expert 3"):
        RoutingAnalysis(experts=[3]).check(Module().net)
    with pytest.raises(ValueError, match="static"):
        RoutingAnalysis().check(Module(experts=0).net)


def test_from_a_checkpoint_as_users_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = Commands(tmp_path / "outputs", monkeypatch, capsys)
    assert commands.train(*TINY, "condconv.routing=softmax", "test=false").code == 0
    (last,) = commands.outputs.rglob("last.ckpt")
    few = ("analysis.max_images=24", "analysis.top_k=[1]", "analysis.ablations_by_layer=false")
    code, out, err = commands.eval(f"ckpt={last}", "analysis=routing", *few, "logger=wandb")
    assert code == 0, err
    folder = last.parent.parent / "analysis"
    assert str(folder / "index.html") in out and Image.open(folder / "class_weights.png").width > 500
    # One W&B run of its own, with every picture and all files.
    (wandb_run,) = (folder / "wandb").glob("offline-run-*")
    media = sorted(path.name for path in (wandb_run / "files" / "media" / "images").rglob("*.png"))
    assert len(media) == len(list(folder.glob("*.png"))) > 8
    assert "analysis/top1/shuffled routing" in (folder / "metrics.csv").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}

    monkeypatch.setattr("reports.routing.analysis.draw", lambda found, folder: [])
    other = tmp_path / "elsewhere"
    quick = ("analysis=routing", "analysis.max_images=8", "analysis.ablations=false")
    assert commands.eval(f"ckpt={last}", *quick, f"analysis.folder={other}").code == 0
    assert (other / "layers.csv").is_file() and not (other / "ablations.csv").exists()

    for arguments, message in (
        (("analysis=routing", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"), "runs in one process"),
        (("analysis=routing", "compile=true"), "compile=true"),
        (("logger=wandb",), "logger=wandb is for analysis=routing"),
        (("analysis=routing", "analysis.layers=[stem]"), "analysis.layers: no router fits 'stem'"),
        (("analysis=rooting",), "Choose one of: none, routing"),
    ):
        refused = commands.eval(f"ckpt={last}", *arguments)
        assert refused.code == 1 and message in refused.err, refused


def test_static_networks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(tmp_path, monkeypatch, capsys)
    static = ("condconv.experts=0", "trainer.limit_val_batches=1", "trainer.limit_train_batches=1", "test=false")
    assert commands.train(*TINY, *static).code == 0
    (last,) = tmp_path.rglob("last.ckpt")
    code, _, err = commands.eval(f"ckpt={last}", "analysis=routing")
    assert code == 1 and "static (condconv.experts=0)" in err and "Traceback" not in err
