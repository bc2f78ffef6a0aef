"""Object detection without a download: scenes drawn from scikit-learn's digits, in COCO's form, in memory or on disk.

`python -m data.digit_scenes --out scenes` writes them as a COCO data set that any detection code reads.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.detection import DetectionDataModule, DetectionDataset, DetectionExample, make_target
from data.sampling import Key, example_seed, split_key
from data.scenes import Scene, SceneStyle, compose_scene

CATEGORY_IDS = tuple(range(1, 11))
CLASS_NAMES = tuple("0123456789")
# The held-out scenes are the same for every seed of a training, so that its figures can be compared.
EVALUATION_SEED = 0


class DigitScenes(DetectionDataset):
    """Scenes drawn when they are asked for, each a pure function of (seed, epoch, index).

    Args:
        num_scenes: length of an epoch.
        image_size: side in pixels.
        train: scenes of training digits, else of held-out digits, the same ones always.
        style: how they look.
        seed: of the training scenes.
        fresh: every epoch has new training scenes; False repeats those of the first epoch.
    """

    def __init__(
        self, num_scenes: int, image_size: int, *, train: bool, style: SceneStyle, seed: int = 0, fresh: bool = True
    ) -> None:
        self.num_scenes = num_scenes
        self.image_size = image_size
        self.train = train
        self.style = style
        self.seed = seed
        self.fresh = fresh

    def __len__(self) -> int:
        return self.num_scenes

    def scene(self, key: Key) -> Scene:
        """The scene of a sampler's key."""
        epoch, index = split_key(key)
        if self.train:
            seed = example_seed(self.seed, 1, epoch if self.fresh else 0, index)
        else:
            seed = example_seed(EVALUATION_SEED, 0, index)
        return compose_scene(seed, self.image_size, self.train, self.style)

    def __getitem__(self, key: Key) -> DetectionExample:
        """(image uint8 `[3, S, S]`, target)."""
        scene = self.scene(key)
        image = torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()
        size = (self.image_size, self.image_size)
        _, index = split_key(key)
        return image, make_target(torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels), index + 1, size)


class DigitScenesDataModule(DetectionDataModule):
    """Scenes of handwritten digits on cluttered backgrounds, ten classes, made on the fly in a millisecond or two.

    Evaluation scenes are drawn from digits that training scenes never show (the split of `data.digits`), and are the
    same ones for every seed. Training scenes are new in every epoch, which is their augmentation.

    Args:
        num_train, num_val: scenes per epoch, and scenes for evaluation.
        fresh: False repeats the scenes of the first epoch.
        style: what `data.scenes.SceneStyle` takes, such as {max_digits: 12, clutter: 0}.
        options: see `ImageDataModule`.

    Raises:
        ValueError: a count or a style cannot work; the message says which.
    """

    name = "digit_scenes"
    num_classes = 10
    class_names = CLASS_NAMES
    category_ids = CATEGORY_IDS

    def __init__(
        self,
        *,
        num_train: int = 2000,
        num_val: int = 300,
        fresh: bool = True,
        style: dict[str, Any] | None = None,
        image_size: int = 300,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        for what, count in (("num_train", num_train), ("num_val", num_val)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{what} {count!r}: expected a whole number of at least 1 (data.{what})")
        self.num_train = num_train
        self.num_val = num_val
        self.fresh = fresh
        self.style = make_style(style)
        self._truth: dict[str, Any] | None = None

    def load(self, train: bool) -> DigitScenes:
        count = self.num_train if train else self.num_val
        return DigitScenes(count, self.image_size, train=train, style=self.style, seed=self.seed, fresh=self.fresh)

    def ground_truth(self) -> dict[str, Any]:
        if self._truth is None:
            self._truth = coco_form(self.load(train=False))
        return self._truth


def make_style(style: dict[str, Any] | None) -> SceneStyle:
    """The style with some of its values replaced.

    Raises:
        ValueError: there is no such value, or it cannot work.
    """
    chosen = dict(style or {})
    known = list(SceneStyle.__dataclass_fields__)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"data.style has no {', '.join(unknown)}; it has {', '.join(known)}")
    if "size" in chosen:
        chosen["size"] = tuple(chosen["size"])
    try:
        return SceneStyle(**chosen)
    except ValueError as error:
        raise ValueError(f"data.style.{error}") from None


def coco_form(scenes: DigitScenes, save: Callable[[Image.Image, str], None] | None = None) -> dict[str, Any]:
    """The scenes of the first epoch as a COCO annotation file; each is handed to `save` with its file name, if given.

    A digit's `area` is that of its box; there are no crowds.
    """
    images, annotations = [], []
    for index in range(len(scenes)):
        scene = scenes.scene((0, index))
        name = f"{index + 1:06d}.png"
        if save is not None:
            save(Image.fromarray(scene.image), name)
        size = scenes.image_size
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for (left, top, right, bottom), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "digit"}
        for number, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
    ]
    about = {"description": "Scenes of scikit-learn's handwritten digits", "version": "1"}
    return {"info": about, "images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path, parts: dict[str, DigitScenes]) -> None:
    """Writes `folder/<part>2017/*.png` and `folder/annotations/instances_<part>2017.json`, as COCO is laid out.

    Raises:
        FileExistsError: the folder holds something already.
    """
    from rich.progress import Progress

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another --out, or remove it first")
    (folder / "annotations").mkdir(parents=True)
    with Progress(disable=not sys.stderr.isatty()) as progress:
        for part, scenes in parts.items():
            images = folder / f"{part}2017"
            images.mkdir()
            task = progress.add_task(f"{part}2017", total=len(scenes))

            def save(image: Image.Image, name: str, images: Path = images, task: Any = task) -> None:
                image.save(images / name)
                progress.advance(task)

            content = coco_form(scenes, save)
            target = folder / "annotations" / f"instances_{part}2017.json"
            target.write_text(json.dumps(content, separators=(",", ":")))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m data.digit_scenes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=2000, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=300, help="held-out scenes, of other digits (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=300, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training scenes (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        made = DigitScenesDataModule(
            num_train=chosen.train, num_val=chosen.val, image_size=chosen.image_size, seed=chosen.seed
        )
        write_coco(chosen.out, {"train": made.load(train=True), "val": made.load(train=False)})
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{chosen.train} training and {chosen.val} held-out scenes of {chosen.image_size} pixels in {chosen.out}")
    print(f"Train on them: python train.py model=ssd_mobilenet_v1 data=coco data.root={chosen.out}")


if __name__ == "__main__":
    main()
