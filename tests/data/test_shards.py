"""Tar shards: made from folders, read in any order, by us and by the webdataset package; mistakes are named."""

import io
import json
import pickle
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_shards as command
from data.imagenet import ImageFolderDataModule
from data.make_shards import make_shards
from data.shards import OPEN_FILES, ShardSource, open_index, scan_shard

CLASSES = ("ant", "bee")


def jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    pixels = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """2 classes with 9 training and 3 evaluation images; a name with dots in it."""
    for part, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "folders" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"x.{number}.JPEG").write_bytes(jpeg(100 * label + number + (50 if part == "val" else 0)))
    return tmp_path / "folders"


@pytest.fixture
def shards(folders: Path, tmp_path: Path) -> Path:
    make_shards(folders, tmp_path / "shards", images_per_shard=4, workers=1)
    return tmp_path / "shards"


def module(root: Path, **options) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, **{"image_size": 32, "batch_size_per_device": 3, "num_workers": 0} | options)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_shards_hold_the_files_and_labels_of_the_folders(folders, shards):
    for part in ("train", "val"):
        stored = {}
        for path in sorted((shards / part).glob("*.tar")):
            with tarfile.open(path) as archive:
                files = {member.name: archive.extractfile(member).read() for member in archive}
            for name, data in files.items():
                if name.endswith(".jpeg"):
                    stored[data] = int(files[name.removesuffix(".jpeg") + ".cls"])
        expected = {
            file.read_bytes(): label for label, name in enumerate(CLASSES) for file in (folders / part / name).iterdir()
        }
        assert stored == expected


def test_training_shards_mix_the_classes_and_are_the_same_bytes_again(folders, shards, tmp_path):
    make_shards(folders, tmp_path / "again", images_per_shard=4, workers=1)
    for path in shards.glob("*/*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(shards)).read_bytes()
    labels = [member.label for path in sorted((shards / "train").glob("*.tar")) for member in scan_shard(path)]
    assert labels != sorted(labels) and sorted(labels) == [0] * 9 + [1] * 9
    make_shards(folders, tmp_path / "other", images_per_shard=4, workers=1, seed=1)
    first = "train/000000.tar"
    assert (shards / first).read_bytes() != (tmp_path / "other" / first).read_bytes()


def test_webdataset_reads_our_shards(folders, shards):
    webdataset = pytest.importorskip("webdataset")
    files = [str(path) for path in sorted((shards / "val").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = webdataset.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("jpeg", "cls")
        found = [(image.size, label) for image, label in dataset]
    assert found == [((40, 36), label) for label in (0, 0, 0, 1, 1, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_train_and_evaluate_like_folders(folders, shards, workers):
    """The evaluation is the same; an epoch of training holds the same images, in the same order for any workers."""
    with_folders, with_shards = module(folders), module(shards, num_workers=workers)
    with_folders.setup()
    with_shards.setup()
    assert with_shards.class_names == CLASSES
    for ours, theirs in zip(with_shards.val_dataloader(), with_folders.val_dataloader(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    labels = [label for _, batch in with_shards.train_dataloader() for label in batch.tolist()]
    assert sorted(labels) == [0] * 9 + [1] * 9
    if workers:
        alone = module(shards).train_dataloader()
        for ours, theirs in zip(with_shards.train_dataloader(), alone, strict=True):
            assert torch.equal(ours[0], theirs[0])


def test_shards_are_found_by_themselves_and_described(folders, shards):
    assert "(shards, decoded by " in module(shards).describe()
    assert "(folders, decoded by " in module(folders).describe()
    with pytest.raises(FileNotFoundError, match=r"no tar shards for train in .*folders: expected train/\*.tar"):
        module(folders, format="shards").setup()
    with pytest.raises(ValueError, match="unknown data format 'tar'; choose one of auto, folders, shards"):
        module(folders, format="tar")


def test_shards_of_others_in_one_folder(tmp_path):
    """As published sets are: all in one folder, other members beside, no names of classes, any path in the tar."""
    for part, count in (("train", 5), ("validation", 2)):
        members = {}
        for number in range(count):
            members |= {
                f"./{part}/{number:03d}.cls": str(number % 3).encode(),
                f"./{part}/{number:03d}.JPG": jpeg(number),
                f"./{part}/{number:03d}.json": b"{}",
            }
        write_tar(tmp_path / f"set-{part}-0000.tar", members)
    data = module(tmp_path, batch_size_per_device=5)
    data.setup()
    assert data.class_names == ("0", "1", "2")
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [[0, 1]]
    assert sorted(label for _, batch in data.train_dataloader() for label in batch.tolist()) == [0, 0, 1, 1, 2]
    assert {path.name for path in tmp_path.glob("*.npz")} == {"train.index.npz", "val.index.npz"}
    assert module(tmp_path, num_classes=10).class_names[-1] == "9"
    with pytest.raises(ValueError, match=r"holds 3 class names, expected 2 \(data.num_classes\)"):
        module(tmp_path, num_classes=2).setup()


def test_the_index_is_made_once_and_then_trusted(shards, monkeypatch):
    (shards / "train" / "index.npz").unlink()
    made = open_index(shards, "train")
    assert made.counts.tolist() == [4, 4, 4, 4, 2] and (shards / "train" / "index.npz").exists()
    monkeypatch.setattr("data.shards.scan_shard", lambda path: pytest.fail("scanned again"))
    read = open_index(shards, "train")
    for ours, theirs in zip(made[1:], read[1:], strict=True):
        assert np.array_equal(ours, theirs)


def test_an_index_that_cannot_be_written_is_no_obstacle(shards, monkeypatch):
    (shards / "val" / "index.npz").unlink()

    def refuse(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.shards.ShardIndex.save", refuse)
    with pytest.warns(UserWarning, match=r"index.npz cannot be written \(Permission denied\): every start reads"):
        assert len(open_index(shards, "val").labels) == 6


def lose_a_shard(root):
    (root / "train" / "000001.tar").unlink()


def truncate_a_shard(root):
    path = root / "train" / "000002.tar"
    path.write_bytes(path.read_bytes()[:3000])


def truncate_without_index(root):
    path = root / "train" / "000002.tar"
    path.write_bytes(path.read_bytes()[:1000])
    (root / "train" / "index.npz").unlink()


def lose_a_header(root):
    path, data = root / "train" / "000002.tar", bytearray((root / "train" / "000002.tar").read_bytes())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    data[third + 150] ^= 1  # of the header's checksum
    path.write_bytes(data)
    (root / "train" / "index.npz").unlink()


def truncate_between_members(root):
    path = root / "train" / "000002.tar"
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])
    (root / "train" / "index.npz").unlink()


def hard_link(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"1"})
    with tarfile.open(root / "train" / "0.tar", "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)


def lose_without_index(root):
    lose_a_shard(root)
    (root / "train" / "index.npz").unlink()


def add_a_shard(root):
    shutil.copy(root / "train" / "000001.tar", root / "train" / "000009.tar")


def break_the_index(root):
    (root / "train" / "index.npz").write_bytes(b"PK\x03\x04 nonsense")


def no_label(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "b.cls": b"1"})


def odd_label(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"cat"})


def two_images(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.jpg": jpeg(0), "a.png": jpeg(1), "a.cls": b"1"})


def no_images(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.txt": b"hello"})


def no_tar(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "0.tar").write_bytes(b"not a tar" * 200)


def high_label(root):
    shutil.rmtree(root / "train")
    write_tar(root / "train" / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"7"})


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        (lose_a_shard, FileNotFoundError, r"1 of 5 shards are missing in .*train: 000001.tar; copy the shards"),
        (truncate_a_shard, ValueError, r"1 shard\(s\) in .* truncated or changed: 000002.tar \(3,000 bytes, not"),
        (truncate_without_index, ValueError, r"000002.tar is not a whole tar file \(unexpected end of data\): .*trunc"),
        (lose_a_header, ValueError, r"000002.tar is not a whole tar file \(the header at byte \d+ is damaged\)"),
        (truncate_between_members, ValueError, r"000002.tar is not a whole tar file \(it has no end mark\)"),
        (hard_link, ValueError, r"0.tar: b.jpg is a hard link; .*--hard-dereference"),
        (lose_without_index, ValueError, r"holds 14 of the 18 images that data.make_shards was to put there: run it"),
        (add_a_shard, ValueError, r"index.npz does not know 1 of the shards beside it: 000009.tar; .*delete"),
        (break_the_index, ValueError, r"index.npz is not an index of shards, or a broken one: delete it"),
        (no_label, ValueError, r"0.tar holds 1 image\(s\) without a label: a.jpg; .*\.cls and holds the number"),
        (odd_label, ValueError, r"0.tar: a.cls holds b'cat', expected the number of a class"),
        (two_images, ValueError, r"0.tar holds two images with the key of a.png"),
        (no_images, FileNotFoundError, r"the 1 tar file\(s\) for train in .*train hold no images"),
        (no_tar, ValueError, r"0.tar is not a whole tar file"),
        (high_label, ValueError, r"the train shards in .* have labels up to 7, but there are 2 classes"),
    ],
)  # fmt: skip
def test_broken_shards_are_named(shards, breakage, error, message):
    breakage(shards)
    with pytest.raises(error, match=message):
        module(shards).setup("fit")


def test_labels_without_an_image_are_warned_of(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"1", "b.avif": b"x", "b.cls": b"0"})
    with pytest.warns(UserWarning, match=r"0.tar: 1 label\(s\) without an image .*: /b"):
        assert len(scan_shard(tmp_path / "0.tar")) == 1


def test_one_name_cannot_be_of_both_parts(tmp_path):
    write_tar(tmp_path / "pets-trainval-000.tar", {"a.jpg": jpeg(0), "a.cls": b"1"})
    with pytest.raises(ValueError, match=r"pets-trainval-000.tar would be both train and val"):
        module(tmp_path).setup("fit")


def test_archives_beside_unpacked_folders_are_left_alone(folders):
    for name in ("ILSVRC2012_img_train.tar", "train/ant.tar"):
        write_tar(folders / name, {"n01440764.tar": b"x"})
    assert "(folders" in module(folders).describe()


def test_compressed_shards_are_refused_with_advice(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"0.tar.gz is compressed: unpack it with gunzip first"):
        module(tmp_path, format="shards").setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_members_are_tolerated_and_named(shards, workers):
    first = scan_shard(shards / "val" / "000000.tar")[1]
    with (shards / "val" / "000000.tar").open("r+b") as file:
        file.seek(first.offset)
        file.write(b"\0" * first.length)
    with pytest.warns(UserWarning, match="unusable") as caught:
        labels = [
            label for _, batch in module(shards, num_workers=workers).val_dataloader() for label in batch.tolist()
        ]
    assert labels == [0, 0, 1, 1, 1]
    text = str(caught[-1].message)
    assert "1 unusable image(s) of 6 in" in text
    assert re.search(r"val/000000.tar:00000001-x_1.jpeg \(UnidentifiedImageError", text)


def test_a_shard_that_shrinks_while_it_is_read_is_an_unreadable_image(shards):
    source = ShardSource(open_index(shards, "val"), shards / "val")
    (shards / "val" / "000000.tar").write_bytes(b"")
    with pytest.raises(OSError, match="the shard ends within this image"):
        source.read(0)


def test_many_shards_do_not_exhaust_the_descriptors(tmp_path):
    for number in range(OPEN_FILES + 5):
        write_tar(tmp_path / "train" / f"{number:03d}.tar", {"a.jpg": jpeg(number), "a.cls": b"0"})
    source = ShardSource(open_index(tmp_path, "train"), tmp_path / "train")
    assert [source.read(position) for position in range(len(source))] == [jpeg(n) for n in range(OPEN_FILES + 5)]
    assert source.read(0) == jpeg(0) and len(source._files) == OPEN_FILES
    copy = pickle.loads(pickle.dumps(source))  # what a spawned worker gets
    assert copy.read(3) == jpeg(3) and len(copy._files) == 1


def test_fewer_images_of_each_class(shards):
    data = module(shards, max_train_per_class=3)
    data.setup("fit")
    assert sorted(data.train_set.source.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert sum(data.train_set.blocks) == 6


def test_held_out_images_of_shards(shards):
    shutil.rmtree(shards / "val")
    data = module(shards, holdout=4)
    data.setup()
    parts = data.train_set.source, data.val_set.source
    assert [np.bincount(part.labels).tolist() for part in parts] == [[5, 5], [4, 4]]
    images = [{part.read(position) for position in range(len(part))} for part in parts]
    assert len(images[0] | images[1]) == 18 and not images[0] & images[1]


def test_an_interrupted_command_goes_on(folders, shards, capsys):
    untouched = (shards / "train" / "000000.tar").stat().st_mtime_ns
    lost = (shards / "train" / "000003.tar").read_bytes()
    (shards / "train" / "000003.tar").unlink()
    (shards / "train" / "index.npz").unlink()
    command.main([f"root={folders}", f"out={shards}", "images_per_shard=4", "workers=1"])
    assert "6 of 7 shards are there already" in capsys.readouterr().out
    assert (shards / "train" / "000003.tar").read_bytes() == lost
    assert (shards / "train" / "000000.tar").stat().st_mtime_ns == untouched
    assert len(open_index(shards, "train").labels) == 18


def test_the_command_refuses_what_cannot_be(folders, shards, tmp_path):
    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        return str(caught.value)

    assert "holds shards of other images, sizes or order (18 images, 4 in a shard): give another out=" in fails(
        f"root={folders}", f"out={shards}", "images_per_shard=5"
    )
    assert "image folder nowhere does not exist" in fails("root=nowhere", f"out={tmp_path / 'new'}")
    write_tar(tmp_path / "foreign" / "train" / "0.tar", {"a.jpg": b"", "a.cls": b"0"})
    assert "holds tar files that were not made by this command" in fails(
        f"root={folders}", f"out={tmp_path / 'foreign'}"
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_mistaken_arguments_are_named(capsys):
    for arguments, message in (
        (["root=x"], "out=... must be given"),
        (["root=x", "out=y", "seeds=3"], "seeds=3: expected one of root=..., out=..."),
        (["root=x", "out=y", "workers=none"], "workers=none: expected a whole number of at least 1"),
        (["root=x", "out=y", "parts=test"], "parts=test: there are train and val"),
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert message in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_the_work(folders, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("data.make_shards.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"the shards need 0.0 GB, but .* has 0.0 GB free"):
        make_shards(folders, tmp_path / "full")


def test_a_changed_image_is_not_stored_in_silence(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("data.make_shards.scan_shard", lambda path: scan_shard(path)[:-1])
    monkeypatch.setattr("data.make_shards.ProcessPoolExecutor", _InThisProcess)
    with pytest.raises(ValueError, match=r"00000\d.tar does not hold what was put in"):
        make_shards(folders, tmp_path / "out", images_per_shard=4)
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert json.loads((tmp_path / "out" / "train" / "plan.json").read_text())["images"] == 18


class _InThisProcess:
    """A pool that runs its jobs at once, so that they see what a test has patched."""

    def __init__(self, workers: int) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None: ...

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options) -> None: ...
