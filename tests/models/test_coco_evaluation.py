"""COCO's figures: pycocotools is the truth, in every corner where evaluators have gone wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.coco_evaluation import (
    FIGURES,
    coco_results,
    evaluate_detections,
    evaluate_over_ranks,
    gather_results,
    write_results,
)

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]


def pycocotools_figures(ground_truth: dict, results: Any, image_ids: list[int]) -> tuple[list[float], list[float]]:
    """(the 12 figures, AP of each class), by the original code; `results` is a list or a file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        if results:
            found = truth.loadRes(results if isinstance(results, str) else copy.deepcopy(results))
        else:  # loadRes fails on an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    per_class = []
    for position in range(len(evaluator.params.catIds)):
        precision = evaluator.eval["precision"][:, :, position, 0, -1]
        precision = precision[precision > -1]
        per_class.append(float(precision.mean()) if precision.size else -1.0)
    return [float(value) for value in evaluator.stats], per_class


def annotation(number: int, image: int, category: int, box: list[float], crowd: int = 0) -> dict:
    area = box[2] * box[3] * 0.7  # a mask covers less than its box; COCO sorts by the mask's area
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}


def scene(num_images: int, seed: int, crowds: float = 0.15, boxes: int = 12) -> dict:
    """Random ground truth of all three sizes; every fourth image is empty."""
    draw = random.Random(seed)
    images = [{"id": 10 * i + 7, "height": 480, "width": 640, "file_name": f"{i}.jpg"} for i in range(num_images)]
    annotations: list[dict] = []
    for image in images[1::4] + images[2::4] + images[3::4]:
        for _ in range(draw.randint(1, boxes)):
            width, height = draw.choice([9, 20, 50, 90, 200]), draw.choice([11, 25, 60, 150])
            box = [round(draw.uniform(0, 640 - width), 2), round(draw.uniform(0, 480 - height), 2), width, height]
            category = draw.choice(CATEGORIES)["id"]
            annotations.append(annotation(len(annotations) + 1, image["id"], category, box, draw.random() < crowds))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def guesses(ground_truth: dict, seed: int, noise: float = 0.1, clutter: int = 5) -> list[dict]:
    """Detections: most boxes shaken, some classes wrong, some boxes invented, scores with ties."""
    draw = random.Random(seed)
    results = []
    for a in ground_truth["annotations"]:
        left, top, width, height = a["bbox"]
        for _ in range(draw.choice([0, 1, 1, 2])):
            box = [left + noise * width * draw.gauss(0, 1), top + noise * height * draw.gauss(0, 1), width, height]
            category = a["category_id"] if draw.random() < 0.9 else draw.choice(CATEGORIES)["id"]
            score = round(draw.random(), 1)
            results.append({"image_id": a["image_id"], "category_id": category, "bbox": box, "score": score})
    for image in ground_truth["images"]:
        for _ in range(clutter):
            box = [draw.uniform(0, 500), draw.uniform(0, 400), draw.uniform(1, 120), draw.uniform(1, 80)]
            category, score = draw.choice(CATEGORIES)["id"], round(draw.random(), 1)
            results.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    return results


def ids_of(ground_truth: dict) -> list[int]:
    return [image["id"] for image in ground_truth["images"]]


def assert_agrees(ground_truth: dict, results: list[dict], image_ids: list[int] | None = None) -> dict[str, float]:
    image_ids = ids_of(ground_truth) if image_ids is None else image_ids
    before = copy.deepcopy((ground_truth, results))
    found = evaluate_detections(ground_truth, results, image_ids)
    assert (ground_truth, results) == before, "the arguments were changed"
    expected, per_class = pycocotools_figures(ground_truth, results, image_ids)
    assert list(found.figures) == list(FIGURES)
    assert list(found.figures.values()) == pytest.approx(expected, abs=1e-9)
    assert list(found.per_class.values()) == pytest.approx(per_class, abs=1e-9)
    assert found.num_images == len(set(image_ids))
    return found.figures


@pytest.mark.parametrize("seed", range(4))
def test_random_detections_have_the_figures_of_pycocotools(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    truth = scene(24, seed)
    figures = assert_agrees(truth, guesses(truth, seed))
    assert 0.05 < figures["AP"] < figures["AP50"] < 1, "a test on trivial figures shows nothing"
    assert len({round(value, 6) for value in figures.values()}) > 9
    assert capfd.readouterr().out == ""


def test_ground_truth_fed_back_is_perfect() -> None:
    truth = scene(20, 5, crowds=0)
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth["annotations"]
    ]
    figures = assert_agrees(truth, results)
    assert figures["AP"] == figures["AP50"] == figures["AR100"] == 1.0
    for a in truth["annotations"]:  # ids from 0, which mean "not found" to pycocotools
        a["id"] -= 1
    assert evaluate_detections(truth, results, ids_of(truth))["AP"] == 1.0


def test_no_detections() -> None:
    figures = assert_agrees(scene(12, 1), [])
    assert set(figures.values()) == {0.0}


def test_images_without_boxes() -> None:
    """Detections in them are false alarms; where no image has a box there is nothing to measure."""
    truth = scene(12, 2)
    empty = truth["images"][0]["id"]
    alarm = {"image_id": empty, "category_id": 1, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.99}
    results = guesses(truth, 2, clutter=0)
    assert assert_agrees(truth, [*results, alarm])["AP"] < assert_agrees(truth, results)["AP"]
    nothing = {**truth, "annotations": []}
    assert set(assert_agrees(nothing, [alarm]).values()) == {-1.0}
    assert set(assert_agrees(nothing, []).values()) == {-1.0}


def test_crowds_only() -> None:
    truth = scene(12, 3, crowds=1.1)
    assert set(assert_agrees(truth, guesses(truth, 3)).values()) == {-1.0}


def test_a_detection_on_a_crowd_is_no_false_alarm() -> None:
    truth = scene(1, 0) | {
        "annotations": [annotation(1, 7, 1, [10, 10, 50, 50]), annotation(2, 7, 1, [200, 100, 300, 300], crowd=1)]
    }
    found = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.5}
    on_crowd = [{**found, "bbox": [250 + 10 * i, 150, 60, 60], "score": 0.9} for i in range(3)]
    assert assert_agrees(truth, [found, *on_crowd])["AP"] == 1.0
    elsewhere = [{**result, "bbox": [100, 420, 60, 60]} for result in on_crowd]
    assert assert_agrees(truth, [found, *elsewhere])["AP"] < 0.5


def test_one_class_without_ground_truth() -> None:
    truth = scene(16, 4)
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 3]
    results = guesses(truth, 4)
    assert any(result["category_id"] == 3 for result in results)
    assert_agrees(truth, results)
    per_class = evaluate_detections(truth, results, ids_of(truth)).per_class
    assert per_class["car"] == -1 and per_class["person"] > 0 and list(per_class) == ["person", "car", "toothbrush"]


def test_more_than_a_hundred_detections_per_image() -> None:
    """The best hundred of a class in an image count: a find with the lowest score is lost behind a hundred others."""
    truth = scene(8, 6, boxes=130)
    assert_agrees(truth, guesses(truth, 6, noise=0.03, clutter=250))
    one = scene(1, 0) | {"annotations": [annotation(1, 7, 1, [10, 10, 50, 50])]}
    right = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.1}
    wrong = [{**right, "bbox": [300, 300, 20, 20], "score": 0.5} for _ in range(100)]
    assert assert_agrees(one, [*wrong[:99], right])["AR100"] == 1.0
    assert assert_agrees(one, [*wrong, right])["AR100"] == 0.0


def test_part_of_the_images_and_images_named_twice() -> None:
    truth = scene(16, 7)
    some = ids_of(truth)[3:9]
    results = [result for result in guesses(truth, 7) if result["image_id"] in some]
    assert_agrees(truth, results, some)
    twice = evaluate_detections(truth, results, [*some, *some])
    assert twice == evaluate_detections(truth, results, some)
    assert evaluate_detections(truth, [], []).num_images == 0


def test_classes_of_the_same_name_keep_their_own_figures() -> None:
    truth = scene(8, 8) | {"categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "a"}, {"id": 90, "name": "b"}]}
    assert list(evaluate_detections(truth, [], ids_of(truth)).per_class) == ["a (1)", "a (3)", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "image 8, which the ground truth does not hold"),
        ({"image_id": 17}, "image 17, which is not among the images to be measured"),
        ({"category_id": 2}, "category 2, which the data does not hold"),
        ({"score": float("nan")}, "in image 7 has the box .* and score nan: not finite"),
        ({"bbox": [0, 0, float("inf"), 1]}, "not finite"),
    ],
)
def test_impossible_results_are_named(change: dict, message: str) -> None:
    result = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        evaluate_detections(scene(3, 0), [result], [7])


def test_detections_become_results_in_pixels_of_the_file() -> None:
    boxes = torch.tensor([[30.0, 60.0, 150.0, 300.0], [-5.0, 10.0, 330.0, 20.0]])
    results = coco_results(
        9,
        boxes,
        torch.tensor([0.1, 0.75]),
        torch.tensor([2, 0]),
        original_size=(480, 640),
        input_size=(300, 300),
        category_ids=(1, 3, 90),
    )
    assert results == [
        {"image_id": 9, "category_id": 90, "bbox": [64.0, 96.0, 256.0, 384.0], "score": pytest.approx(0.1)},
        {"image_id": 9, "category_id": 1, "bbox": [0.0, 16.0, 640.0, 16.0], "score": 0.75},
    ]
    none = coco_results(
        9,
        boxes[:0],
        torch.ones(0),
        torch.ones(0, dtype=torch.int64),
        original_size=(4, 4),
        input_size=(8, 8),
        category_ids=(1,),
    )
    assert none == []


def test_the_file_is_taken_by_pycocotools_as_it_stands(tmp_path: Path) -> None:
    truth = scene(16, 9)
    results = []
    for image in truth["images"]:
        own = [result for result in guesses(truth, 9) if result["image_id"] == image["id"]]
        boxes = torch.tensor([result["bbox"] for result in own])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([[1, 3, 90].index(result["category_id"]) for result in own])
        scores = torch.tensor([result["score"] for result in own])
        size = (image["height"], image["width"])
        results += coco_results(
            image["id"], boxes, scores, labels, original_size=size, input_size=size, category_ids=(1, 3, 90)
        )
    path = write_results(tmp_path / "new" / "results.json", results)
    assert [{type(value) for value in result.values()} for result in json.loads(path.read_text())] == [
        {int, list, float}
    ] * len(results)
    expected, _ = pycocotools_figures(truth, str(path), ids_of(truth))
    found = evaluate_detections(truth, results, ids_of(truth))
    assert list(found.figures.values()) == pytest.approx(expected, abs=1e-9)
    assert os.listdir(path.parent) == ["results.json"], "a partial file was left"


def test_without_processes_nothing_is_gathered() -> None:
    assert gather_results({9: [], 3: [{"score": 1}]}) == {3: [{"score": 1}], 9: []}
    truth = scene(6, 1)
    by_image = {image_id: [r for r in guesses(truth, 1) if r["image_id"] == image_id] for image_id in ids_of(truth)}
    figures, flat = evaluate_over_ranks(lambda: truth, by_image)
    assert figures == evaluate_detections(truth, flat, ids_of(truth)) and len(flat) == len(guesses(truth, 1))


def evaluate_as_rank(rank: int, world_size: int, num_images: int, folder: str) -> None:
    """One of the processes: its share of the images as a padding sampler deals them out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    truth = scene(num_images, 3)
    results = guesses(truth, 3)
    ids = ids_of(truth)
    padded = (ids + ids)[: -(-num_images // world_size) * world_size]
    mine = {image_id: [r for r in results if r["image_id"] == image_id] for image_id in padded[rank::world_size]}

    def read() -> dict:
        assert rank == 0, "a process that does not measure reads the truth"
        return truth

    def read_nothing() -> dict:
        raise FileNotFoundError("there is no file any more")

    figures, flat = evaluate_over_ranks(read, mine)
    bad = {ids[0]: [{**results[0], "category_id": 2, "image_id": ids[0]}]} if rank == 1 else {}
    message = ""
    try:
        evaluate_over_ranks(read, bad)
    except ValueError as error:
        message = str(error)
    try:  # read in vain: all processes hear of it
        evaluate_over_ranks(read_nothing, mine)
    except FileNotFoundError as error:
        message += f"; {error}"
    gathered = gather_results(mine)
    report = [figures.figures, figures.per_class, figures.num_images, len(flat), len(gathered), message]
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def assert_same_over_ranks(world_size: int, num_images: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    # Forked, as importing torch anew takes each process many seconds; nothing here uses threads or a GPU.
    torch.multiprocessing.start_processes(
        evaluate_as_rank, (world_size, num_images, str(folder)), nprocs=world_size, start_method="fork"
    )
    truth = scene(num_images, 3)
    alone = evaluate_detections(truth, guesses(truth, 3), ids_of(truth))
    for rank in range(world_size):
        figures, per_class, counted, flat, gathered, message = json.loads((folder / f"{rank}.json").read_text())
        assert (figures, per_class, counted) == (alone.figures, alone.per_class, num_images)
        assert flat == (len(guesses(truth, 3)) if rank == 0 else 0), "results came twice or not at all"
        assert gathered == (num_images if rank == 0 else 0)
        assert "has category 2, which the data does not hold" in message
        assert message.endswith("; there is no file any more")


def test_two_processes_have_the_figures_of_one(tmp_path: Path) -> None:
    assert_same_over_ranks(2, 21, tmp_path)


@pytest.mark.parametrize(("world_size", "num_images"), [(2, 1), (2, 8), (3, 2), (3, 21), (3, 22)])
def test_any_number_of_processes_and_images(world_size: int, num_images: int, tmp_path: Path) -> None:
    assert_same_over_ranks(world_size, num_images, tmp_path)
