"""CIFAR-10, CIFAR-100 and Fashion-MNIST as torchvision stores them, held in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import datasets

from data.base import ImageDataModule
from data.in_memory import RandomCropFlip, TensorImages
from data.transforms import choice, switch


class Source(NamedTuple):
    """A torchvision data set, the folder below `root` that it reads, and its number of classes."""

    dataset: type[datasets.VisionDataset]
    folder: str
    num_classes: int


SOURCES = {
    "cifar10": Source(datasets.CIFAR10, "cifar-10-batches-py", 10),
    "cifar100": Source(datasets.CIFAR100, "cifar-100-python", 100),
    "fashion_mnist": Source(datasets.FashionMNIST, "FashionMNIST/raw", 10),
}


class TorchvisionDataModule(ImageDataModule):
    """CIFAR-10, CIFAR-100 or Fashion-MNIST, with the CIFAR augmentation (padded crop, left-right flip).

    Args:
        root: the folder that holds torchvision's folder of the data set.
        dataset: "cifar10", "cifar100" or "fashion_mnist".
        download: whether to download what is missing; never done unasked.
        augment: False trains on the images as they are.
        options: see `ImageDataModule`.

    Raises:
        FileNotFoundError: (on `prepare_data` or `setup`) the files are not there.
        ConnectionError: (on `prepare_data`) a download was asked for and failed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        dataset: str = "cifar10",
        download: bool = False,
        augment: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = choice("data set", dataset, SOURCES)
        self.root = Path(root).expanduser()
        self.num_classes = SOURCES[dataset].num_classes
        self.download = download
        self.augment = switch("augment (data.augment)", augment)
        self._is_prepared = False
        self._parts: dict[bool, Any] = {}
        self._class_names: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # CIFAR-100 keeps them in its files
        if not self._class_names:
            self._opened(train=False)
        return self._class_names

    def prepare_data(self) -> None:
        """Downloads if asked (on one process per machine); otherwise finds out early whether the files are there.

        Opening means checksums and unpickling of all images, so what is opened here is kept for `load`.
        """
        if not self._is_prepared:
            for train in (True, False):
                self._opened(train, self.download)
            self._is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self._parts.clear()  # what the stage needs is loaded; of CIFAR that was a copy

    def load(self, train: bool) -> TensorImages:
        source = self._opened(train)
        augment = RandomCropFlip() if train and self.augment else None
        return TensorImages(_images(source.data), torch.as_tensor(source.targets), self.image_size, augment, self.seed)

    def _opened(self, train: bool, download: bool = False) -> Any:
        if train not in self._parts:
            self._parts[train] = self._open(train, download)
            self._class_names = tuple(self._parts[train].classes)
        return self._parts[train]

    def _open(self, train: bool, download: bool) -> Any:
        dataset, folder, _ = SOURCES[self.name]
        where = self.root / folder
        try:
            return dataset(str(self.root), train=train, download=download)
        except Exception as error:  # torchvision raises whatever its download, unpacking and unpickling raise
            # On one line, and without the advice that is torchvision's spelling of ours.
            reason = " ".join(str(error).split()).rstrip(".").removesuffix(" You can use download=True to download it")
            if download:
                raise ConnectionError(
                    f"{self.name} could not be downloaded to {where}: {reason}. Check the network, or put the files "
                    f"there by hand and set data.download=false"
                ) from error
            raise FileNotFoundError(
                f"{self.name} was not found, or is incomplete: expected torchvision's files in {where} ({reason}). "
                f"Set data.root to the folder that holds {Path(folder).parts[0]}/, or data.download=true to download it"
            ) from error


def _images(stored: Any) -> Tensor:
    """uint8 `[M, C, H, W]` from `[M, H, W, 3]` (CIFAR, numpy) or `[M, H, W]` (Fashion-MNIST, torch)."""
    images = torch.as_tensor(stored)
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
