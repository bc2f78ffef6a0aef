"""Train a network: `python train.py model=efficientnet_b0 condconv.experts=8`; `python train.py --help` says more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

from configs.checks import check_train, classes_of
from configs.claims import in_own_folder
from configs.messages import EXIT_REQUEUE, run_as_command, run_job
from configs.resolvers import register_resolvers
from configs.results import RunRecord, model_size, recorded
from configs.resuming import checkpoint_to_resume, resumed_config
from configs.runs import adopt_normalization, plain, save_config, typed
from models.callbacks import FinalValidation, LastCheckpoint, SavedConfig, final_figures, print_training_results
from models.pretrained import find_weights
from models.stopping import StopRequests

register_resolvers()


def build_network(model: DictConfig, condconv: DictConfig, num_classes: int, **weights: Any) -> nn.Module:
    """The network that a config's groups `model` and `condconv` describe, with pretrained weights if any are given."""
    options = {key: value for key, value in condconv.items() if key != "autotune"}  # of the training, not the network
    return instantiate(model, _partial_=True, _convert_="all", **options, num_classes=num_classes)(**weights)


@in_own_folder
def train(cfg: DictConfig) -> dict[str, float]:
    """Train as the config says; returns the final figures by name (`val/top1`, `test/top1`, `train/loss`, ...).

    Raises:
        ValueError, OSError, RuntimeError: the config or the data cannot work; the message says what to do.
    """
    if cfg.resume is not None:
        cfg = resumed_config(cfg.resume, typed(), cfg)
    check_train(cfg)
    weights, checkpoint = dict[str, Any](), checkpoint_to_resume(cfg.resume)
    if checkpoint is None and cfg.pretrained is not None:
        found = find_weights(cfg.pretrained, cfg.model.name, cfg.condconv.experts, cfg.condconv.init)
        adopt_normalization(cfg, found.normalization if cfg.resume is None else None)  # of a resumed run it is saved
        # The saved config builds the network without the file, so it must say what the file brought.
        OmegaConf.update(cfg, "model.timm_options", {**found.timm_options, **cfg.model.timm_options}, force_add=True)
        weights = {"pretrained": found, "new_classifier": cfg.new_classifier}
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data, _convert_="all")
    if rank_zero_only.rank == 0:  # mistakes in the data come to light before any run is started
        datamodule.prepare_data()
        datamodule.setup("fit")
    cfg.model.num_classes = classes_of(datamodule, cfg)
    net = build_network(cfg.model, cfg.condconv, datamodule.num_classes, **weights)
    recipe = {key: instantiate(cfg.optim[key], _convert_="all") for key in ("optimizer", "schedule")}
    module = instantiate(cfg.task, _partial_=True)(net, datamodule.num_classes, **recipe)
    module.check_data(datamodule)
    callbacks = [c for c in instantiate(cfg.callbacks, _convert_="all").values() if c is not None]
    loggers = [logger for logger in instantiate(cfg.logger, _convert_="all").values() if logger is not None]
    record = RunRecord(Path(cfg.paths.run), cfg.name, typed(), model_size(module, cfg.data.image_size))
    callbacks += [SavedConfig(plain(cfg), record.note), FinalValidation()]
    with StopRequests(EXIT_REQUEUE, cfg.trainer.max_time) as requests:
        LastCheckpoint.obey(requests, callbacks)  # max_time: Lightning's timer would evaluate in the middle of an epoch
        trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers, max_time=None)
        return run(cfg, record, trainer, module, datamodule, checkpoint)


def run(
    cfg: DictConfig, record: RunRecord, trainer: pl.Trainer, module: Any, datamodule: Any, checkpoint: Path | None
) -> dict[str, float]:
    """Fit, evaluate the final weights, show the results; loggers end well or badly, but they end."""
    with recorded(record, trainer) as figures:
        if trainer.is_global_zero:
            save_config(plain(cfg), record.folder)
            print(datamodule.describe())
        for logger in trainer.loggers:
            logger.log_hyperparams(plain(cfg))
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        measured = final_figures(trainer, module, datamodule)
        if cfg.test:
            trainer.test(module, datamodule=datamodule, verbose=False)
            measured |= trainer.callback_metrics
        figures.update({key: float(value) for key, value in sorted(measured.items())})
        print_training_results(trainer, figures, record.folder, record.seconds)
    return figures


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """The command."""
    run_job(train, cfg, "train")


if __name__ == "__main__":
    run_as_command(main, "train")
