"""Classify image files: `python predict.py ckpt=outputs/.../last.ckpt images=folder out=predictions.csv`."""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from configs.checks import check_complete
from configs.messages import run_as_command, run_job
from configs.resolvers import register_resolvers
from data.decoding import UNREADABLE, read_image
from data.folder import EXTENSIONS
from data.transforms import Normalize, eval_transform
from export import open_ckpt
from models.predicting import Prediction, Read, find_files, write
from models.predicting import predict as predict_files
from models.pretrained import open_network
from models.weights import Card

register_resolvers()


def reader(card: Card) -> Read:
    """Reads an image file as the network's evaluation does: crop, size and normalisation of its card."""
    transform = eval_transform(card.image_size, crop_fraction=card.crop_fraction, interpolation=card.interpolation)
    normalize = Normalize(card.normalization)

    def read(file: Path) -> Tensor:
        try:
            image = read_image(str(file))
        except UNREADABLE as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return normalize(transform(image))

    return read


def predict(cfg: DictConfig) -> list[Prediction]:
    """Predict all images, print the classes, write the file that was asked for.

    Raises:
        ValueError, OSError: the checkpoint cannot be used, or no image can be read.
    """
    check_complete(cfg)
    weights, _ = open_ckpt(cfg.ckpt, cfg.average)
    network, card = open_network(weights), weights.card
    assert card is not None  # or it would not have opened
    sources = list(cfg.images) if isinstance(cfg.images, ListConfig) else [str(cfg.images)]
    files = find_files(sources, EXTENSIONS)
    done: list[Prediction] = []
    for found in predict_files(network, files, reader(card), card.class_names, top=cfg.top, batch_size=cfg.batch_size):
        done.append(found)
        classes = "  ".join(f"{name} {probability:.3f}" for name, probability in found.top)
        print(f"{found.file}: {f'not read: {found.error}' if found.error else classes}")
    unread = sum(bool(found.error) for found in done)
    if unread == len(done):
        raise ValueError(f"none of the {len(done)} images could be read")
    if unread:
        print(f"{unread} of {len(done)} images could not be read")
    if cfg.out is not None:
        write(done, Path(cfg.out).expanduser())
        print(f"written: {cfg.out}")
    return done


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """The command."""
    with torch.inference_mode():
        run_job(predict, cfg, "predict")


if __name__ == "__main__":
    run_as_command(main, "predict")
