"""ImageNet, and any other data set of image files in folders or tar shards, with a training and an evaluation part."""

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.base import ImageDataModule
from data.decoding import choose_decoder
from data.folder import FolderSource, find_classes, find_images
from data.shards import ShardIndex, ShardSource, find_shards, open_index
from data.stored import Source, StoredImages
from data.subsets import Holdout, check_holdout, first_of_each, split
from data.transforms import EvalTransform, ImageTransform, TrainTransform, choice

FORMATS = ("auto", "folders", "shards")
CLASSES_FILE = "classes.txt"


class ImageFolderDataModule(ImageDataModule):
    """Images in folders, one per class (labels follow the sorted names of those in train/), or in tar shards.

    Args:
        root: the folder with train/ and val/, each with a folder of images per class or with tar shards
            (`data.shards`); shards may also lie in root itself, with "train" and "val" in their names.
        format: "folders", "shards", or "auto": shards where there are any.
        num_classes: checked against the folders or labels if given.
        decoder: "auto" or one of `data.decoding.DECODERS`.
        crop_fraction: share of the resized image's shorter side that the evaluation crop keeps (1.0: all of it).
        interpolation: "bicubic" or "bilinear", in training and evaluation.
        max_corrupt: number of unreadable images that a process tolerates in each part; see `data.stored.StoredImages`.
        max_train_per_class, max_val_per_class: use only the first so many images of each class.
        holdout: images of each class, or a share of them, that are taken from train/ for validation and test; val/ is
            then not read, so a recipe can be tuned without looking at it. See `data.subsets.split`.
        train_crop, crop_scale, crop_ratio, horizontal_flip, augment, randaugment_ops, randaugment_magnitude,
            random_erasing, dct_scaling: see `data.transforms.TrainTransform`.
        options: see `ImageDataModule`.

    Raises:
        FileNotFoundError: a folder is missing or holds no images (on first use of the folders).
        ValueError: val/ has a class that train/ has not, or the number of classes is not `num_classes`.
        RuntimeError: (while reading) a process met more than `max_corrupt` unreadable images.
    """

    name = "imagefolder"
    in_memory = False

    def __init__(
        self,
        root: str | Path,
        *,
        format: str = "auto",
        num_classes: int | None = None,
        decoder: str = "auto",
        image_size: int = 224,
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        max_corrupt: int = 10,
        max_train_per_class: int | None = None,
        max_val_per_class: int | None = None,
        holdout: Holdout = None,
        train_crop: str = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        augment: str = "none",
        randaugment_ops: int = 2,
        randaugment_magnitude: int = 9,
        random_erasing: float = 0.0,
        dct_scaling: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        for what, limit in (("max_train_per_class", max_train_per_class), ("max_val_per_class", max_val_per_class)):
            if limit is not None and limit < 1:
                raise ValueError(f"{what} {limit}: expected 1 or more, or null for all images")
        if max_corrupt < 0:
            raise ValueError(f"max_corrupt {max_corrupt}: expected 0 or more")
        self.root = Path(root).expanduser()
        self.format = choice("data format", format, FORMATS)
        self.decoder = choose_decoder(decoder)
        self.expected_classes = num_classes
        self.max_corrupt = max_corrupt
        self.holdout = check_holdout(holdout)
        self._index_of: dict[str, ShardIndex] = {}
        self.max_per_class = {"train": max_train_per_class, "val": max_val_per_class}
        self.transforms: dict[str, ImageTransform] = {
            "train": TrainTransform(
                image_size,
                train_crop=train_crop,
                crop_scale=crop_scale,
                crop_ratio=crop_ratio,
                horizontal_flip=horizontal_flip,
                augment=augment,
                randaugment_ops=randaugment_ops,
                randaugment_magnitude=randaugment_magnitude,
                random_erasing=random_erasing,
                interpolation=interpolation,
                fill=self.normalize.mean.flatten().tolist(),
                dct_scaling=dct_scaling,
            ),
            "val": EvalTransform(image_size, crop_fraction=crop_fraction, interpolation=interpolation),
        }

    @cached_property
    def is_sharded(self) -> bool:
        """Whether the images lie in tar shards."""
        if self.format != "auto":
            return self.format == "shards"
        # The archives that class folders were unpacked from may lie beside them.
        train = self.root / "train"
        unpacked = train.is_dir() and any(each.is_dir() and not each.name.startswith(".") for each in os.scandir(train))
        return not unpacked and bool(find_shards(self.root, "train")[1])

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read from the files, on first use
        classes = self._shard_classes() if self.is_sharded else find_classes(self.root / "train")
        if self.expected_classes not in (None, len(classes)):
            what = "class names" if self.is_sharded else "class folders"
            raise ValueError(
                f"{self.root if self.is_sharded else self.root / 'train'} holds {len(classes)} {what}, expected "
                f"{self.expected_classes} (data.num_classes): set data.root to another folder, or "
                f"data.num_classes={len(classes)}"
            )
        return tuple(classes)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # read from the files, on first use
        return len(self.class_names)

    def describe(self) -> str:
        where = "shards" if self.is_sharded else "folders"
        held = "" if self.holdout is None else "; evaluated on images held out of train/, val/ is not read"
        return f"{super().describe()} ({where}, decoded by {self.decoder}{held})"

    def load(self, train: bool) -> StoredImages:
        part = "train" if train else "val"
        source = (self._shards if self.is_sharded else self._folder)(part)
        options = {"max_corrupt": self.max_corrupt, "seed": self.seed, "decoder": self.decoder}
        return StoredImages(source, self.transforms[part], train=train, **options)

    def _folder(self, part: str) -> Source:
        folder = self._folder_of(part)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        classes = self.class_names if folder == "train" else self._evaluation_classes()
        examples = find_images(self.root / folder, classes, label_of)
        kept = self._kept(part, np.array([example.label for example in examples]))
        return FolderSource([examples[position] for position in kept], self.root / folder)

    def _shards(self, part: str) -> Source:
        folder = self._folder_of(part)
        index = self._indices(folder)
        highest = int(index.labels.max())
        if highest >= self.num_classes:
            raise ValueError(
                f"the {folder} shards in {self.root} have labels up to {highest}, "
                f"but there are {self.num_classes} classes"
            )
        return ShardSource(index, index.shards[0].parent, self._kept(part, index.labels))

    def _folder_of(self, part: str) -> str:
        return part if self.holdout is None else "train"

    def _kept(self, part: str, labels: np.ndarray) -> np.ndarray:
        """Positions, among the images of a folder, of those that a part ("train", "val") uses."""
        if self.holdout is None:
            return first_of_each(labels, self.max_per_class[part])
        kept = split(labels, self.holdout, self.class_names)[0 if part == "train" else 1]
        return kept[first_of_each(labels[kept], self.max_per_class[part])]

    def _indices(self, part: str) -> ShardIndex:
        if part not in self._index_of:
            self._index_of[part] = open_index(self.root, part)
        return self._index_of[part]

    def _shard_classes(self) -> list[str]:
        """Names from classes.txt, a line each, as data.make_shards writes it; otherwise the numbers are the names."""
        file = self.root / CLASSES_FILE
        if file.is_file():
            return file.read_text(encoding="utf-8").splitlines()
        highest = int(self._indices("train").labels.max())
        return [str(label) for label in range(max(highest + 1, self.expected_classes or 0))]

    def _evaluation_classes(self) -> list[str]:
        classes = find_classes(self.root / "val")
        unknown = sorted(set(classes) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{self.root / 'val'} holds {len(unknown)} class folder(s) that {self.root / 'train'} has not: "
                f"{', '.join(unknown[:10])}; both must use the same names"
            )
        missing = sorted(set(self.class_names) - set(classes))
        if missing:
            warnings.warn(
                f"{self.root / 'val'} has no folder for {len(missing)} of the {self.num_classes} classes: "
                f"{', '.join(missing[:10])}; they will not be evaluated",
                stacklevel=2,
            )
        return classes


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet (ILSVRC 2012), with its 1,000 classes checked. Arguments as `ImageFolderDataModule`."""

    name = "imagenet"

    def __init__(self, root: str | Path, *, num_classes: int | None = 1000, **options: Any) -> None:
        super().__init__(root, num_classes=num_classes, **options)
