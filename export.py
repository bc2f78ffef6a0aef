"""Export a network: `python export.py ckpt=outputs/.../last.ckpt format=onnx`; see docs/weights.md."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from condconv.export import FORMS
from configs.checks import check_choice, check_complete, check_export
from configs.messages import run_as_command, run_job
from configs.resolvers import register_resolvers
from configs.runs import choose_data, load_checkpoint
from models.callbacks import print_results
from models.pretrained import open_network, save_for_timm
from models.weights import WEIGHTS_FILE, Card, Weights, read_weights, save_weights, weights_of_run

register_resolvers()

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors", "hub": "-hub", "timm": "-timm.pth"}


def open_ckpt(ckpt: str, average: bool) -> tuple[Weights, DictConfig]:
    """The weights of a checkpoint or a file of ours, and the config of its data; of a file how images are prepared."""
    path = Path(ckpt).expanduser()
    if path.suffix == ".safetensors" or (path / WEIGHTS_FILE).is_file():
        weights = read_weights(path)
        return weights, OmegaConf.create(weights.preparation)
    checkpoint = load_checkpoint(path)
    return weights_of_run(checkpoint, str(path), average), OmegaConf.create(checkpoint["config"]["data"])


def export(cfg: DictConfig) -> Path:
    """Write the file or folder that the config asks for; returns its path.

    Raises:
        ValueError, OSError, RuntimeError: the checkpoint or the network cannot be exported so; the message says why.
    """
    check_complete(cfg)
    check_choice("format", cfg.format, list(SUFFIXES))
    check_choice("form", cfg.form, list(FORMS))
    weights, trained_on = open_ckpt(cfg.ckpt, cfg.average)
    check_export(cfg, weights.is_detector, "_target_" in trained_on)
    network, card = open_network(weights), weights.card
    assert card is not None  # or it would not have opened
    beside = Path(cfg.ckpt).expanduser().absolute()
    stem = beside.name if beside.is_dir() else beside.stem  # folders of sweeps have dots in their names
    path = Path(cfg.out).expanduser() if cfg.out else beside.with_name(stem + SUFFIXES[cfg.format])
    if cfg.format in ("onnx", "torch_export"):
        to_runtime(cfg, network, card, path, trained_on)
        return path
    if cfg.format == "safetensors":
        save_weights(path, network.state_dict(), card)
    elif cfg.format == "hub":
        from models.hub import HubNetwork

        HubNetwork.of(weights).save_pretrained(path)
    else:
        print("in timm:", save_for_timm(network, card.model, path))
    print(f"written: {path}")
    return path


def to_runtime(cfg: DictConfig, network: nn.Module, card: Card, path: Path, trained_on: DictConfig) -> None:
    """ONNX (with its int8 version, if asked for) or torch.export, run back and compared."""
    from models.exporting import export_onnx, export_torch, onnx_runner

    if cfg.format == "torch_export":
        print(export_torch(network, path, card.image_size, card, form=cfg.form))
        return
    options = {"form": cfg.form, "opset": cfg.opset, "dynamic_size": cfg.dynamic_size}
    print(export_onnx(network, path, card.image_size, card, **options))
    if cfg.int8:
        from models.quantizing import accuracies, quantize

        datamodule = instantiate(choose_data(cfg.data, trained_on), _convert_="all")
        datamodule.prepare_data()
        batches = (datamodule.normalize(images) for images, _ in datamodule.train_dataloader())
        count = -(-cfg.calibration_images // datamodule.batch_size_per_device)
        small = quantize(path, path.with_name(f"{path.stem}-int8.onnx"), islice(batches, count))
        runs = {"PyTorch": lambda x: [network(x)], "ONNX fp32": onnx_runner(path), "ONNX int8": onnx_runner(small)}
        evaluation = ((datamodule.normalize(images), labels) for images, labels in datamodule.val_dataloader())
        print_results(f"top-1 on {datamodule.name}", accuracies(runs, evaluation))
        print(f"{small}: {small.stat().st_size / 2**20:.1f} MiB")


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """The command."""
    run_job(export, cfg, "export")


if __name__ == "__main__":
    run_as_command(main, "export")
