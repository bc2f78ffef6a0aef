"""Evaluate a checkpoint: `python eval.py ckpt=outputs/.../last.ckpt`; `analysis=routing` looks closer."""

from __future__ import annotations

from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from condconv import compress_experts
from configs.checks import check_classes, check_eval
from configs.messages import run_as_command, run_job
from configs.resolvers import register_resolvers
from configs.runs import analysis_folder, choose_data, load_checkpoint, plain
from models.callbacks import EvaluationSpeed, evaluation_files, print_evaluation
from models.ema import CHECKPOINT_KEY, averaged_weights
from models.loggers import finishing
from models.pretrained import for_evaluation
from models.weights import weights_of_run
from train import build_network

register_resolvers()


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Rebuild the run's network and data from its saved config, and measure; returns the figures by name.

    `top1`, `top5`, `loss` (of a detector `AP` and so on, and files) are of the raw weights; `ema/top1` and so on of
    the averaged ones, if the run kept them.

    Raises:
        ValueError, OSError: the checkpoint or the data cannot work; the message says what to do.
    """
    check_eval(cfg)
    saved, weights, pretrained = open_weights(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = choose_data(cfg.data, saved.data)
    datamodule = instantiate(data, _convert_="all")
    datamodule.prepare_data()
    num_classes = check_classes(cfg, saved, datamodule)
    if "image_size" in saved.model:  # a detector's anchors are made for it
        saved.model.image_size = datamodule.image_size
    net = build_network(saved.model, saved.condconv, num_classes, **pretrained)
    if cfg.expert_dtype is not None:  # weights that are loaded later are compressed as they come
        compress_experts(net, cfg.expert_dtype)
    analysis = instantiate(cfg.analysis, _convert_="all") if cfg.analysis.get("_target_") else None
    if analysis is not None:
        analysis.check(net)
    task = instantiate(saved.task, _partial_=True, compile=cfg.compile, channels_last=cfg.channels_last)
    module = task(net, num_classes)
    module.check_data(datamodule)
    speed, files = EvaluationSpeed(), evaluation_files(module, cfg.out, cfg.ckpt)
    trainer = instantiate(cfg.trainer, _partial_=True)(callbacks=[speed, *files], logger=False)
    figures: dict[str, float] = {}
    for prefix, state in weights.items():
        if state is not None:
            net.load_state_dict(state)
        trainer.test(module, datamodule=datamodule, verbose=False)
        figures |= {key.replace("test/", prefix): float(value) for key, value in trainer.callback_metrics.items()}
    counted = module.complexity(datamodule.image_size)
    figures |= {"params": counted.params, "madds": counted.madds, "images_per_second": speed.images_per_second}
    title, device = f"{saved.name} on {datamodule.name}", trainer.strategy.root_device
    if trainer.is_global_zero:
        print_evaluation(title, figures, device, {"files": files[0].folder} if files else {})
    if analysis is not None:  # of the weights evaluated last
        cfg.paths.run, cfg.name = str(analysis.folder or analysis_folder(cfg)), f"{saved.name}-analysis"
        with finishing(instantiate(cfg.logger, _convert_="all")) as loggers:
            print("  analysis        ", analysis(module.to(device), datamodule, cfg.paths.run, title, loggers))
    return figures


def open_weights(cfg: DictConfig) -> tuple[DictConfig, dict[str, Any], dict[str, Any]]:
    """The config that builds the network, states to load by prefix, and arguments that bring pretrained weights."""
    if cfg.pretrained is not None:
        weights, settings = for_evaluation(cfg.pretrained, plain(cfg.model), plain(cfg.condconv))
        saved = {**settings, "name": str(cfg.pretrained), "data": weights.preparation}
        saved["class_names"] = list(weights.class_names)
        return OmegaConf.create(saved), {"": None}, {"pretrained": weights}
    checkpoint = load_checkpoint(cfg.ckpt)
    saved = OmegaConf.create({**checkpoint["config"], "class_names": checkpoint.get("class_names") or []})
    if cfg.condconv.backend is not None:
        saved.condconv.backend = cfg.condconv.backend
    states = {"": weights_of_run(checkpoint, str(cfg.ckpt), averaged=False).state}
    if CHECKPOINT_KEY in checkpoint:
        states["ema/"] = averaged_weights(checkpoint)
    return saved, states, {}


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    """The command."""
    run_job(evaluate, cfg, "eval")


if __name__ == "__main__":
    run_as_command(main, "eval")
