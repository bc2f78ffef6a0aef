"""COCO, and any other object detection data in COCO's format: folders of images and two annotation files."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from data.coco_index import BAD_BOXES, CocoIndex, read_index, read_truth
from data.decoding import Picture, UnreadableImage, choose_decoder
from data.detection import DetectionDataModule, DetectionDataset, DetectionExample, make_target
from data.detection_transforms import AUGMENTS, DetectionTransform, detection_eval_transform, detection_train_transform
from data.sampling import Key, example_rng, split_key
from data.transforms import NORMALIZATIONS, choice
from data.unusable import Unusable

# So many files are looked for before the training: a wrong folder shows at once, and 118,000 are not opened.
LOOKED_FOR = 16


class CocoImages(DetectionDataset):
    """Decodes and augments the images of an index; unusable ones are skipped, up to a limit.

    Unusable is a file that is absent, corrupt, or of another size than the annotation file says (its boxes would stand
    elsewhere). In training the next image takes its place, in evaluation it is left out; `check` warns of what was met.

    Args:
        index: images and boxes.
        folder: of the image files.
        transform: see `data.detection_transforms`.
        train: whether to replace unusable images.
        max_corrupt: number of unusable images that each training process tolerates.
        seed: of the augmentation.
        decoder: see `data.decoding.choose_decoder`.
    """

    def __init__(
        self,
        index: CocoIndex,
        folder: Path,
        transform: DetectionTransform,
        *,
        train: bool,
        max_corrupt: int = 10,
        seed: int = 0,
        decoder: str = "auto",
    ) -> None:
        self.index = index
        self.folder = folder
        self.transform = transform
        self.seed = seed
        self.decoder = choose_decoder(decoder)
        self.unusable = Unusable(len(index), train=train, limit=max_corrupt)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key) -> DetectionExample | None:
        """(image uint8 `[3, S, S]`, target), or None where there is nothing to return."""
        epoch, index = split_key(key)
        for position in self.unusable.candidates(index):
            image = self._read(position)
            if image is not None:
                boxes, labels = self.index.truth(position)
                with example_rng(self.seed, epoch, index):
                    pixels, boxes, labels = self.transform(image, boxes, labels)
                image_id = int(self.index.image_ids[position])
                return pixels, make_target(boxes, labels, image_id, self.index.size(position))
        return None

    def check(self) -> None:
        """Warns of unusable files met since the last call.

        Raises:
            RuntimeError: there are more of them than `max_corrupt`, or nothing else is left.
        """
        self.unusable.check(self.folder, lambda i: f"{self.index.name(i)} ({self._failure(i)})")

    def open(self, position: int) -> Image.Image:
        """The image in RGB, fully decoded.

        Raises:
            OSError: it is absent, or cannot be read.
            UnreadableImage: it is corrupt, or has another size than listed.
        """
        height, width = self.index.size(position)
        picture = Picture((self.folder / self.index.name(position)).read_bytes(), self.decoder)
        if picture.size != (width, height):
            across, down = picture.size
            raise UnreadableImage(f"{across} x {down} pixels, the annotation file says {width} x {height}")
        return picture.image()

    def _read(self, position: int) -> Image.Image | None:
        try:
            return self.open(position)
        except (OSError, UnreadableImage):
            self.unusable.add(position)
            return None

    def _failure(self, position: int) -> str:
        try:
            self.open(position)
        except FileNotFoundError:
            return "absent"
        except (OSError, UnreadableImage) as error:
            return str(error) or type(error).__name__
        return "usable by now"


class CocoDataModule(DetectionDataModule):
    """COCO 2017 as published (`train2017/`, `val2017/`, `annotations/`), or any other data in its format.

    The classes are the categories in the order of their ids, whatever gaps these have. Both files must list the same;
    where only one of them is opened, as for an evaluation, its own count.

    Args:
        root: folder that relative paths start from; None where all paths are given in full.
        train_images, val_images: folders of the image files.
        train_annotations, val_annotations: annotation files.
        decoder: "auto" or one of `data.decoding.DECODERS`.
        augment: "ssd", "flip" or "none", see `data.detection_transforms`.
        bad_boxes: "error" or "drop", for boxes with a NaN or a negative size.
        max_corrupt: so many absent, corrupt or misfit images of a part are skipped by each process with a warning; one
            more is an error.
        max_train, max_val: only the first so many images.
        name: of the data in messages.
        options: see `ImageDataModule`.

    Raises:
        FileNotFoundError, ValueError: data or options cannot work; the message says why and what to set.
    """

    in_memory = False

    def __init__(
        self,
        *,
        root: str | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        decoder: str = "auto",
        augment: str = "ssd",
        bad_boxes: str = "error",
        max_corrupt: int = 10,
        max_train: int | None = None,
        max_val: int | None = None,
        image_size: int = 300,
        name: str = "coco",
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        self.name = name
        self.root = None if root is None else Path(root).expanduser()
        self._folders = {True: self._path(train_images), False: self._path(val_images)}
        self._files = {True: self._path(train_annotations), False: self._path(val_annotations)}
        self.decoder = choose_decoder(decoder)
        self.augment = choice("augment (data.augment)", augment, AUGMENTS)
        self.bad_boxes = choice("data.bad_boxes", bad_boxes, BAD_BOXES)
        for what, count in (("max_train", max_train), ("max_val", max_val)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"data.{what} {count!r}: expected a whole number of at least 1, or null for all")
        self.max_corrupt = max_corrupt
        self._limits = {True: max_train, False: max_val}
        self._indices: dict[bool, CocoIndex] = {}
        self._truth: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # the file says it
        return len(self.category_ids)

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._any_index().class_names

    @property
    def category_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._any_index().category_ids

    def load(self, train: bool) -> CocoImages:
        index, folder = self._index(train), self._folders[train]
        if train and not len(index.labels):
            raise ValueError(f"annotation file {index.path} holds no box to train on{_in_brackets(index.notes())}")
        _look_for_images(index, folder, train)
        mean, _ = NORMALIZATIONS[self.normalize.name]
        transform = (
            detection_train_transform(self.image_size, self.augment, mean)
            if train
            else detection_eval_transform(self.image_size)
        )
        options = {"max_corrupt": self.max_corrupt, "seed": self.seed, "decoder": self.decoder}
        return CocoImages(index, folder, transform, train=train, **options)

    def ground_truth(self) -> dict[str, Any]:
        if self._truth is None:
            index = self._index(False)
            self._truth = read_truth(index.path, index.image_ids.tolist())
        return self._truth

    def describe(self) -> str:
        notes = [
            f"{part}: {index.notes()}"
            for part, index in (("training", self._index(True)), ("evaluation", self._index(False)))
            if index.notes()
        ]
        return "; ".join([f"{super().describe()} (decoded by {self.decoder})", *notes])

    def _path(self, path: str) -> Path:
        given = Path(path).expanduser()
        return given if self.root is None else self.root / given

    def _index(self, train: bool) -> CocoIndex:
        if train not in self._indices:
            if self.root is not None and not self.root.is_dir():
                raise FileNotFoundError(
                    f"data folder {self.root} does not exist: set data.root to a folder with train2017/, val2017/ and "
                    f"annotations/, or name other folders and files (configs/data/coco_json.yaml)"
                )
            index = read_index(self._files[train], bad_boxes=self.bad_boxes, limit=self._limits[train])
            for other in self._indices.values():
                _check_same_classes(index, other)
            self._indices[train] = index
        return self._indices[train]

    def _any_index(self) -> CocoIndex:
        """The index of an opened part, else of the evaluation part: it is much the smaller one."""
        return next(iter(self._indices.values()), None) or self._index(False)


def _look_for_images(index: CocoIndex, folder: Path, train: bool) -> None:
    key = "data.train_images" if train else "data.val_images"
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist: set data.root, or {key}")
    names = [index.name(position) for position in range(min(LOOKED_FOR, len(index)))]
    if not any((folder / name).is_file() for name in names):
        with os.scandir(folder) as entries:
            first = next(iter(entries), None)
        there = "it is empty" if first is None else f"it holds {first.name}"
        raise FileNotFoundError(
            f"none of the first {len(names)} images of {index.path} is in {folder}, such as {names[0]} ({there}): "
            f"set {key} to the folder that file names start from"
        )


def _check_same_classes(index: CocoIndex, other: CocoIndex) -> None:
    ours, theirs = (dict(zip(i.category_ids, i.class_names, strict=True)) for i in (index, other))
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
        raise ValueError(
            f"the categories of {index.path} ({len(ours)}) and of {other.path} ({len(theirs)}) differ, such as "
            f"{different}: both files must list the same ids and names"
        )


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
