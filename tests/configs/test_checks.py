"""Checks that need more than a command line; the others are called by tests/test_mistakes.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from configs.checks import (
    check_classes,
    check_eval,
    check_pretrained,
    check_train,
    classes_of,
    without_regularization,
)
from configs.messages import UserError
from configs.resolvers import register_resolvers
from models.stopping import StopRequests, seconds

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ["cat", "dog", "owl"]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def checked(known: list[str], found: list[str], **data: Any) -> int:
    saved = OmegaConf.create({"model": {"num_classes": len(known) or None}, "class_names": known})
    cfg = OmegaConf.create({"ckpt": "last.ckpt", "pretrained": None})
    return check_classes(cfg, saved, SimpleNamespace(num_classes=len(found), class_names=tuple(found), **data))


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (NAMES, NAMES),
        ([], NAMES),  # a checkpoint of an earlier version, a foreign file
        (NAMES, ["0", "1", "2"]),  # shards without classes.txt
        (["0", "1", "2"], NAMES),
    ],
)
def test_classes_that_may_be_the_same(known: list[str], found: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(known, found) == checked(known, found, category_ids=(1, 2, 3)) == 3


def test_classes_in_another_order() -> None:
    for categories in ({}, {"category_ids": (1, 2, 3)}):
        with pytest.raises(UserError, match=r"another order .*class 1 is 'dog' to it and 'owl' in the data"):
            checked(NAMES, ["cat", "owl", "dog"], **categories)


def test_classes_of_other_names() -> None:
    with pytest.warns(UserWarning, match=r"last.ckpt names its classes otherwise .*'owl' to it and 'eagle owl' in"):
        assert checked(NAMES, ["cat", "dog", "eagle owl"]) == 3
    with pytest.raises(UserError, match=r"other categories than the data \(class 2 is 'owl' to it and 'bus'"):
        checked(NAMES, ["cat", "dog", "bus"], category_ids=(1, 2, 3))
    with pytest.raises(UserError, match="has 3 classes, the data 4"):
        checked(NAMES, [*NAMES, "bus"])


def test_networks_of_16_bits_are_refused(tmp_path: Path) -> None:
    for check, name, reason in ((check_train, "train", "small steps"), (check_eval, "eval", "mean loss")):
        given = ("trainer=cpu", f"paths.run={tmp_path}", *(["ckpt=last.ckpt"] if name == "eval" else []))
        check(composed(*given, "trainer.precision=64-true", name=name))
        for bits in ("16", "bf16"):
            wrong = composed(*given, f"trainer.precision={bits}-true", name=name)
            with pytest.raises(UserError, match=rf"={bits}-true: .*{reason}.* Use trainer.precision={bits}-mixed"):
                check(wrong)


def test_the_time_limit_in_both_its_forms() -> None:
    for given in ("{hours: 3}", "00:03:00:00"):
        max_time = composed(f"trainer.max_time={given}").trainer.max_time
        assert seconds(max_time) == 3 * 3600
        StopRequests(75, max_time)
    for wrong in ("{hour: 3}", "3h"):
        with pytest.raises(ValueError, match=r"expected 'DD:HH:MM:SS', such as '00:03:30:00', or \{hours: 3\}"):
            seconds(composed(f"trainer.max_time={wrong}").trainer.max_time)


def test_nothing_is_mixed_without_regularization() -> None:
    """With mixed images there would be no train/top1, which debug=overfit is there to see."""
    recipe = ("experiment=imagenet/modern_resnet18", "data.root=/x")
    for given, kept in ((), True), (("debug=overfit",), False), (("regularization=false",), False):
        cfg = composed(*recipe, *given)
        without_regularization(cfg)
        assert (cfg.task.batch_transform is not None) == (cfg.model.drop_rate > 0) == kept
    detector = composed("model=ssd_mobilenet_v1", "regularization=false")
    without_regularization(detector)
    assert "batch_transform" not in detector.task


def test_no_role_decays_without_regularization() -> None:
    """A role's own coefficient would win over weight_decay=0."""
    for given, kept in ((), {"expert": 0.1}), (("regularization=false",), {}):
        cfg = composed("+optim.optimizer.decay_by_role.expert=0.1", *given)
        without_regularization(cfg)
        assert cfg.optim.optimizer.decay_by_role == kept
    plain = composed("regularization=false")
    without_regularization(plain)
    assert "decay_by_role" not in plain.optim.optimizer


def test_a_network_has_the_classes_of_its_data() -> None:
    data = SimpleNamespace(num_classes=10)
    for given in ("model.num_classes=null", "model.num_classes=10"):
        assert classes_of(data, composed(given)) == 10
    for wrong in (7, 0):
        with pytest.raises(UserError, match=rf"model\.num_classes={wrong}, but the data has 10 classes; leave it out"):
            classes_of(data, composed(f"model.num_classes={wrong}"))
    with pytest.raises(UserError, match="=7, but the data has 10 classes; resume it on its own"):
        classes_of(data, composed("model.num_classes=7", "resume=outputs/run"))


def test_upcycling_needs_trained_weights() -> None:
    """Of random ones the experts would be nearly alike, and the run a fine-tuned one by its name alone."""
    for init in ("upcycle", "upcycle_neutral"):
        with pytest.raises(UserError, match=rf"condconv.init={init} makes experts of a trained .*: add pretrained="):
            check_pretrained(composed(f"condconv.init={init}"))
    for fine in ("pretrained=static.pth", "resume=outputs/run", "condconv.experts=0"):  # the last: its static twin
        check_pretrained(composed("condconv.init=upcycle", fine))
    with pytest.raises(UserError, match=r"new_classifier=true is for pretrained="):
        check_pretrained(composed("new_classifier=true"))
    check_pretrained(composed("new_classifier=true", "resume=outputs/run"))
    check_pretrained(composed())
