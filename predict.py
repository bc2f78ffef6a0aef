"""Classes or boxes of image files: `python predict.py ckpt=outputs/.../last.ckpt images=folder out=predictions.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image
from torch import Tensor

from configs.checks import check_complete, check_predict
from configs.messages import run_as_command, run_job
from configs.resolvers import register_resolvers
from data.decoding import UNREADABLE, read_image
from data.detection_transforms import detection_eval_transform
from data.folder import EXTENSIONS
from data.transforms import Normalize, eval_transform
from export import open_ckpt
from models.predicting import Prediction, find_files, write
from models.predicting import predict as predict_files
from models.predicting_boxes import BoxPrediction, predict_boxes, write_boxes
from models.prediction_file import usable_path
from models.pretrained import open_network
from models.ssd_network import SSD
from models.weights import Card

register_resolvers()


class Reader:
    """Reads an image file as the network's evaluation does: crop or size, and normalisation, of its card."""

    def __init__(self, card: Card) -> None:
        self.crop = eval_transform(card.image_size, crop_fraction=card.crop_fraction, interpolation=card.interpolation)
        self.stretch = detection_eval_transform(card.image_size)
        self.normalize = Normalize(card.normalization)

    def image(self, file: Path) -> Tensor:
        """Normalised, `[3, S, S]`, for a classifier."""
        return self.normalize(self.crop(self._open(file)))

    def both(self, file: Path) -> tuple[Tensor, Image.Image]:
        """The whole image, resized to a square and normalised, for a detector; and the picture."""
        picture = self._open(file)
        pixels, _, _ = self.stretch(picture, torch.zeros(0, 4), torch.zeros(0))
        return self.normalize(pixels), picture

    def _open(self, file: Path) -> Image.Image:
        try:
            return read_image(str(file))
        except UNREADABLE as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def predict(cfg: DictConfig) -> list[Any]:
    """Predict all images, print classes or boxes, write the files that were asked for.

    Raises:
        ValueError, OSError: the checkpoint cannot be used, no image can be read, or the file cannot be written.
    """
    check_complete(cfg)
    out = usable_path(cfg.out)
    weights, _ = open_ckpt(cfg.ckpt, cfg.average)
    check_predict(cfg, weights.is_detector)
    network, card = open_network(weights), weights.card
    assert card is not None  # or it would not have opened
    sources = list(cfg.images) if isinstance(cfg.images, ListConfig) else [str(cfg.images)]
    files, read, names = find_files(sources, EXTENSIONS), Reader(card), card.class_names
    if isinstance(network, SSD):
        options = {"min_score": cfg.min_score, "pictures": cfg.pictures, "batch_size": cfg.batch_size}
        found: Any = predict_boxes(network, files, read.both, names, **options)
    else:
        found = predict_files(network, files, read.image, names, top=cfg.top, batch_size=cfg.batch_size)
    done: list[Prediction | BoxPrediction] = []
    for each in found:
        done.append(each)
        print(each)
    if (unread := sum(bool(each.error) for each in done)) == len(done):
        raise ValueError(f"none of the {len(done)} images could be read")
    if unread:
        print(f"{unread} of {len(done)} images could not be read")
    if out is not None:
        (write_boxes if isinstance(network, SSD) else write)(done, out)
        print(f"written: {out}")
    return done


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """The command."""
    with torch.inference_mode():
        run_job(predict, cfg, "predict")


if __name__ == "__main__":
    run_as_command(main, "predict")
