"""ImageNet, and any other data set in folders: root/train/<class>/*.jpg and root/val/<class>/*.jpg."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from data.base import ImageDataModule
from data.folder import FolderImages, find_classes, find_images
from data.transforms import PilTransform, eval_transform, train_transform


class ImageFolderDataModule(ImageDataModule):
    """Images in folders, one per class; labels follow the sorted names of the folders in train/.

    Args:
        root: the folder with train/ and val/.
        num_classes: checked against the folders if given.
        crop_fraction: share of the resized image's shorter side that the evaluation crop keeps (1.0: all of it).
        interpolation: "bicubic" or "bilinear", in training and evaluation.
        max_corrupt: number of unreadable images tolerated in each part; see `data.folder.FolderImages`.
        max_train_per_class, max_val_per_class: use only the first so many images of each class.
        train_crop, crop_scale, crop_ratio, horizontal_flip, augment, randaugment_ops, randaugment_magnitude,
            random_erasing: see `data.transforms.train_transform`.
        options: see `ImageDataModule`.

    Raises:
        FileNotFoundError: a folder is missing or holds no images (on first use of the folders).
        ValueError: val/ has a class that train/ has not, or the number of classes is not `num_classes`.
        RuntimeError: (while reading) more than `max_corrupt` images are unreadable.
    """

    name = "imagefolder"
    in_memory = False

    def __init__(
        self,
        root: str | Path,
        *,
        num_classes: int | None = None,
        image_size: int = 224,
        crop_fraction: float = 0.875,
        interpolation: str = "bicubic",
        max_corrupt: int = 10,
        max_train_per_class: int | None = None,
        max_val_per_class: int | None = None,
        train_crop: str = "random_resized",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        augment: str = "none",
        randaugment_ops: int = 2,
        randaugment_magnitude: int = 9,
        random_erasing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        for what, limit in (("max_train_per_class", max_train_per_class), ("max_val_per_class", max_val_per_class)):
            if limit is not None and limit < 1:
                raise ValueError(f"{what} {limit}: expected 1 or more, or null for all images")
        if max_corrupt < 0:
            raise ValueError(f"max_corrupt {max_corrupt}: expected 0 or more")
        self.root = Path(root).expanduser()
        self.expected_classes = num_classes
        self.max_corrupt = max_corrupt
        self.max_per_class = {"train": max_train_per_class, "val": max_val_per_class}
        self.transforms: dict[str, PilTransform] = {
            "train": train_transform(
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
            ),
            "val": eval_transform(image_size, crop_fraction=crop_fraction, interpolation=interpolation),
        }

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read from the folders, on first use
        classes = find_classes(self.root / "train")
        if self.expected_classes not in (None, len(classes)):
            raise ValueError(
                f"{self.root / 'train'} holds {len(classes)} class folders, expected {self.expected_classes} "
                f"(data.num_classes): set data.root to another folder, or data.num_classes={len(classes)}"
            )
        return tuple(classes)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # read from the folders, on first use
        return len(self.class_names)

    def load(self, train: bool) -> FolderImages:
        part = "train" if train else "val"
        folder = self.root / part
        label_of = {name: label for label, name in enumerate(self.class_names)}
        classes = self.class_names if train else self._evaluation_classes()
        examples = find_images(folder, classes, label_of, self.max_per_class[part])
        return FolderImages(
            examples, folder, self.transforms[part], train=train, max_corrupt=self.max_corrupt, seed=self.seed
        )

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
    """ImageNet (ILSVRC 2012) in folders, with its 1,000 classes checked. Arguments as `ImageFolderDataModule`."""

    name = "imagenet"

    def __init__(self, root: str | Path, *, num_classes: int | None = 1000, **options: Any) -> None:
        super().__init__(root, num_classes=num_classes, **options)
