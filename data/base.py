"""The LightningDataModule that all image classification data sets share."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch import Tensor

from data.sampling import EpochSampler, ImageDataset, ImageLoader, ShareSampler, leave_signals_to_trainer
from data.transforms import Normalize

SMALLEST_IMAGE = 32


class ImageDataModule(pl.LightningDataModule):
    """Loaders, checks and normalisation; subclasses say what the data is by `load` and three attributes.

    Args:
        image_size: side of the square images in pixels, at least 32.
        batch_size_per_device: training batch of one process. The last, smaller batch of an epoch is dropped.
        eval_batch_size_per_device: None means the training batch. Evaluation drops nothing.
        num_workers: loading processes per training process; None means 0 for sets held in memory, else up to 8, as
            the CPUs allow.
        normalize: name of the normalisation, a key of `data.transforms.NORMALIZATIONS`.
        seed: of the order and of all augmentation.

    Attributes:
        num_classes: int.
        class_names: the classes' names in the order of their labels.
        in_memory: whether all images are held in memory, so that loading processes would only cost time.

    Raises:
        ValueError: a size or count cannot work; the message says which and what to set.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    in_memory = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size_per_device: int = 64,
        eval_batch_size_per_device: int | None = None,
        num_workers: int | None = None,
        normalize: str = "imagenet",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = _whole("image size", image_size, 1)
        if image_size < SMALLEST_IMAGE:
            raise ValueError(
                f"image size {image_size}: the backbones divide by 32, so {SMALLEST_IMAGE} pixels is the smallest "
                f"(set data.image_size={SMALLEST_IMAGE} or more)"
            )
        self.batch_size_per_device = _whole("batch_size_per_device", batch_size_per_device, 1)
        evaluated = batch_size_per_device if eval_batch_size_per_device is None else eval_batch_size_per_device
        self.eval_batch_size_per_device = _whole("eval_batch_size_per_device", evaluated, 1)
        self.num_workers = None if num_workers is None else _whole("num_workers", num_workers, 0)
        self.normalize = Normalize(normalize)
        self.seed = seed
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self._next_epoch, self._next_batch = 0, 0

    def load(self, train: bool) -> ImageDataset:
        """The training set (with augmentation) or the evaluation set (without)."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets that a stage needs ("fit", "validate", "test"; None means all), each once."""
        if stage in (None, "fit") and self.train_set is None:
            self.train_set = self.load(train=True)
        if self.val_set is None:
            self.val_set = self.load(train=False)
        if stage == "fit" and self.train_set is not None:
            self._check_batch_size(len(self.train_set))

    def train_dataloader(self) -> ImageLoader:
        self.setup("fit")
        assert self.train_set is not None
        return self.make_loader(self.train_set, train=True)

    def val_dataloader(self) -> ImageLoader:
        self.setup("validate")
        assert self.val_set is not None
        return self.make_loader(self.val_set, train=False)

    def test_dataloader(self) -> ImageLoader:
        """The evaluation set again: none of these data sets publishes labels for a third part."""
        return self.val_dataloader()

    def make_loader(self, dataset: ImageDataset, train: bool) -> ImageLoader:
        """The one place where loaders are made."""
        workers = self._workers()
        rank, world_size = self._process()
        sampler: EpochSampler | ShareSampler
        if train:
            options = {"seed": self.seed, "rank": rank, "world_size": world_size}
            sampler = EpochSampler(len(dataset), blocks=dataset.blocks, **options)
            sampler.resume_at(self._next_epoch, self._next_batch * self.batch_size_per_device)
        else:
            if len(dataset) < world_size:
                raise ValueError(f"{self.name}: {world_size} processes cannot share {len(dataset)} evaluation images")
            sampler = ShareSampler(len(dataset), rank=rank, world_size=world_size)
        return ImageLoader(
            dataset,
            batch_size=self.batch_size_per_device if train else self.eval_batch_size_per_device,
            sampler=sampler,
            drop_last=train,
            collate_fn=dataset.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers > 0 else None,
            worker_init_fn=leave_signals_to_trainer,
            pin_memory=torch.cuda.is_available(),
            # Seeds the workers (python, numpy and torch) without drawing from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def resume_at(self, epoch: int, batch: int) -> None:
        """The training loader made next begins with this batch of this epoch (both from 0)."""
        self._next_epoch, self._next_batch = epoch, batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalises on the device: uint8 or float images on 0..255 -> float, `[N, 3, H, W]`; labels untouched."""
        images, labels = batch
        return self.normalize.to(images.device)(images), labels

    def describe(self) -> str:
        """One line: name, numbers of images and classes, image size, batch size and, if any, the folder."""
        self.setup()
        assert self.train_set is not None and self.val_set is not None
        root = getattr(self, "root", None)
        return (
            f"{self.name}: {len(self.train_set)} training and {len(self.val_set)} evaluation images, "
            f"{self.num_classes} classes, {self.image_size} x {self.image_size} pixels, "
            f"batch {self.batch_size_per_device} per device" + (f", in {root}" if root else "")
        )

    def _check_batch_size(self, num_train: int) -> None:
        _, world_size = self._process()
        if self.batch_size_per_device * world_size > num_train:
            processes = f" x {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"batch size {self.batch_size_per_device}{processes} is larger than the {num_train} training images "
                f"of {self.name}: set data.batch_size_per_device={max(num_train // world_size, 1)} or less"
            )

    def _process(self) -> tuple[int, int]:
        """(rank, number of processes), from the trainer if there is one."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.in_memory:
            return 0
        return max(1, min(8, self._cpus()))

    def _cpus(self) -> int:
        """CPU cores for this training process and its loading processes."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.trainer is None:
            return cpus
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        task = os.environ.get("SLURM_CPUS_PER_TASK")
        if task and isinstance(environment, SLURMEnvironment):  # each process is a task, which has its CPUs to itself
            return min(cpus, int(task))
        return cpus // self.trainer.num_devices


def _whole(what: str, value: int, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{what} {value!r}: expected a whole number of at least {smallest}")
    return value
