"""The default checkpoints: the best epoch and the last one, which are not the same."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from configs.resolvers import register_resolvers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Worsening(pl.LightningModule):
    """Its accuracy falls from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", 1 / (1 + self.current_epoch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_last_is_the_last_epoch_even_when_it_is_not_the_best(tmp_path: Path) -> None:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["callbacks=none", f"paths.run={tmp_path}", "logger=none"])
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[instantiate(cfg.callbacks[key]) for key in ("checkpoint", "last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Worsening(), loader, loader)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    steps = {
        name: torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 2, "last": 6}
