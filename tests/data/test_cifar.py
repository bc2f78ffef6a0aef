import gzip
import hashlib
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from data.cifar import TorchvisionDataModule
from data.digits import DigitsDataModule


@pytest.fixture
def fashion_root(tmp_path):
    """Fashion-MNIST's four files with 30 and 20 random images; torchvision does not check their sums."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        # The packed files are looked for only after a download.
        with gzip.open(raw / f"{part}-labels-idx1-ubyte.gz", "wb") as packed:
            packed.write(b"")
    return tmp_path


def cifar_files(root, monkeypatch, dataset, folder, names, label_key, classes):
    """Files in CIFAR's format, their sums entered where torchvision looks for the true ones."""
    (root / folder).mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (root / folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    lists = {}
    for part, files in names.items():
        lists[part] = []
        for name in files:
            pixels = rng.integers(256, size=(20, 3072), dtype=np.uint8)
            lists[part].append(write(name, {"data": pixels, label_key: [n % len(classes) for n in range(20)]}))
    meta_name, meta_key = dataset.meta["filename"], dataset.meta["key"]
    meta_sum = write(meta_name, {meta_key: classes})[1]
    monkeypatch.setattr(dataset, "train_list", lists["train"])
    monkeypatch.setattr(dataset, "test_list", lists["test"])
    monkeypatch.setattr(dataset, "meta", {"filename": meta_name, "key": meta_key, "md5": meta_sum})


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    names = {"train": ["data_batch_1", "data_batch_2"], "test": ["test_batch"]}
    classes = [f"class {n}" for n in range(10)]
    cifar_files(tmp_path, monkeypatch, datasets.CIFAR10, "cifar-10-batches-py", names, "labels", classes)
    module = TorchvisionDataModule(tmp_path, dataset="cifar10", batch_size_per_device=16)
    module.prepare_data()
    assert module.num_classes == 10
    assert module.class_names == tuple(classes)
    assert module.describe() == (
        f"cifar10: 40 training and 20 evaluation images, 10 classes, 32 x 32 pixels, batch 16 per device, in {tmp_path}"
    )
    images, labels = next(iter(module.val_dataloader()))
    stored = datasets.CIFAR10(tmp_path, train=False)
    expected = torch.from_numpy(stored.data[:16]).permute(0, 3, 1, 2)
    assert torch.equal(images, expected)
    assert labels.tolist() == stored.targets[:16]


def test_cifar100_from_its_files(tmp_path, monkeypatch):
    names = {"train": ["train"], "test": ["test"]}
    classes = [f"fine {n}" for n in range(100)]
    cifar_files(tmp_path, monkeypatch, datasets.CIFAR100, "cifar-100-python", names, "fine_labels", classes)
    module = TorchvisionDataModule(str(tmp_path), dataset="cifar100", image_size=64, batch_size_per_device=8)
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (8, 3, 64, 64)
    assert labels.dtype == torch.int64
    assert module.num_classes == len(module.class_names) == 100


def test_fashion_mnist_from_its_files(fashion_root):
    module = TorchvisionDataModule(fashion_root, dataset="fashion_mnist", batch_size_per_device=10)
    module.prepare_data()
    images, _ = next(iter(module.train_dataloader()))
    assert images.shape == (10, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert sum(len(labels) for _, labels in module.val_dataloader()) == 20
    assert "Sneaker" in module.class_names


def test_each_part_is_opened_once(fashion_root, monkeypatch):
    """Of CIFAR that is a checksum and an unpickling of 170 MB, and Lightning asks for the data at every stage."""
    opened = []
    start = datasets.FashionMNIST.__init__

    def counted(self, *args, **options):
        opened.append(options["train"])
        start(self, *args, **options)

    monkeypatch.setattr(datasets.FashionMNIST, "__init__", counted)
    module = TorchvisionDataModule(fashion_root, dataset="fashion_mnist", batch_size_per_device=10)
    for stage in ("fit", "fit", "test"):
        module.prepare_data()
        module.setup(stage)
        assert "Sneaker" in module.class_names
    assert sorted(opened) == [False, True] and not module._parts
    other = TorchvisionDataModule(fashion_root, dataset="fashion_mnist", batch_size_per_device=10)
    assert "Sneaker" in other.class_names  # of a process that prepares nothing
    other.setup("test")
    assert opened[2:] == [False] and not other._parts


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_missing_files_are_named_and_nothing_is_downloaded(tmp_path, monkeypatch, dataset, folder):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was used unasked"))
    root = tmp_path / "nowhere"
    module = TorchvisionDataModule(root, dataset=dataset)
    expected = (
        rf"{dataset} was not found.*expected torchvision's files in {root / folder} .*data.root.*data.download=true"
    )
    for use in (module.prepare_data, lambda: module.setup("fit"), lambda: module.setup("test")):
        with pytest.raises(FileNotFoundError, match=expected):
            use()
    assert not root.exists()


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist"])
def test_unreachable_download_says_what_to_do(tmp_path, monkeypatch, dataset):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    module = TorchvisionDataModule(tmp_path, dataset=dataset, download=True)
    with pytest.raises(ConnectionError, match=rf"{dataset} could not be downloaded to {tmp_path}.*data.download=false"):
        module.prepare_data()


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'; choose one of cifar10, cifar100, fashion_mnist"):
        TorchvisionDataModule("x", dataset="cifar")


def test_an_augmentation_of_other_data_is_refused():
    """experiment=imagenet/modern_... with data=cifar10 sets randaugment, which is true in Python."""
    for make in (lambda augment: TorchvisionDataModule("x", augment=augment), lambda a: DigitsDataModule(augment=a)):
        with pytest.raises(ValueError, match=r"\(data.augment\) is 'randaugment'.*choose true or false"):
            make("randaugment")
        make(False)
