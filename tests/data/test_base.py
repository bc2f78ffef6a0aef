import os
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from data.digits import DigitsDataModule
from data.imagenet import ImageFolderDataModule
from data.synthetic import SyntheticDataModule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, r"image size 8: the backbones divide by 32, .* data.image_size=32 or more"),
        ({"image_size": 0}, r"image size 0: expected a whole number of at least 1"),
        ({"image_size": -32}, r"image size -32: expected"),
        ({"image_size": 32.5}, r"image size 32.5: expected a whole number"),
        ({"batch_size_per_device": 0}, r"batch_size_per_device 0: expected a whole number of at least 1"),
        ({"batch_size_per_device": True}, r"batch_size_per_device True"),
        ({"eval_batch_size_per_device": -1}, r"eval_batch_size_per_device -1"),
        ({"num_workers": -1}, r"num_workers -1: expected a whole number of at least 0"),
        ({"normalize": "none"}, r"unknown normalisation 'none'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**options)


def test_batch_larger_than_the_training_set_names_both_numbers():
    module = DigitsDataModule(batch_size_per_device=2000)
    with pytest.raises(
        ValueError, match=r"batch size 2000 is larger than the 1438 training images of digits: set .*=1438"
    ):
        module.setup("fit")
    module.setup("test")  # evaluation may use any batch


def test_batch_of_all_processes_counts():
    module = DigitsDataModule(batch_size_per_device=800)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2, num_devices=2)
    with pytest.raises(ValueError, match=r"batch size 800 x 2 processes is larger than the 1438 .*=719 or less"):
        module.setup("fit")


def test_processes_share_the_training_set():
    parts = []
    for rank in range(2):
        module = DigitsDataModule(batch_size_per_device=10)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2, num_devices=2)
        parts.append({index for _, index in module.train_dataloader().sampler})
    assert len(parts[0]) == len(parts[1]) == 719
    assert not parts[0] & parts[1]


def test_workers_fit_the_data_and_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert DigitsDataModule().val_dataloader().num_workers == 0
    assert DigitsDataModule(num_workers=2).make_loader(DigitsDataModule().load(True), train=True).persistent_workers
    folder = ImageFolderDataModule(tmp_path)
    assert folder._workers() == 8
    folder.trainer = SimpleNamespace(global_rank=0, world_size=4, num_devices=4, strategy=None)
    assert folder._workers() == 3
    assert ImageFolderDataModule(tmp_path, num_workers=0)._workers() == 0


@pytest.mark.parametrize(
    ("by_srun", "seen", "per_task", "workers"),
    [
        (True, 6, "6", 6),  # bound to its task's CPUs
        (True, 24, "6", 6),  # not bound, as some clusters have it
        (True, 1, "6", 1),  # srun without --cpus-per-task
        (True, 24, None, 6),
        (False, 6, "6", 1),  # one task, in which Lightning starts all processes
    ],
)
def test_a_task_of_slurm_has_its_cpus_to_itself(by_srun, seen, per_task, workers, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(seen)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if per_task:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_task)
    folder = ImageFolderDataModule(tmp_path)
    strategy = SimpleNamespace(cluster_environment=SLURMEnvironment() if by_srun else None)
    folder.trainer = SimpleNamespace(global_rank=0, world_size=4, num_devices=4, strategy=strategy)
    assert folder._workers() == workers


def test_memory_is_pinned_only_with_a_gpu():
    assert DigitsDataModule().train_dataloader().pin_memory == torch.cuda.is_available()


def test_evaluation_batch_can_differ_from_the_training_batch():
    module = DigitsDataModule(batch_size_per_device=8, eval_batch_size_per_device=359)
    assert [len(labels) for _, labels in module.test_dataloader()] == [359]
    assert len(next(iter(module.train_dataloader()))[1]) == 8


def test_description_is_one_line():
    assert DigitsDataModule().describe() == (
        "digits: 1438 training and 359 evaluation images, 10 classes, 32 x 32 pixels, batch 64 per device"
    )


def test_synthetic_repeats_one_batch():
    module = SyntheticDataModule(num_classes=7, num_batches=3, image_size=40, batch_size_per_device=5)
    batches = list(module.train_dataloader())
    assert len(batches) == 3
    assert all(torch.equal(batches[0][0], images) for images, _ in batches)
    images, labels = batches[0]
    assert images.shape == (5, 3, 40, 40)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert 0 <= int(labels.min()) <= int(labels.max()) < 7
    assert module.num_classes == len(module.class_names) == 7
    assert torch.equal(next(iter(module.val_dataloader()))[0], images)


def test_synthetic_has_as_many_batches_on_every_process():
    module = SyntheticDataModule(num_batches=3, image_size=32, batch_size_per_device=5)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2, num_devices=2)
    assert len(module.train_dataloader()) == len(module.val_dataloader()) == 3


def test_synthetic_has_them_also_where_it_was_loaded_before_there_was_a_trainer():
    """As train.py does on the first process."""
    module = SyntheticDataModule(num_batches=3, image_size=32, batch_size_per_device=5)
    module.setup("fit")
    module.trainer = SimpleNamespace(global_rank=0, world_size=2, num_devices=2)
    assert len(module.train_dataloader()) == 3


def test_synthetic_needs_classes_and_batches():
    with pytest.raises(ValueError, match="0 classes and 100 batches"):
        SyntheticDataModule(num_classes=0)
