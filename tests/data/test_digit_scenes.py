"""Scenes of digits: seeded, varied, honest boxes, held-out digits, and a COCO data set on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from data import scenes as module
from data.coco import CocoDataModule
from data.digit_scenes import DigitScenesDataModule, coco_form, main, make_style
from data.digits import digits_of_part
from data.scenes import SceneStyle, _covered, compose_scene

SIZE = 128
PLAIN = SceneStyle(clutter=0, noise=0, overlap=0)


def scenes(count: int = 60, train: bool = True, style: SceneStyle | None = None) -> list:
    return [compose_scene(seed, SIZE, train, style or SceneStyle()) for seed in range(count)]


def test_a_scene_is_a_function_of_its_seed() -> None:
    first, again, other = (compose_scene(seed, SIZE, True, SceneStyle()) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (SIZE, SIZE, 3) and first.image.dtype == np.uint8


def test_scenes_vary_as_the_style_says() -> None:
    made = scenes(200)
    counts = [len(scene.labels) for scene in made]
    assert 2 < counts.count(0) < 30, "empty scenes are rare but there"
    assert max(counts) == 5 and len(set(counts)) == 6
    boxes = np.concatenate([scene.boxes for scene in made])
    assert set(np.concatenate([scene.labels for scene in made])) == set(range(10))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= SIZE).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    heights = boxes[:, 3] - boxes[:, 1]
    assert heights.min() < 0.3 * SIZE < 0.6 * SIZE < heights.max()
    worst = [max((_covered(a, b) for i, a in enumerate(s.boxes) for b in s.boxes[:i]), default=0) for s in made]
    assert 0.1 < max(worst) <= 0.25, "digits overlap, and no more than allowed"


def test_boxes_are_tight_around_the_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    """On plain grey, nothing but the digit differs from the background: its extent is the box, to a pixel."""
    monkeypatch.setattr(module, "_background", lambda rng, size: Image.new("RGB", (size, size), (127, 127, 127)))
    monkeypatch.setattr(module, "_draw_line", lambda *_, **__: None)
    style = SceneStyle(clutter=0, noise=0, max_digits=1, empty=0, contrast=100)
    for scene in scenes(100, style=style):
        off = np.abs(scene.image.astype(float) - 127).max(2) > 45
        rows, columns = np.flatnonzero(off.any(1)), np.flatnonzero(off.any(0))
        extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(scene.boxes[0] - extent).max() <= 1


def test_evaluation_scenes_show_other_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = digits_of_part(True)[0], digits_of_part(False)[0]
    assert len(train) == 1438 and len(held_out) == 359
    assert [len(module._sprites(part)[0]) for part in (True, False)] == [1438, 359]
    one = compose_scene(3, SIZE, True, PLAIN)
    assert not np.array_equal(one.image, compose_scene(3, SIZE, False, PLAIN).image)


def test_loaders_give_what_detectors_expect() -> None:
    made = DigitScenesDataModule(num_train=10, num_val=5, image_size=96, batch_size_per_device=4, seed=3)
    images, targets = next(iter(made.train_dataloader()))
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.uint8 and len(targets) == 4
    for target in targets:
        assert set(target) == {"boxes", "labels", "image_id", "original_size"}
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (len(target["labels"]), 4)
        assert target["labels"].dtype == torch.int64 and target["original_size"] == (96, 96)
    normal, same = made.on_after_batch_transfer((images, targets), 0)
    assert normal.dtype == torch.float32 and abs(normal.mean()) < 2 and same is targets
    counted = [target["image_id"] for _, part in made.val_dataloader() for target in part]
    assert counted == [1, 2, 3, 4, 5]
    assert "digit_scenes: 10 training and 5 evaluation images, 10 classes, 96 x 96" in made.describe()


def test_epochs_seeds_and_workers() -> None:
    def train_images(epoch: int, **options: object) -> torch.Tensor:
        made = DigitScenesDataModule(num_train=4, num_val=2, image_size=64, batch_size_per_device=4, **options)
        loader = made.train_dataloader()
        loader.sampler.set_epoch(epoch)
        order = [index for _, index in loader.sampler]
        images = next(iter(loader))[0]
        return torch.stack([images[order.index(index)] for index in range(4)])

    first = train_images(0, seed=1)
    assert torch.equal(first, train_images(0, seed=1, num_workers=1))
    assert not torch.equal(first, train_images(1, seed=1)) and not torch.equal(first, train_images(0, seed=2))
    assert torch.equal(first, train_images(1, seed=1, fresh=False))
    held_out = [DigitScenesDataModule(image_size=64, num_val=2, seed=seed).load(False)[0][0] for seed in (1, 2)]
    assert torch.equal(*held_out), "evaluation must not depend on the training's seed"


def test_the_truth_is_what_the_loader_shows() -> None:
    made = DigitScenesDataModule(num_train=4, num_val=12, image_size=96, batch_size_per_device=4)
    truth = made.ground_truth()
    assert made.ground_truth() is truth, "drawn once"
    for _, target in (made.load(False)[index] for index in range(12)):
        own = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert torch.equal(boxes, target["boxes"])
        assert [made.category_ids.index(a["category_id"]) for a in own] == target["labels"].tolist()
    assert [category["name"] for category in made.categories()] == list("0123456789")


def test_written_scenes_are_a_coco_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    main(["--out", str(folder), "--train", "3", "--val", "2", "--image-size", "96", "--seed", "4"])
    assert "3 training and 2 held-out scenes of 96 pixels" in capsys.readouterr().out
    made = DigitScenesDataModule(num_train=3, num_val=2, image_size=96, seed=4)
    for part, count in (("train", 3), ("val", 2)):
        coco = COCO(str(folder / "annotations" / f"instances_{part}2017.json"))
        scene_set = made.load(part == "train")
        assert len(coco.imgs) == count and len(coco.cats) == 10
        assert json.loads((folder / "annotations" / f"instances_{part}2017.json").read_text()) == coco_form(scene_set)
        for number, image in coco.imgs.items():
            pixels = np.asarray(Image.open(folder / f"{part}2017" / image["file_name"]))
            assert np.array_equal(pixels, scene_set.scene((0, number - 1)).image)
    read = CocoDataModule(root=str(folder), image_size=96, augment="none", num_workers=0)
    for train in (True, False):
        for index in range(2):
            (image, target), (expected, truth) = read.load(train)[index], made.load(train)[index]
            assert torch.equal(image, expected) and torch.equal(target["boxes"], truth["boxes"])
            assert torch.equal(target["labels"], truth["labels"]) and target["image_id"] == truth["image_id"]
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(folder)])
    assert stopped.value.code == 2 and "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, r"num_train 0: expected a whole number of at least 1"),
        ({"num_val": 2.5}, r"num_val 2.5"),
        ({"style": {"colour": 1}}, r"data.style has no colour; it has max_digits, empty"),
        ({"style": {"size": [0.5, 0.2]}}, r"data.style.size=\[0.5, 0.2\]: expected two shares"),
        ({"style": {"max_digits": 0}}, r"data.style.max_digits=0"),
        ({"style": {"empty": 2}}, r"data.style.empty=2: expected a number from 0 to 1"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenesDataModule(**options)


def test_a_style_replaces_single_values() -> None:
    assert make_style({"clutter": 0}) == SceneStyle(clutter=0) and make_style(None) == SceneStyle()
