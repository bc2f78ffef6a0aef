"""COCO's folders and files: what is kept, dropped and mapped; augmentation that keeps boxes true; bad input."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.coco import CocoDataModule
from data.coco_index import read_index, read_truth
from data.decoding import Picture, choose_decoder
from data.detection_transforms import BoxTransform, CropAroundBoxes, detection_eval_transform, detection_train_transform

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
WIDTH, HEIGHT = 80, 60


def entry(number: int, image: int, category: int, box: list[Any], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 1.0, "iscrowd": 0, **more}


def content(num_images: int = 4) -> dict[str, Any]:
    """Image 10 has two boxes, 20 one and a crowd, the others none."""
    images = [
        {"id": 10 * (i + 1), "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(num_images)
    ]
    annotations = [
        entry(7, 20, 90, [8, 6, 16, 12], segmentation=[[1, 2, 3, 4, 5, 6]]),
        entry(8, 10, 3, [40, 30, 20, 15]),
        entry(9, 20, 1, [0, 0, 70, 50], iscrowd=1, segmentation={"counts": [1, 2], "size": [60, 80]}),
        entry(11, 10, 1, [0, 0, 40, 30]),
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def painted(truth: dict[str, Any], image: dict[str, Any]) -> Image.Image:
    """Grey, every box (but crowds) filled with a colour of its own class."""
    pixels = np.full((image["height"], image["width"], 3), 100, dtype=np.uint8)
    for a in truth["annotations"]:
        if a["image_id"] == image["id"] and not a["iscrowd"] and all(isinstance(v, int) and v >= 0 for v in a["bbox"]):
            left, top, width, height = a["bbox"]
            pixels[top : top + height, left : left + width] = {1: (255, 0, 0), 3: (0, 255, 0), 90: (0, 0, 255)}[
                a["category_id"]
            ]
    return Image.fromarray(pixels)


def write(root: Path, truth: dict[str, Any] | None = None, val: dict[str, Any] | None = None) -> Path:
    """A COCO data set on disk, images included."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, listed in (("train", truth or content()), ("val", val or content())):
        (root / f"{part}2017").mkdir(exist_ok=True)
        for image in listed["images"]:
            painted(listed, image).save(root / f"{part}2017" / image["file_name"])
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(listed))
    return root


def module(root: Path, **options: Any) -> CocoDataModule:
    return CocoDataModule(root=str(root), num_workers=0, batch_size_per_device=2, **{"image_size": 96, **options})


def test_boxes_are_mapped_and_mapped_back(tmp_path: Path) -> None:
    made = module(write(tmp_path))
    images, targets = next(iter(made.val_dataloader()))
    assert images.shape == (2, 3, 96, 96) and images.dtype == torch.uint8
    assert made.category_ids == (1, 3, 90) and made.class_names == ("person", "car", "toothbrush")
    assert made.num_classes == 3
    first, second = targets
    assert first["boxes"].tolist() == [[48, 48, 72, 72], [0, 0, 48, 48]] and first["labels"].tolist() == [1, 0]
    assert second["boxes"].tolist() == [[pytest.approx(v) for v in (9.6, 9.6, 28.8, 28.8)]], "the crowd is no target"
    assert second["labels"].tolist() == [2] and second["image_id"] == 20 and second["original_size"] == (60, 80)
    assert first["boxes"].dtype == torch.float32 and first["labels"].dtype == torch.int64
    kept = [target["image_id"] for _, part in made.val_dataloader() for target in part]
    assert kept == [10, 20, 30, 40], "images without boxes stay"
    batches = list(made.train_dataloader())
    assert sorted(t["image_id"] for _, part in batches for t in part) == [10, 20, 30, 40]


def test_the_truth_keeps_crowds_and_all_fields_the_evaluator_wants(tmp_path: Path) -> None:
    val = content()
    for a in val["annotations"]:
        del a["area"]
    made = module(write(tmp_path, val=val), max_val=2)
    truth = made.ground_truth()
    assert [image["id"] for image in truth["images"]] == [10, 20]
    assert [a["id"] for a in truth["annotations"] if a["iscrowd"]] == [9]
    assert {a["id"]: a["area"] for a in truth["annotations"]} == {7: 192, 8: 300, 9: 3500, 11: 1200}
    assert made.ground_truth() is truth and made.categories()[2] == {"id": 90, "name": "toothbrush"}


def test_ids_as_text_and_nulls_are_read_as_the_index_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    box = {"id": "5", "image_id": "3", "category_id": "7", "bbox": [1, 2, 3, 4], "iscrowd": None, "area": None}
    image = {"id": "3", "file_name": "a.jpg", "width": 20, "height": 20}
    path.write_text(json.dumps({"images": [image], "annotations": [box], "categories": [{"id": "7", "name": "x"}]}))
    truth = read_truth(path, read_index(path).image_ids.tolist())
    assert [image["id"] for image in truth["images"]] == [3] and truth["categories"][0]["id"] == 7
    (found,) = truth["annotations"]
    assert [found[key] for key in ("id", "image_id", "category_id", "iscrowd", "area")] == [5, 3, 7, 0, 12]


def test_boxes_without_area_and_outside_are_dropped_and_counted(tmp_path: Path) -> None:
    truth = content()
    truth["annotations"] += [
        entry(20, 30, 1, [5, 5, 0, 10]),
        entry(21, 30, 1, [90, 5, 10, 10]),
        entry(22, 30, 1, [-20, 5, 10, 10]),
        entry(23, 30, 1, [70, 50, 30, 30]),
        entry(24, 30, 1, [10, 10, 70.4, 50.3]),
    ]
    index = read_index(write(tmp_path, truth) / "annotations" / "instances_train2017.json")
    assert index.truth(2)[0].tolist() == [[70, 50, 80, 60], [10, 10, 80, 60]]
    assert index.notes() == (
        "1 crowds ignored, 1 boxes without area dropped, 2 boxes outside their image dropped, "
        "1 boxes clipped to their image"
    )
    assert "training: 1 crowds ignored, 1 boxes without area dropped" in module(tmp_path).describe()


def test_any_data_in_coco_format(tmp_path: Path) -> None:
    """Folders and files of other names, images in subfolders, classes from the file, ids that start at 0."""
    truth = content() | {"categories": [{"id": 0, "name": "cat"}, {"id": 7, "name": "dog"}]}
    truth["annotations"] = [entry(0, 10, 7, [1, 1, 9, 9]), entry(1, 10, 0, [2, 2, 9, 9])]
    for image in truth["images"]:
        (tmp_path / "photos" / "day").mkdir(parents=True, exist_ok=True)
        image["file_name"] = f"day/ä{image['file_name']}"
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "photos" / image["file_name"])
    (tmp_path / "all.json").write_text(json.dumps(truth))
    paths = {f"{part}_images": str(tmp_path / "photos") for part in ("train", "val")}
    paths |= {f"{part}_annotations": str(tmp_path / "all.json") for part in ("train", "val")}
    made = CocoDataModule(**paths, num_workers=0, batch_size_per_device=2, image_size=64)
    _, targets = next(iter(made.val_dataloader()))
    assert made.class_names == ("cat", "dog") and targets[0]["labels"].tolist() == [1, 0]
    assert [made.val_set.index.name(i) for i in range(4)] == [f"day/ä{i}.png" for i in range(4)]


def test_randomness_depends_on_seed_epoch_and_example_alone(tmp_path: Path) -> None:
    root = write(tmp_path)
    first, again, other = (module(root, seed=seed).load(True) for seed in (1, 1, 2))
    torch.manual_seed(5)
    image = first[(3, 0)][0]
    torch.manual_seed(6)
    again[(3, 1)]
    assert torch.equal(image, again[(3, 0)][0])
    assert any(not torch.equal(first[(e, 0)][0], other[(e, 0)][0]) for e in range(4))
    assert any(not torch.equal(image, first[(e, 0)][0]) for e in range(4))


@pytest.mark.parametrize("augment", ["ssd", "flip", "none"])
def test_augmented_boxes_still_enclose_their_objects(augment: str) -> None:
    """One filled rectangle on black: where enough of it is left, its extent after augmentation is the box."""
    pixels = np.zeros((240, 320, 3), dtype=np.uint8)
    pixels[60:180, 80:240] = 200
    transform = detection_train_transform(128, augment)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes, labels = transform(
            Image.fromarray(pixels), torch.tensor([[80.0, 60.0, 240.0, 180.0]]), torch.tensor([4])
        )
        assert type(image) is torch.Tensor and type(boxes) is torch.Tensor and image.dtype == torch.uint8
        assert image.shape == (3, 128, 128) and len(boxes) == len(labels) <= 1
        if not len(boxes):
            continue
        inked = image.float().max(0).values > 75
        rows, columns = torch.nonzero(inked.any(1)).flatten(), torch.nonzero(inked.any(0)).flatten()
        extent = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (boxes[0] - extent).abs().max() <= 2.5, seed
        assert boxes.min() >= 0 and boxes.max() <= 128
        seen.add(tuple(round(v) for v in boxes[0].tolist()))
    assert len(seen) == 1 if augment != "ssd" else len(seen) > 20, "the centred box hides nothing but the crop"


def test_flip_moves_the_box() -> None:
    transform = detection_train_transform(64, "flip")
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        _, boxes, _ = transform(Image.new("RGB", (64, 64)), torch.tensor([[2.0, 8.0, 12.0, 20.0]]), torch.tensor([0]))
        found.add(tuple(boxes[0].tolist()))
    assert found == {(2, 8, 12, 20), (52, 8, 62, 20)}


def test_boxes_are_clipped_after_the_crop_and_tiny_ones_dropped() -> None:
    crop = BoxTransform([CropAroundBoxes(min_scale=0.3, max_scale=0.5, sampler_options=[0.1])], 0)
    many = torch.tensor([[10.0 * i, 10.0 * j, 10.0 * i + 25, 10.0 * j + 25] for i in range(7) for j in range(7)])
    for seed in range(20):
        torch.manual_seed(seed)
        image, boxes, labels = crop(Image.new("RGB", (100, 100)), many, torch.arange(49))
        assert 0 < len(boxes) == len(labels) < 49
        assert boxes.min() >= 0 and boxes[:, 2].max() <= image.shape[2] and boxes[:, 3].max() <= image.shape[1]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    small = torch.tensor([[0.0, 0.0, 5.0, 300.0], [0.0, 0.0, 90.0, 90.0]])
    picture = Image.new("RGB", (600, 600))
    assert detection_train_transform(64, "none")(picture, small, torch.tensor([5, 6]))[2].tolist() == [6]
    assert detection_eval_transform(64)(picture, small, torch.tensor([5, 6]))[2].tolist() == [5, 6]


def test_images_without_boxes_are_augmented_too() -> None:
    transform = detection_train_transform(64, "ssd")
    for seed in range(10):
        torch.manual_seed(seed)
        image, boxes, labels = transform(Image.new("RGB", (90, 70)), torch.zeros(0, 4), torch.zeros(0).long())
        assert image.shape == (3, 64, 64) and boxes.shape == (0, 4) and len(labels) == 0


def test_the_index_travels_to_workers_without_copies(tmp_path: Path) -> None:
    """Shared tensors: what a spawned worker gets is a handle, whose size does not grow with the data."""
    root = write(tmp_path, content(4))
    index = read_index(root / "annotations" / "instances_train2017.json")
    tensors = [value for value in vars(index).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_shared() for tensor in tensors)
    assert not any(isinstance(value, list) for value in vars(index).values()), "Python objects per image"
    loader = module(root).make_loader(module(root).load(True), train=True)
    assert len(list(loader)) == 2


def break_val(root: Path, change: Any) -> CocoDataModule:
    """A data set whose evaluation file is changed after it was written."""
    truth = content()
    change(truth)
    write(root)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    return module(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["images"].clear(), r"lists no images: the data set is empty"),
        (lambda t: t.update(categories=[]), r"lists no categories: there is nothing to detect"),
        (lambda t: t.pop("annotations"), r"not in COCO's format: expected .* found a dict with categories, images"),
        (lambda t: t["images"][1].update(id=10), r"1 image id\(s\) occur more than once .*: 10; each must"),
        (lambda t: t["annotations"][1].update(id=7), r"1 annotation id\(s\) occur more than once .*: 7"),
        (lambda t: t.update(categories=[*CATEGORIES, CATEGORIES[0]]), r"1 category id\(s\) occur more than .*: 90"),
        (lambda t: t["annotations"][0].update(image_id=99), r"1 annotation\(s\) in .* have a image_id .*7: 99"),
        (
            lambda t: t["annotations"][0].update(category_id=2),
            r"have a category_id that the file does not list: .*7: 2",
        ),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, -3, 4]), r"1 box.* negative size: annotation 7: .*bad_boxes"),
        (lambda t: t["annotations"][0].update(bbox=[1, float("nan"), 3, 4]), r"1 box.*NaN or a negative size"),
        (lambda t: t["annotations"][0].update(bbox=[1, None, 3, 4]), r"1 box.*NaN or a negative size"),
        (lambda t: t["annotations"][2].update(bbox=[1, 2, 3]), r"annotation 2 has no usable 'bbox'"),
        (lambda t: t["annotations"][2].pop("bbox"), r"annotation 2 has no usable 'bbox'"),
        (lambda t: t["images"][3].pop("width"), r"image 3 has no usable 'width'"),
        (lambda t: t["images"][3].update(height=0), r"image 3 has no usable 'height'"),
        (lambda t: t["images"][3].pop("file_name"), r"image 3 has no usable 'file_name'"),
    ],
)
def test_broken_annotations_are_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        break_val(tmp_path, change).setup("validate")


def test_bad_boxes_can_be_dropped(tmp_path: Path) -> None:
    truth = content()
    truth["annotations"] += [entry(30, 30, 1, [1, 2, float("nan"), 4]), entry(31, 30, 1, [9, 9, -1, 4])]
    made = module(write(tmp_path, truth, truth), bad_boxes="drop")
    made.setup()
    assert "2 boxes with NaN or negative size dropped" in made.describe()
    assert made.load(False)[2][1]["boxes"].shape == (0, 4)
    assert [a["id"] for a in made.ground_truth()["annotations"]] == [7, 8, 9, 11]


def test_files_that_are_missing_cut_off_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere does not exist: set data.root"):
        module(tmp_path / "nowhere").setup()
    root = write(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"is not complete JSON: .* at character \d+ of \d+ \(a download"):
        module(root).setup()
    path.write_text("")
    with pytest.raises(ValueError, match=r"is not complete JSON"):
        module(root).setup()
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"expected a dict with the lists .* found a list \(results.json"):
        module(root).setup()
    path.write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(ValueError, match=r"is not text: expected JSON, perhaps it is still compressed"):
        module(root).setup()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"does not exist \(.* holds instances_train2017.json\): set data.root"):
        module(root).setup()
    with pytest.raises(FileNotFoundError, match=r"image folder .*x does not exist: set data.root, or data.val_images"):
        module(write(tmp_path), val_images="x").setup()
    with pytest.raises(FileNotFoundError, match=r"none of the first 4 images of .* is in .*annotations, such as 0.png"):
        module(root, val_images="annotations").setup()


def test_files_that_disagree_on_the_classes(tmp_path: Path) -> None:
    val = content() | {"categories": [*CATEGORIES, {"id": 4, "name": "bus"}]}
    with pytest.raises(ValueError, match=r"\(4\) .*\(3\) differ, such as \[\(4, 'bus'\)\]"):
        module(write(tmp_path, val=val)).setup()


def test_no_box_to_train_on(tmp_path: Path) -> None:
    truth = content()
    truth["annotations"] = [entry(9, 20, 1, [0, 0, 70, 50], iscrowd=1)]
    with pytest.raises(ValueError, match=r"holds no box to train on \(1 crowds ignored\)"):
        module(write(tmp_path, truth)).setup()
    module(write(tmp_path, val=truth)).setup()  # may be evaluated: every figure is undefined


@pytest.mark.parametrize("train", [True, False])
def test_absent_corrupt_and_misfit_images_are_skipped_up_to_a_limit(train: bool, tmp_path: Path) -> None:
    root = write(tmp_path, content(6), content(6))
    folder = root / ("train2017" if train else "val2017")
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "3.png")
    made = module(root, max_corrupt=3)
    loader = made.train_dataloader() if train else made.val_dataloader()
    with pytest.warns(UserWarning, match="unusable image") as caught:
        batches = list(loader)
    message = str(caught[-1].message)
    assert "3 unusable image(s) of 6" in message and "1.png (absent)" in message
    assert "3.png (60 x 80 pixels, the annotation file says 80 x 60)" in message
    ids = sorted(t["image_id"] for _, targets in batches for t in targets)
    assert ids == [10, 50, 50, 50, 50, 60] if train else ids == [10, 50, 60]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)  # said once
    with pytest.raises(
        RuntimeError, match=r"[23] unusable image\(s\) of 6 in .*, tolerated are 1 per process \(data.max_corrupt\)"
    ):
        strict = module(root, max_corrupt=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(strict.train_dataloader() if train else strict.val_dataloader())


def test_images_are_decoded_as_those_of_folders_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the decoder that is asked for, to the same pixels, with the same reasons where that fails."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(4)]
    root = write(tmp_path, content() | {"images": images, "annotations": [entry(1, 0, 1, [8, 6, 16, 12])]})
    folder = root / "train2017"
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-200])
    (folder / "2.jpg").write_text("hello")
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "3.jpg")
    asked = []
    monkeypatch.setattr("data.coco.Picture", lambda data, decoder: asked.append(decoder) or Picture(data, decoder))
    pixels = []
    for decoder in ("pillow", "auto"):
        data = module(root, decoder=decoder, augment="none")
        assert f"(decoded by {choose_decoder(decoder)})" in data.describe()
        part = data.load(True)
        pixels.append(np.asarray(part.open(0)))
        reasons = [part._failure(position) for position in range(1, 4)]
        assert "truncated" in reasons[0].lower() and reasons[1] == "UnidentifiedImageError: cannot identify image file"
        assert reasons[2] == "60 x 80 pixels, the annotation file says 80 x 60"
    assert asked[0] == "pillow" and asked[-1] == choose_decoder()
    assert np.array_equal(*pixels) and np.array_equal(pixels[0], np.asarray(Image.open(folder / "0.jpg")))
    with pytest.raises(ValueError, match="unknown decoder 'cv2'"):
        module(root, decoder="cv2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "mosaic"}, r"unknown augment \(data.augment\) 'mosaic'; choose one of ssd, flip, none"),
        ({"bad_boxes": "keep"}, r"unknown data.bad_boxes 'keep'; choose one of error, drop"),
        ({"max_train": 0}, r"data.max_train 0: expected a whole number of at least 1"),
        ({"image_size": 16}, r"image size 16"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def test_limits_take_the_first_images(tmp_path: Path) -> None:
    made = module(write(tmp_path), max_train=2, max_val=1)
    made.setup()
    assert (len(made.train_set), len(made.val_set)) == (2, 1)
