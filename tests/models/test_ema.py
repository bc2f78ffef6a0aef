"""The weight average against the authors' formula, its evaluation by exchange, and its life in a Lightning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models.ema import CHECKPOINT_KEY, WeightAverage, WeightAverageCallback, averaged_weights


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 5))


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(6, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_equals_the_authors_formula_at_every_step(decay: float) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = WeightAverage(net, decay)
    expected = {name: value.double().numpy().copy() for name, value in net.state_dict().items()}
    for n in range(1, 25):
        train_step(net, optimizer)
        average.update(net)
        decay_n = min(decay, (1 + n) / (10 + n))
        assert average.current_decay() == pytest.approx(decay_n)
        for name, value in net.state_dict().items():
            expected[name] -= (1 - decay_n) * (expected[name] - value.double().numpy())
    assert decay_n == (0.5 if decay == 0.5 else pytest.approx(25 / 34))
    ours = average.state_dict()["state_dict"]
    assert ours.keys() == net.state_dict().keys()
    for name, value in ours.items():
        if name.endswith("num_batches_tracked"):
            assert value == 24
        else:
            np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # BatchNorm's statistics are averaged, not copied.
    assert not torch.equal(ours["1.running_mean"], net.state_dict()["1.running_mean"])


def test_without_the_ramp_the_decay_is_constant() -> None:
    average = WeightAverage(small_net(), 0.99, ramp=False)
    assert average.current_decay() == 0.99


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_applied_gives_the_average_and_takes_it_back(mode: Any) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    average = WeightAverage(net, 0.9)
    for _ in range(3):
        train_step(net, optimizer)
        average.update(net)
    raw = {name: value.clone() for name, value in net.state_dict().items()}
    twin = small_net()
    twin.load_state_dict(average.state_dict()["state_dict"])
    x = torch.randn(2, 3, 5, 5)
    net.eval()
    twin.eval()
    with pytest.raises(RuntimeError, match="in the middle"), mode(), average.applied(net):
        assert torch.equal(net(x), twin(x))
        raise RuntimeError("in the middle")
    for name, value in net.state_dict().items():
        assert torch.equal(value, raw[name]), name
    # Training goes on after it as if nothing had happened.
    net.train()
    train_step(net, optimizer)
    average.update(net)
    assert average.num_updates == 4


def test_tied_weights_are_exchanged_and_restored() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    average = WeightAverage(net, 0.5, ramp=False)
    start = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    average.update(net)
    with average.applied(net):
        torch.testing.assert_close(net[1].weight.detach(), start + 0.5)
    assert torch.equal(net[0].weight.detach(), start + 1.0)
    net.load_state_dict(average.state_dict()["state_dict"])


def test_wrong_decay_and_foreign_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        WeightAverage(small_net(), 1.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        WeightAverageCallback(decay=-0.1)
    average = WeightAverage(small_net())
    with pytest.raises(ValueError, match="another network"):
        average.load_state_dict(WeightAverage(nn.Linear(2, 2)).state_dict())
    with pytest.raises(ValueError, match="no averaged weights"):
        averaged_weights({"state_dict": {}})


class Module(LightningModule):
    """The least module that evaluates both sets of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.weight_average: WeightAverage | None = None
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raw = self.net(batch[0]).sum().item()
        assert self.weight_average is not None
        with self.weight_average.applied(self.net):
            self.seen.append((raw, self.net(batch[0]).sum().item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9)


def fit(folder: Path, max_steps: int, ckpt: Path | None = None, accumulate: int = 1) -> tuple[Module, Any]:
    torch.manual_seed(0)
    images, labels = torch.randn(48, 3, 5, 5), torch.randint(5, (48,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=6)
    module, callback = Module(), WeightAverageCallback(decay=0.9)
    trainer = Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return module, torch.load(folder / f"{max_steps}.ckpt", weights_only=True)


def test_a_resumed_run_has_the_same_average(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    _, resumed = fit(tmp_path, 16, ckpt=tmp_path / "8.ckpt")
    whole_module, whole = fit(tmp_path, 16)
    for key in ("state_dict",):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), name
    assert whole[CHECKPOINT_KEY]["num_updates"] == resumed[CHECKPOINT_KEY]["num_updates"] == 16
    average = averaged_weights(whole)
    for name, value in averaged_weights(resumed).items():
        assert torch.equal(value, average[name]), name
    # The module ends with its raw weights, the average beside them, and both were evaluated.
    for name, value in whole_module.net.state_dict().items():
        assert torch.equal(value, whole["state_dict"]["net." + name]), name
    assert not torch.equal(average["3.weight"], whole_module.net[3].weight)
    assert all(raw != averaged for raw, averaged in whole_module.seen[-8:])


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    _, checkpoint = fit(tmp_path, 4, accumulate=2)
    assert checkpoint["global_step"] == 4
    assert checkpoint[CHECKPOINT_KEY]["num_updates"] == 4


def test_a_checkpoint_without_an_average_starts_one_with_a_warning(tmp_path: Path) -> None:
    _, checkpoint = fit(tmp_path, 4)
    del checkpoint[CHECKPOINT_KEY]
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="no averaged weights"):
        _, resumed = fit(tmp_path, 6, ckpt=tmp_path / "plain.ckpt")
    assert resumed[CHECKPOINT_KEY]["num_updates"] == 2
