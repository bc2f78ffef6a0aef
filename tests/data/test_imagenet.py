import shutil
import warnings

import pytest
import torch
from PIL import Image

from data.decoding import choose_decoder
from data.imagenet import ImageFolderDataModule, ImageNetDataModule

PER_CLASS = {"train": 6, "val": 4}
CLASSES = ("ant", "bee", "cow")


def colour(part: str, label: int, number: int) -> tuple[int, int, int]:
    """Every image has a colour of its own, so that batches can be recognised."""
    return (40 * label + 5, 10 * number + 5, 100 if part == "train" else 200)


@pytest.fixture
def root(tmp_path):
    """3 classes with 6 and 4 plain-coloured images, as PNG, so that colours survive."""
    for part, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 36), colour(part, label, number)).save(folder / f"{number}.png")
    return tmp_path


def module(root, **options):
    options = {"image_size": 32, "batch_size_per_device": 4, "num_workers": 0} | options
    return ImageFolderDataModule(root, **options)


def colours(loader) -> list[tuple[int, ...]]:
    return [tuple(image[:, 16, 16].tolist()) for images, _ in loader for image in images]


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_labels_follow_the_sorted_folders(root):
    loader = module(root).val_dataloader()
    expected = [colour("val", label, number) for label in range(3) for number in range(4)]
    assert colours(loader) == expected
    assert [label for _, labels in loader for label in labels.tolist()] == [0] * 4 + [1] * 4 + [2] * 4


def test_training_reads_every_image_once_per_epoch(root):
    data = module(root, batch_size_per_device=3)
    batches = list(data.train_dataloader())
    assert sorted(colours(batches)) == sorted(colour("train", label, n) for label in range(3) for n in range(6))
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert images.shape == (3, 3, 32, 32)
        assert [red // 40 for red in images[:, 0, 16, 16].tolist()] == labels.tolist()


def test_description_names_the_folder(root):
    assert module(root).describe() == (
        f"imagefolder: 18 training and 12 evaluation images, 3 classes, 32 x 32 pixels, batch 4 per device, in {root} "
        f"(folders, decoded by {choose_decoder()})"
    )
    assert module(root).class_names == CLASSES


def test_nested_folders_other_files_and_hidden_folders(root):
    (root / "train" / "ant" / "deeper").mkdir()
    shutil.move(root / "train" / "ant" / "0.png", root / "train" / "ant" / "deeper" / "0.PNG")
    (root / "train" / "ant" / "readme.txt").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    data = module(root)
    data.setup()
    assert len(data.train_set) == 18
    assert data.num_classes == 3


def test_fewer_images_of_each_class(root):
    data = module(root, max_train_per_class=2, max_val_per_class=1, batch_size_per_device=2)
    data.setup()
    assert data.train_set.source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert colours(data.val_dataloader()) == [colour("val", label, 0) for label in range(3)]


@pytest.mark.parametrize("holdout", [2, 0.34])
def test_held_out_training_images_stand_in_for_val(root, holdout):
    shutil.rmtree(root / "val")
    held = [colour("train", label, number) for label in range(3) for number in (4, 5)]
    for seed in (1, 2):
        data = module(root, holdout=holdout, seed=seed)
        assert colours(data.val_dataloader()) == colours(data.test_dataloader()) == held
        trained = {pixels for _ in range(2) for pixels in colours(data.train_dataloader())}
        assert trained <= {colour("train", label, number) for label in range(3) for number in range(4)}
    assert "12 training and 6 evaluation images" in data.describe()
    assert "evaluated on images held out of train/, val/ is not read" in data.describe()


def test_fewer_images_beside_held_out_ones(root):
    data = module(root, holdout=2, max_train_per_class=3, max_val_per_class=1, batch_size_per_device=9)
    assert colours(data.val_dataloader()) == [colour("train", label, 4) for label in range(3)]
    expected = [colour("train", label, number) for label in range(3) for number in range(3)]
    assert sorted(colours(data.train_dataloader())) == expected


def test_too_many_held_out_images_are_an_error(root):
    with pytest.raises(ValueError, match=r"data.holdout=6 leaves no training image in 3 class\(es\): ant \(6\), bee"):
        module(root, holdout=6).setup("fit")


def test_images_do_not_depend_on_workers(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        for number in range(8):
            pixels = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / part / "only" / f"{number}.png")

    def epochs(**options):
        loader = module(tmp_path, augment="randaugment", **options).train_dataloader()
        found = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            found.append(torch.cat([images for images, _ in loader]))
        return found

    alone, helped = epochs(num_workers=0), epochs(num_workers=2)
    assert torch.equal(alone[0], helped[0])
    assert torch.equal(alone[1], helped[1])
    assert not torch.equal(alone[0], alone[1])


# Ways to break the folders, for the table of messages below.


def missing_root(root):
    shutil.rmtree(root)


def missing_train(root):
    (root / "train").rename(root / "training")


def missing_val(root):
    shutil.rmtree(root / "val")


def no_class_folders(root):
    for name in CLASSES:
        shutil.rmtree(root / "val" / name)
    Image.new("RGB", (8, 8)).save(root / "val" / "ILSVRC_1.png")


def empty_class(root):
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()


def no_images(root):
    for file in (root / "val").rglob("*.png"):
        file.rename(file.with_suffix(".txt"))


def unknown_val_class(root):
    (root / "val" / "cow").rename(root / "val" / "cows")


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        (missing_root, FileNotFoundError, r"image folder {root} does not exist: set data.root .* train/ and val/"),
        (
            missing_train,
            FileNotFoundError,
            r"{root}/train does not exist: .*must hold train/ and val/; .*training/, val/",
        ),
        (missing_val, FileNotFoundError, r"{root}/val does not exist: .* it holds train/"),
        (no_class_folders, FileNotFoundError, r"{root}/val holds no class folders: .* it holds ILSVRC_1.png"),
        (
            empty_class,
            FileNotFoundError,
            r"1 empty class folder\(s\) in {root}/train: bee; expected files ending in .jpg",
        ),
        (no_images, FileNotFoundError, r"no images in {root}/val: expected files ending in .jpg"),
        (unknown_val_class, ValueError, r"{root}/val holds 1 class folder\(s\) that {root}/train has not: cows"),
    ],
)
def test_wrong_folders_are_named(root, breakage, error, message):
    breakage(root)
    with pytest.raises(error, match=message.format(root=root)):
        module(root).setup()


def test_number_of_classes_is_checked(root):
    assert module(root, num_classes=3).num_classes == 3
    with pytest.raises(ValueError, match=rf"{root}/train holds 3 class folders, expected 5 \(data.num_classes\)"):
        module(root, num_classes=5).setup("fit")
    with pytest.raises(ValueError, match="holds 3 class folders, expected 1000"):
        ImageNetDataModule(root).setup("test")


def test_class_without_evaluation_images_is_warned_of(root):
    shutil.rmtree(root / "val" / "bee")
    data = module(root)
    with pytest.warns(UserWarning, match=rf"{root}/val has no folder for 1 of the 3 classes: bee"):
        data.setup()
    assert [label for _, labels in data.val_dataloader() for label in labels.tolist()] == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_corrupt": -1}, "max_corrupt -1: expected 0 or more"),
        ({"holdout": -1}, "holdout -1: expected a whole number"),
        ({"max_train_per_class": 0}, "max_train_per_class 0: expected 1 or more"),
        ({"train_crop": "none"}, "unknown train_crop 'none'"),
        ({"crop_fraction": 2.0}, "crop fraction 2.0"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_of_evaluation_and_counted_once(root, workers):
    truncate(root / "val" / "ant" / "1.png")
    (root / "val" / "cow" / "3.png").write_bytes(b"")
    loader = module(root, num_workers=workers).val_dataloader()
    left = [colour("val", label, n) for label in range(3) for n in range(4) if (label, n) not in ((0, 1), (2, 3))]
    with pytest.warns(UserWarning, match="unusable") as caught:
        assert colours(loader) == left
    last = str(caught[-1].message)
    assert f"2 unusable image(s) of 12 in {root}/val, left out of the evaluation (limit 10 per process)" in last
    assert f"{root}/val/ant/1.png (" in last
    assert f"{root}/val/cow/3.png (UnidentifiedImageError" in last
    # Known by now: not counted or warned of again, whichever worker reads it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(loader) == left


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_of_corrupt_images_only_is_left_out(root, workers):
    for number in range(4):
        truncate(root / "val" / "bee" / f"{number}.png")
    with pytest.warns(UserWarning, match="4 unusable"):
        labels = [labels.tolist() for _, labels in module(root, num_workers=workers).val_dataloader()]
    assert labels == [[0] * 4, [2] * 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_in_training(root, workers):
    truncate(root / "train" / "ant" / "1.png")
    truncate(root / "train" / "ant" / "2.png")
    truncate(root / "train" / "cow" / "5.png")
    with pytest.warns(UserWarning, match="unusable") as caught:
        found = colours(module(root, batch_size_per_device=6, num_workers=workers).train_dataloader())
    last = str(caught[-1].message)
    assert f"3 unusable image(s) of 18 in {root}/train, replaced by the next usable one (limit 10 per process)" in last
    expected = [colour("train", label, n) for label in range(3) for n in range(6)]
    expected[1] = expected[2] = expected[3]
    expected[17] = expected[0]  # the list's end is followed by its beginning
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_too_many_corrupt_images_stop_the_run(root, workers, train):
    part = "train" if train else "val"
    for number in range(3):
        truncate(root / part / "bee" / f"{number}.png")
    data = module(root, num_workers=workers, max_corrupt=2, batch_size_per_device=2)
    loader = data.train_dataloader() if train else data.val_dataloader()
    where = rf"3 unusable image\(s\) of \d+ in {root}/{part}"
    expected = rf"{where}, tolerated are 2 per process \(data.max_corrupt\): .*bee/0.png"
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=expected):
        warnings.simplefilter("ignore")  # of the first ones
        list(loader)


@pytest.mark.parametrize("train", [False, True])
def test_nothing_readable_stops_the_run_below_the_limit(root, train):
    part = "train" if train else "val"
    for file in (root / part).rglob("*.png"):
        truncate(file)
    data = module(root, max_corrupt=100)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=rf"(18|12) unusable image\(s\) of .*{part}"):
        warnings.simplefilter("ignore")
        list(data.train_dataloader() if train else data.val_dataloader())


def test_programming_errors_are_not_taken_for_corrupt_images(root):
    data = module(root)
    data.setup()

    def broken(image):
        raise ValueError("a bug in a transform")

    data.val_set.transform = broken
    with pytest.raises(ValueError, match="a bug in a transform"):
        list(data.val_dataloader())
