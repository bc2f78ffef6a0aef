"""Images in one folder per class."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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
            f"{folder} does not exist: {around} must hold train/ and val/; it holds {content(around)}"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileNotFoundError(
            f"{folder} holds no class folders: expected one folder per class, such as {folder / 'cat'}/0001.jpg; "
            f"it holds {content(folder)}"
        )
    return classes


def find_images(folder: Path, classes: Iterable[str], label_of: dict[str, int]) -> list[Example]:
    """All images below the class folders of `folder`, in sorted order.

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
        examples += [Example(path, label_of[name]) for path in files]
        if not files:
            empty.append(name)
    kinds = " ".join(EXTENSIONS)
    if not examples:
        raise FileNotFoundError(f"no images in {folder}: expected files ending in {kinds} in its class folders")
    if empty:
        raise FileNotFoundError(
            f"{len(empty)} empty class folder(s) in {folder}: {some(empty)}; expected files ending in {kinds} in each "
            f"(remove the folder, in train/ and val/, if the class is not wanted)"
        )
    return examples


class FolderSource:
    """Image files and their labels, as a source of `data.stored.StoredImages`."""

    blocks = None

    def __init__(self, examples: list[Example], folder: Path) -> None:
        self.folder = folder
        self.labels = np.array([example.label for example in examples], dtype=np.int64)
        # Not a list: reading its objects counts references, which copies their memory into every loading process.
        paths = [os.fsencode(example.path) for example in examples]
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        self._paths = np.frombuffer(b"".join(paths), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, position: int) -> bytes:
        with open(self.name(position), "rb") as file:
            return file.read()

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def name(self, position: int) -> str:
        start = int(self._ends[position - 1]) if position else 0
        return os.fsdecode(self._paths[start : int(self._ends[position])].tobytes())


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - NAMED_FILES
    return ", ".join(names[:NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")


def content(folder: Path) -> str:
    """What a folder holds, in a few words."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    return some(names) if names else "nothing"
