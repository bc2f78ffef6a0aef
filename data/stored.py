"""Images that are stored encoded, in files or in tar shards, and read even if some are corrupt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data.decoding import Picture, UnreadableImage, choose_decoder
from data.sampling import Batch, ImageDataset, Key, example_rng, split_key
from data.transforms import ImageTransform
from data.unusable import Unusable


class Source(Protocol):
    """Where encoded images and their labels come from.

    Attributes:
        folder: named in messages.
        blocks: lengths of the files that hold the images, one after the other; None where each has its own.
    """

    folder: Path
    blocks: Sequence[int] | None

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """The encoded image. An OSError means that this one is unreadable."""

    def label(self, position: int) -> int: ...

    def name(self, position: int) -> str:
        """Path, or archive and member, for messages."""


class StoredImages(ImageDataset):
    """Decodes and transforms images; corrupt ones are skipped, up to a limit.

    An unreadable image is replaced in training by the next readable one of the source (in folders almost always of the
    same class), and is left out in evaluation. Each counts once for all workers and epochs of this process; `check`
    warns of new ones.

    Args:
        source: the images and labels.
        transform: picture -> uint8 `[3, S, S]`; may draw from torch's default generator, which is seeded for every
            (seed, epoch, example) before.
        train: whether to replace unreadable images.
        max_corrupt: number of unreadable images that each training process tolerates.
        seed: of the augmentation.
        decoder: see `data.decoding.choose_decoder`.
    """

    def __init__(
        self,
        source: Source,
        transform: ImageTransform,
        *,
        train: bool,
        max_corrupt: int = 10,
        seed: int = 0,
        decoder: str = "auto",
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.decoder = choose_decoder(decoder)
        self.blocks = source.blocks
        self.unusable = Unusable(len(source), train=train, limit=max_corrupt)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | None:
        """(image uint8 `[3, S, S]`, label), or None where there is nothing to return."""
        epoch, index = split_key(key)
        for position in self.unusable.candidates(index):
            try:
                picture = self._open(position)
                with example_rng(self.seed, epoch, index):
                    return self.transform(picture), self.source.label(position)
            except UnreadableImage:
                self.unusable.add(position)
        return None

    def collate(self, examples: list[tuple[Tensor, int] | None]) -> Batch | None:
        present = [example for example in examples if example is not None]
        if not present:
            return None
        images, labels = zip(*present, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def check(self) -> None:
        """Warns of unusable images met since the last call.

        Raises:
            RuntimeError: there are more of them than `max_corrupt`, or nothing else is left.
        """
        self.unusable.check(self.source.folder, lambda i: f"{self.source.name(i)} ({self._failure(i)})")

    def _open(self, position: int) -> Picture:
        try:
            return Picture(self.source.read(position), self.decoder)
        except OSError as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error

    def _failure(self, position: int) -> str:
        try:
            self._open(position).pixels()
        except UnreadableImage as error:
            return str(error)
        return "usable by now"
