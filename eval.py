"""Evaluate a checkpoint: `python eval.py ckpt=outputs/.../checkpoints/last.ckpt`; nothing has to be retyped."""

from __future__ import annotations

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from condconv.complexity import complexity, readable
from configs.checks import check_eval
from configs.messages import UserError, run_as_command, run_job
from configs.resolvers import register_resolvers
from configs.runs import load_checkpoint
from models.callbacks import EvaluationSpeed, print_results
from models.ema import CHECKPOINT_KEY, averaged_weights
from train import build_network

register_resolvers()


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Rebuild the run's network and data from its saved config, and measure; returns the figures by name.

    `top1`, `top5`, `loss` are of the raw weights; `ema/top1` and so on of the averaged ones, if the run kept them.

    Raises:
        ValueError, OSError: the checkpoint or the data cannot work; the message says what to do.
    """
    check_eval(cfg)
    checkpoint = load_checkpoint(cfg.ckpt)
    saved = OmegaConf.create(checkpoint["config"])
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = choose_data(cfg.data, saved.data)
    datamodule = instantiate(data, _convert_="all")
    datamodule.prepare_data()
    num_classes = saved.model.num_classes
    if datamodule.num_classes != num_classes:
        raise UserError(
            f"The network of {cfg.ckpt} has {num_classes} classes, the data {datamodule.num_classes}: evaluate it on "
            f"the data it was trained for, or on a set with the same classes."
        )
    net = build_network(saved.model, saved.condconv, num_classes)
    task = instantiate(saved.task, _partial_=True, compile=cfg.compile, channels_last=cfg.channels_last)
    module = task(net, num_classes)
    weights = {"": {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}}
    if CHECKPOINT_KEY in checkpoint:
        weights["ema/"] = averaged_weights(checkpoint)
    speed = EvaluationSpeed()
    trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=[speed], logger=False)
    figures: dict[str, float] = {}
    for prefix, state in weights.items():
        net.load_state_dict(state)
        trainer.test(module, datamodule=datamodule, verbose=False)
        figures |= {key.replace("test/", prefix): float(value) for key, value in trainer.callback_metrics.items()}
    counted = complexity(net, datamodule.image_size)
    figures |= {"params": counted.params, "madds": counted.madds, "images_per_second": speed.images_per_second}
    if trainer.is_global_zero:
        shown = {**figures, "params": readable(counted.params), "madds": readable(counted.madds)}
        shown["images_per_second"] = f"{speed.images_per_second:.0f} ({trainer.strategy.root_device})"
        print_results(f"{saved.name} on {datamodule.name}", shown)
    return figures


def choose_data(given: DictConfig, saved: DictConfig) -> DictConfig:
    """The data of the run, with the values given on the command line, or another data set altogether."""
    if given.get("_target_") is not None:
        return given
    changes = {key: value for key, value in given.items() if value is not None}
    unknown = [key for key in changes if key not in saved]
    if unknown:
        raise UserError(f"data.{unknown[0]}: the run's data set has no such setting; it has {', '.join(saved)}.")
    return OmegaConf.merge(saved, changes)


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    """The command."""
    run_job(evaluate, cfg, "eval")


if __name__ == "__main__":
    run_as_command(main, "eval")
