"""The LightningModule of classification: loss, figures, schedule, memory format, compilation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from models import create_model
from models.callbacks.autotune import Autotune
from models.classification import ClassificationModule
from models.ema import WeightAverage
from models.optim import build_optimizer
from models.schedules import build_schedule


class Linear(nn.Module):
    """The smallest network on images."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def batches(count: int = 5, size: int = 6, num_classes: int = 7) -> DataLoader:
    images, labels = torch.randn(count * size, 3, 4, 4), torch.randint(num_classes, (count * size,))
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def trainer(**options: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, **options})


def recipe(lr: float = 0.1, schedule: str = "constant", **options: object) -> dict:
    return {
        "optimizer": partial(build_optimizer, name="sgd", lr=lr, momentum=0.0),
        "schedule": partial(build_schedule, name=schedule, **options),
    }


def test_figures_are_those_computed_by_hand() -> None:
    module, loader = ClassificationModule(Linear(), 7), batches(size=7)
    figures = trainer().validate(module, loader, verbose=False)[0]
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = module.net(images)
    top5 = logits.topk(5).indices == labels[:, None]
    assert figures["val/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert figures["val/top5"] == pytest.approx(top5.any(1).float().mean().item())
    assert figures["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_smaller_last_batch_weighs_less() -> None:
    """35 images in batches of 8: the mean is over images, not over batches."""
    torch.manual_seed(1)
    images, labels = torch.randn(35, 3, 4, 4), torch.randint(7, (35,))
    net = Linear()
    data = TensorDataset(images, labels)
    figures = [trainer().validate(ClassificationModule(net, 7), DataLoader(data, n), verbose=False)[0] for n in (8, 35)]
    assert figures[0]["val/top1"] == pytest.approx(figures[1]["val/top1"])
    assert figures[0]["val/loss"] == pytest.approx(figures[1]["val/loss"], rel=1e-5)


def test_top5_of_three_classes_is_top3() -> None:
    figures = trainer().test(ClassificationModule(Linear(3), 3), batches(num_classes=3), verbose=False)[0]
    assert figures["test/top5"] == 1.0 and figures["test/top1"] < 1.0


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    net, (images, labels) = Linear(), next(iter(batches()))
    module = ClassificationModule(net, 7, label_smoothing=0.3)
    module.log = lambda *args, **kwargs: None  # outside of a trainer
    loss = module.training_step((images, labels), 0)
    targets = F.one_hot(labels, 7) * 0.7 + 0.3 / 7
    torch.testing.assert_close(loss, -(targets * net(images).log_softmax(1)).sum(1).mean())


def test_one_sgd_step_is_the_one_computed_by_hand() -> None:
    net = Linear()
    images, labels = next(iter(batches(1)))
    loss = F.cross_entropy(net(images), labels)
    expected = net.linear.weight.detach() - 0.1 * torch.autograd.grad(loss, net.linear.weight)[0]
    trainer().fit(ClassificationModule(net, 7, **recipe()), DataLoader(TensorDataset(images, labels), batch_size=6))
    torch.testing.assert_close(net.linear.weight.detach(), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_moves_with_every_optimiser_step(accumulate: int) -> None:
    rates: list[float] = []

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    options = recipe(lr=2.0, schedule="cosine", warmup_epochs=1)
    module = ClassificationModule(Linear(), 7, **options)
    fitting = trainer(max_epochs=3, callbacks=[Recorder()], accumulate_grad_batches=accumulate)
    fitting.fit(module, batches(6))
    steps_per_epoch = 6 // accumulate
    factor = build_schedule("cosine", steps_per_epoch=steps_per_epoch, total_epochs=3, warmup_epochs=1)
    assert rates == pytest.approx([2.0 * factor(step) for step in range(3 * steps_per_epoch)])
    assert rates[0] == 0.0


def test_both_raw_and_averaged_weights_are_evaluated() -> None:
    net, loader = Linear(), batches()
    module = ClassificationModule(net, 7)
    module.weight_average = WeightAverage(net, decay=0.5)
    before = trainer().validate(module, loader, verbose=False)[0]["val/loss"]
    with torch.no_grad():
        net.linear.weight.mul_(-3)
    figures = trainer().validate(module, loader, verbose=False)[0]
    assert figures["val_ema/loss"] == pytest.approx(before)
    assert figures["val/loss"] != pytest.approx(before)


def test_a_batch_transform_gets_its_position_and_may_return_probabilities() -> None:
    positions = []

    def mix(images: Tensor, labels: Tensor, num_classes: int, position: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        positions.append(position)
        targets = F.one_hot(labels, num_classes).float()
        return (images + images.flip(0)) / 2, (targets + targets.flip(0)) / 2

    net = Linear()
    fitting = trainer(max_epochs=2)
    fitting.fit(ClassificationModule(net, 7, batch_transform=mix, **recipe()), batches(2))
    assert positions == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert "train/top1" not in fitting.callback_metrics and fitting.callback_metrics["train/loss"].isfinite()


def test_channels_last_changes_the_layout_and_not_the_values() -> None:
    torch.manual_seed(0)
    net = create_model("mobilenet_v1", 5, 2, width=0.25).eval()
    images = torch.randn(3, 3, 32, 32)
    plain = ClassificationModule(net, 5, channels_last=False)(images)
    kernels = net.state_dict()
    last = ClassificationModule(net, 5, channels_last=True)
    assert net.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images), plain, rtol=1e-4, atol=1e-5)
    assert net.state_dict().keys() == kernels.keys()


def test_images_get_the_dtype_of_the_network_and_autotune_measures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 images are not even copied; the data normalises in float32, whatever the trainer's precision."""
    images, seen = torch.randn(2, 3, 4, 4), []
    module = ClassificationModule(Linear(), 7, channels_last=False)
    module.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    module(images)
    assert seen[0] is images
    assert module.double()(images).dtype == torch.float64
    monkeypatch.setattr("models.callbacks.autotune.autotune", lambda net, images: seen.append(images))
    run: Any = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext), is_global_zero=False)
    Autotune(True, image_size=8, batch_size_per_device=5).on_fit_start(run, module)
    assert seen[-1].dtype == torch.float64 and seen[-1].shape == (5, 3, 8, 8)


def test_compile_keeps_the_names_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    net = Linear()
    module = ClassificationModule(net, 7, compile=True)
    assert compiled == [net]
    assert set(module.state_dict()) == {"net.linear.weight", "net.linear.bias"}


def test_checkpoints_hold_the_network_alone() -> None:
    """No states of metrics: they would not load into a module that measures something else."""
    assert all(key.startswith("net.") for key in ClassificationModule(Linear(), 7).state_dict())


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        ClassificationModule(Linear(1), 1)


def test_evaluation_needs_no_optimiser_and_training_says_so() -> None:
    with pytest.raises(ValueError, match="no optimiser"):
        ClassificationModule(Linear(), 7).configure_optimizers()


def test_activation_checkpointing_changes_memory_and_not_the_gradients() -> None:
    gradients, saved = [], []
    for again in (False, True):
        torch.manual_seed(3)
        net = create_model("mobilenet_v1", 10, experts=2, width=0.25)
        module = ClassificationModule(net, 10, activation_checkpointing=again, channels_last=False)
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(x).square().sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
        saved.append(kept)
    assert saved[1] < saved[0] / 2
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(ValueError, match="Linear has no blocks"):
        ClassificationModule(nn.Linear(3, 3), 3, activation_checkpointing=True)
