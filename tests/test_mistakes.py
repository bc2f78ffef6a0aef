"""What a new user gets wrong: one clear message each, a non-zero exit, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import TINY, Commands

TRAIN_MISTAKES = {
    "unknown model": ("model=efficientnet_b1", "Did you mean 'efficientnet_b0'?", "mobilenet_v2"),
    "unknown data": ("data=cifar", "Did you mean 'cifar10'?", "imagenet"),
    "unknown logger": ("logger=wandby", "Did you mean 'wandb'?"),
    "group misspelt": ("modle=resnet50", "no setting 'modle'", "Did you mean 'model'?"),
    "key misspelt": ("condconv.expert=4", "Did you mean 'condconv.experts'?"),
    "key without its group": ("experts=4", "Did you mean 'condconv.experts'?"),
    "key of other data": ("data.root=/x", "no setting 'data.root' with the chosen data=", "cifar100", "data=imagenet"),
    "argument that no file lists": ("optim.schedule.milestones=[30,60]", "plus sign", "+optim.schedule.milestones=..."),
    "no equals sign": ("efficientnet_b0", "Cannot read the argument 'efficientnet_b0'", "key=value"),
    "list without quotes": ("condconv.layers=[a=1]", "needs quotes", """'condconv.layers=["..."]'"""),
    "negative experts": ("condconv.experts=-1", "condconv.experts=-1", "whole number from 0"),
    "fractional experts": ("condconv.experts=2.5", "condconv.experts=2.5", "whole number"),
    "experts as a word": ("condconv.experts=eight", "condconv.experts=eight", "whole number"),
    "no number of experts": ("condconv.experts=", "condconv.experts=", "whole number"),
    "routing misspelt": ("condconv.routing=softmx", "Did you mean 'softmax'?", "hierarchical"),
    "backend misspelt": ("condconv.backend=gruped", "Did you mean 'grouped'?", "mixture"),
    "dropout in percent": ("condconv.dropout=20", "condconv.dropout=20", "below 1"),
    "temperature zero": ("condconv.temperature=0", "condconv.temperature=0", "above 0"),
    "placement misspelt": ("condconv.placement=last3", "placement 'last3'", "last3stages"),
    "layers misspelt": ("condconv.layers=depthwize", "depthwize"),
    "image size 8": ("data.image_size=8", "32 pixels is the smallest"),
    "batch larger than the data": ("data.batch_size_per_device=2000", "larger than the 1438 training images"),
    "batch of nothing": ("data.batch_size_per_device=0", "batch_size_per_device"),
    "recipe without its folder": (
        "experiment=mobilenet_v1_static",
        "no experiment=mobilenet_v1_static.",
        "Did you mean 'imagenet/mobilenet_v1_static'?",
        "cifar10/..., cifar10_authors_miniature, coco/...,",
    ),
    "recipe misspelt": (
        "experiment=imagenet/resnet50_sttic",
        "no experiment=imagenet/resnet50_sttic.",
        "Did you mean 'imagenet/resnet50_static'?",
        "Choose one of: imagenet/efficientnet_b0_condconv4,",
    ),
    "batch larger than the recipe's step": (
        "experiment=imagenet/resnet50_static data.root=. data.batch_size_per_device=2048",
        "data.batch_size_per_device=2048 on 1 device(s) is 2048 images at once",
        "set it lower",
    ),
    "no accumulation": ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0", "at least 1"),
    "no data.root": ("data=imagenet", "data.root must be given", "data.root=..."),
    "classes of other data": ("model.num_classes=7", "=7, but the data has 10 classes", "leave it out"),
    "wrong data.root": ("data=imagefolder data.root=/no/such/folder", "/no/such/folder", "data.root"),
    "data set not downloaded": ("data=cifar10 data.root=/no/such/folder", "/no/such/folder", "download"),
    "wrong data.root of COCO": ("model=ssd_mobilenet_v1 data=coco data.root=/no/such", "/no/such", "data.root"),
    "no files of a COCO set": ("model=ssd_mobilenet_v1 data=coco_json", "data.train_images", "must be given"),
    "data that an experiment is not for": (
        "experiment=cifar10/reduced data=cifar10 data.root=/no/such",
        "data=cifar10 has no data.num_classes, data.train_crop, ",
        "experiment=cifar10/reduced",
        "~data.num_classes ~data.train_crop",
    ),
    "argument that nothing has": (
        "+trainer.max_epoch=3",
        "trainer=auto has no trainer.max_epoch,",
        "Did you mean 'trainer.max_epochs'?",
        "~trainer.max_epoch",
    ),
    "boxes for a classifier": ("data=digit_scenes", "classifies images", "model=ssd_"),
    "images for a detector": ("model=ssd_mobilenet_v1 data=digits", "learns from boxes", "data=digit_scenes"),
    "augmentation misspelt": ("model=ssd_mobilenet_v1 data=coco data.root=. data.augment=sdd", "sdd", "flip"),
    "normalisation misspelt": ("data.normalize=imgnet", "imgnet", "imagenet"),
    "data of eval.py": ("data=as_trained", "data=digits"),
    "average left out": (
        "callbacks.checkpoint.monitor=val_ema/top1",
        "without callbacks.average no averaged weights",
        "monitor=val/top1",
    ),
    "monitor misspelt": ("monitor=val/top_1", "monitor=val/top_1", "Choose one of: val/top1, val/top5, val/loss"),
    "no GPU": ("trainer=gpu", "no GPU", "trainer=cpu"),
    "more devices than there are": (
        "trainer.devices=64",
        "trainer.devices=64",
        "this machine has",
        "precision=32-true",
    ),
    "no epochs": ("trainer.max_epochs=0", "trainer.max_epochs=0", "at least 1"),
    "no batches": ("trainer.limit_train_batches=0", "limit_train_batches=0", "use eval.py to evaluate alone"),
    "precision misspelt": ("trainer.precision=half", "half", "16-mixed"),
    "negative learning rate": ("optim.lr=-0.1", "optim.lr=-0.1", "above 0"),
    "optimiser misspelt": ("optim.optimizer.name=adamv", "adamv", "adamw"),
    "schedule misspelt": ("optim.schedule.name=cosin", "cosin", "cosine"),
    "negative seed": ("seed=-1", "seed=-1", "whole number"),
    "smoothing of 1.5": ("task.label_smoothing=1.5", "task.label_smoothing=1.5", "below 1"),
    "no architecture": ("model=timm", "model.arch must be given"),
    "unknown architecture": ("model=timm model.arch=resnet999 model.pattern=layer4.*", "resnet999"),
    "pattern without a match": ("model=timm model.arch=resnet18 model.pattern=nothing.*", "nothing.*"),
    "API key on the command line": ("+logger.wandb.api_key=abc", "looks like a secret", "wandb login"),
    "W&B mode misspelt": ("logger=wandb logger.wandb.mode=onlin", "onlin", "offline"),
    "upcycling of nothing": ("condconv.init=upcycle", "condconv.init=upcycle", "add pretrained=..."),
    "resume from nothing": ("resume=no/such/run", "no/such/run", "not the folder of a run"),
}

# Mistakes that torch sees no difference in on a machine with GPUs.
NEEDS_NO_GPU = {"no GPU"}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "outputs", monkeypatch, capsys)


def assert_one_message(code: int, err: str, fragments: tuple[str, ...]) -> None:
    assert code == 1
    assert err.count("error: ") == 1, err
    message = err[err.index("error: ") :]
    assert len(message.strip().splitlines()) <= 3, message
    assert "Traceback" not in err and "mistake in the code" not in err, err
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_train_names_the_mistake(mistake: str, commands: Commands) -> None:
    if mistake in NEEDS_NO_GPU and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, *fragments = TRAIN_MISTAKES[mistake]
    tiny = [] if "model=" in arguments or "logger=" in arguments else ["logger=none"]
    code, _, err = commands.train(*tiny, *arguments.split())
    assert_one_message(code, err, tuple(fragments))
    # Found before anything is written that looks like a run.
    assert not list(commands.outputs.rglob("*.ckpt")) and not list(commands.outputs.rglob("wandb"))


def test_a_run_folder_that_cannot_be_written(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, err = commands.train(f"paths.outputs={tmp_path / 'file'}")
    assert_one_message(code, err, ("output folder", str(tmp_path / "file"), "paths.outputs"))


def make_image_folder(root: Path, train: dict[str, int], val: dict[str, int]) -> None:
    from PIL import Image

    for part, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 40), (index, 90, 120)).save(folder / f"{index}.png")


@pytest.mark.parametrize(
    ("train", "val", "fragments"),
    [
        ({"cat": 4, "dog": 0}, {"cat": 1, "dog": 1}, ("empty class", "dog")),
        ({"cat": 0}, {"cat": 1}, ("no images",)),
        ({"cat": 4, "dog": 4}, {"cat": 1, "emu": 1}, ("emu", "train")),
        ({"cat": 8}, {"cat": 1}, ("at least 2 classes",)),
    ],
    ids=["empty class", "no images", "class in val alone", "one class"],
)
def test_image_folders(train: dict, val: dict, fragments: tuple[str, ...], commands: Commands, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", train, val)
    code, _, err = commands.train(
        *TINY,
        "data=imagefolder",
        f"data.root={tmp_path / 'images'}",
        "data.image_size=32",
        "data.batch_size_per_device=2",
    )
    assert_one_message(code, err, fragments)


EVAL_MISTAKES = {
    "no ckpt": ("", "ckpt must be given", "ckpt=..."),
    "missing ckpt": ("ckpt=no/such/last.ckpt", "no checkpoint no/such/last.ckpt"),
    "folder without checkpoints": ("ckpt=empty", "no checkpoint in the folder empty"),
    "a text file": ("ckpt=text.ckpt", "text.ckpt", "not a checkpoint of train.py"),
    "an empty file": ("ckpt=nothing.ckpt", "nothing.ckpt", "not a checkpoint of train.py"),
    "bare weights": ("ckpt=weights.ckpt", "weights.ckpt", "no 'state_dict'"),
    "another's checkpoint": ("ckpt=foreign.ckpt", "foreign.ckpt", "holds no config"),
    "key misspelt": ("cpkt=text.ckpt", "Did you mean 'ckpt'?"),
    "group of train.py": ("ckpt=text.ckpt condconv.experts=4", "condconv.experts=", "comes from the checkpoint"),
    "weights without data": ("pretrained=weights.ckpt model=resnet18", "pretrained= needs a data set", "data=digits"),
    "weights and checkpoint": ("pretrained=weights.ckpt ckpt=text.ckpt", "exclude each other"),
    "weights without model": ("pretrained=weights.ckpt data=digits", "weights.ckpt", "model="),
    "weights of another net": ("pretrained=weights.ckpt data=digits model=resnet18 condconv.experts=0", "1 unknown"),
}


@pytest.mark.parametrize("mistake", EVAL_MISTAKES)
def test_eval_names_the_mistake(mistake: str, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "nothing.ckpt").touch()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "foreign.ckpt")
    arguments, *fragments = EVAL_MISTAKES[mistake]
    code, _, err = commands.eval(*arguments.split())
    assert_one_message(code, err, tuple(fragments))


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_a_traceback_for_who_wants_one(wanted: str, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", wanted)
    code, _, err = commands.train("condconv.experts=-1")
    assert code == 1 and "error: condconv.experts=-1" in err
    assert ("Traceback" in err) == (wanted == "1"), err
