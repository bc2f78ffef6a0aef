"""Images in one folder per class: finding them, and reading them even if some are corrupt."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.sampling import Batch, ImageDataset, Key, example_rng, split_key
from data.transforms import PilTransform

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What Pillow raises for broken files; SyntaxError comes from its PNG reader.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
NAMED_FILES = 10


class Example(NamedTuple):
    """A file and its label."""

    path: str
    label: int


def find_classes(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted, hidden ones left out.

    Raises:
        FileNotFoundError: `folder` does not exist or holds no folder; the message says what is there instead.
    """
    if not folder.is_dir():
        around = folder.parent
        if not around.is_dir():
            raise FileNotFoundError(
                f"image folder {around} does not exist: set data.root to a folder with train/ and val/, each with one "
                f"folder per class"
            )
        raise FileNotFoundError(
            f"{folder} does not exist: {around} must hold train/ and val/; it holds {_content(around)}"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileNotFoundError(
            f"{folder} holds no class folders: expected one folder per class, such as {folder / 'cat'}/0001.jpg; "
            f"it holds {_content(folder)}"
        )
    return classes


def find_images(folder: Path, classes: Iterable[str], label_of: dict[str, int], limit: int | None) -> list[Example]:
    """All images below the class folders of `folder`, in sorted order; at most `limit` of each class.

    Raises:
        FileNotFoundError: there is no image at all, or none in some class; the message names the folders.
    """
    examples: list[Example] = []
    empty: list[str] = []
    for name in classes:
        files = sorted(
            os.path.join(parent, file)
            for parent, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS)
        )
        examples += [Example(path, label_of[name]) for path in files[:limit]]
        if not files:
            empty.append(name)
    kinds = " ".join(EXTENSIONS)
    if not examples:
        raise FileNotFoundError(f"no images in {folder}: expected files ending in {kinds} in its class folders")
    if empty:
        raise FileNotFoundError(
            f"{len(empty)} empty class folder(s) in {folder}: {_some(empty)}; expected files ending in {kinds} in each "
            f"(remove the folder, in train/ and val/, if the class is not wanted)"
        )
    return examples


class FolderImages(ImageDataset):
    """Decodes and transforms image files; corrupt ones are skipped, up to a limit.

    An unreadable file is replaced in training by the next readable one of the list, which almost always is of the same
    class, and is left out in evaluation. Which files were unreadable is recorded in memory shared with the workers, so
    a file counts once for all workers and epochs of this process. `check` warns of new ones.

    Args:
        examples: the files and labels.
        folder: named in messages.
        transform: PIL RGB image -> uint8 `[3, S, S]`; may draw from torch's default generator, which is seeded for
            every (seed, epoch, example) before.
        train: whether to replace unreadable images.
        max_corrupt: number of unreadable images that is tolerated.
        seed: of the augmentation.
    """

    def __init__(
        self,
        examples: list[Example],
        folder: Path,
        transform: PilTransform,
        *,
        train: bool,
        max_corrupt: int = 10,
        seed: int = 0,
    ) -> None:
        self.examples = examples
        self.folder = folder
        self.transform = transform
        self.train = train
        self.max_corrupt = max_corrupt
        self.seed = seed
        self.corrupt = torch.zeros(len(examples), dtype=torch.bool).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | None:
        """(image uint8 `[3, S, S]`, label), or None where there is nothing to return."""
        epoch, index = split_key(key)
        # One try more than tolerated is enough: then `check` stops the run anyway.
        tries = min(self.max_corrupt + 2, len(self)) if self.train else 1
        for candidate in range(index, index + tries):
            position = candidate % len(self)
            image = self._read(position)
            if image is not None:
                with example_rng(self.seed, epoch, index):
                    return self.transform(image), self.examples[position].label
        return None

    def collate(self, examples: list[tuple[Tensor, int] | None]) -> Batch | None:
        present = [example for example in examples if example is not None]
        if not present:
            return None
        images, labels = zip(*present, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def check(self) -> None:
        """Warns of unreadable files met since the last call.

        Raises:
            RuntimeError: there are more of them than `max_corrupt`, or nothing else is left.
        """
        count = int(torch.count_nonzero(self.corrupt))
        if count == self._reported:
            return
        self._reported = count
        paths = [self.examples[position].path for position in torch.nonzero(self.corrupt).flatten().tolist()]
        # Read again for the reason, which the workers cannot hand over.
        files = _some([f"{path} ({_failure(path)})" for path in paths])
        found = f"{count} unreadable image(s) of {len(self)} in {self.folder}"
        if count > self.max_corrupt or count == len(self):
            raise RuntimeError(f"{found}, tolerated are {self.max_corrupt} (data.max_corrupt): {files}")
        how = "replaced by the next readable one" if self.train else "left out of the evaluation"
        warnings.warn(f"{found}, {how} (limit {self.max_corrupt}): {files}", stacklevel=3)

    def _read(self, position: int) -> Image.Image | None:
        if self.corrupt[position]:
            return None
        try:
            return read_image(self.examples[position].path)
        except UNREADABLE:
            self.corrupt[position] = True
            return None


def read_image(path: str) -> Image.Image:
    """The image in RGB, fully decoded."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _failure(path: str) -> str:
    try:
        read_image(path)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return "readable by now"


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED_FILES
    return ", ".join(names[:NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _content(folder: Path) -> str:
    """What a folder holds, in a few words."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    return _some(names) if names else "nothing"
