"""Which runs are averaged, which become columns, and who is whose static twin."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from run_folders import write_run, write_sweep

from reports.comparison import Comparison, compare
from reports.findings import findings
from reports.groups import EXPERTS, OF_EXPERTS, Group, identity, name_groups
from reports.runs import find_folders, read_run


def compared(root: Path, **options: Any) -> Comparison:
    return compare([read_run(folder) for folder in find_folders([root])], **options)


def labels(comparison: Comparison) -> list[str]:
    return [row.label for row in comparison.rows]


def test_seeds_are_averaged_and_paired_with_the_static_twin(tmp_path: Path) -> None:
    for seed, static, ours in ((1, 0.60, 0.61), (2, 0.50, 0.53), (3, 0.70, 0.72)):
        write_run(tmp_path, 0, seed, top1=static)
        write_run(tmp_path, 8, seed, top1=ours)
    found = compared(tmp_path)
    assert labels(found) == ["static", "8 experts"]
    static, ours = found.rows
    assert (static.value.n, round(static.value.mean, 6)) == (3, 60.0)
    assert static.difference is None and ours.baseline is static
    assert ours.difference is not None
    # Paired, 1, 3 and 2 points: the spread between seeds, ten points, is not in it.
    assert round(ours.difference.mean, 6) == 2.0
    assert ours.difference.half_width is not None and round(ours.difference.half_width, 3) == 2.484
    assert ours.ratio("params") == 9.0


def test_only_common_seeds_are_paired(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 1, top1=0.5)
    write_run(tmp_path, 8, 1, top1=0.6)
    write_run(tmp_path, 8, 2, top1=0.9)
    row = compared(tmp_path).rows[1]
    assert row.difference is not None and (row.difference.n, round(row.difference.mean, 6)) == (1, 10.0)
    assert row.difference.low is None, "one pair has no interval"


def test_a_duplicate_is_named_and_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 1, top1=0.5, folder="first", ended="2026-01-31T10:00:00+00:00")
    write_run(tmp_path, 0, 1, top1=0.9, folder="second", ended="2026-01-31T12:00:00+00:00")
    found = compared(tmp_path)
    assert [round(row.value.mean, 6) for row in found.rows] == [90.0]
    assert [run.folder.name for run in found.left_out] == ["first"]
    assert "duplicate of second" in found.left_out[0].reason and "other figures" in found.left_out[0].reason


def test_the_differing_setting_is_the_column(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 1)
    for routing in ("fc", "softmax"):
        write_run(tmp_path, 8, 1, overrides={"condconv.routing": routing})
    found = compared(tmp_path)
    assert labels(found) == ["static", "8 experts, routing fc", "8 experts, routing softmax"]
    assert all(row.baseline is found.rows[0] for row in found.rows[1:]), "a static network has no routing"


def test_twins_agree_in_everything_else(tmp_path: Path) -> None:
    for width in (0.25, 0.5):
        for experts in (0, 8):
            write_run(tmp_path, experts, 1, top1=width, overrides={"model.width": width})
    write_run(tmp_path, 4, 1, overrides={"model.width": 1.0})
    found = compared(tmp_path)
    twins = {row.label: row.baseline.label if row.baseline else None for row in found.rows}
    assert twins == {
        "static, width 0.25": None,
        "static, width 0.5": None,
        "4 experts, width 1": None,
        "8 experts, width 0.25": "static, width 0.25",
        "8 experts, width 0.5": "static, width 0.5",
    }


@pytest.mark.parametrize("setting", ["lr_factor_by_role", "decay_by_role"])
def test_rates_of_routers_and_experts_touch_no_static_network(setting: str, tmp_path: Path) -> None:
    key = f"optim.optimizer.{setting}"
    write_run(tmp_path, 0, 1)
    for role in ("router", "expert"):
        write_run(tmp_path, 8, 1, folder=role, overrides={key: {role: 0.5}})
    write_run(tmp_path, 8, 1, folder="norm", overrides={key: {"norm": 0.5}})
    write_run(tmp_path, 0, 1, folder="same", overrides={key: {"router": 0.5}}, ended="2026-02-01T00:00:00+00:00")
    found = compared(tmp_path)
    assert [run.folder.name for run in found.left_out] == ["mobilenet_v1-e0-s1"], "the same network with the same seed"
    paired = {row.group.runs[0].folder.name: row.baseline is not None for row in found.rows}
    assert paired == {"same": False, "router": True, "expert": True, "norm": False}


def twins_of(root: Path, *runs: tuple[int, dict[str, Any]]) -> dict[str, str | None]:
    """Weights of each group with experts -> those of its twin."""
    for index, (experts, overrides) in enumerate(runs):
        write_run(root, experts, 1, folder=f"run-{index}", overrides=overrides)
    weights = [(row.baseline and row.baseline.group.settings, row.group.settings) for row in compared(root).rows]
    return {ours["pretrained"]: twin and twin["pretrained"] for twin, ours in weights if ours["condconv.experts"]}


def test_weights_of_a_network_with_experts_have_their_static_counterpart(tmp_path: Path) -> None:
    """No static network can start from them, as in the rows of experiment/coco."""
    static, scratch = (0, {"pretrained": "static.ckpt"}), (0, {"pretrained": None})
    ours = (8, {"pretrained": "experts.ckpt", "condconv.init": "network"})
    assert twins_of(tmp_path / "pair", static, ours, scratch) == {"experts.ckpt": "static.ckpt"}
    assert twins_of(tmp_path / "scratch", scratch, ours) == {"experts.ckpt": None}
    another = (0, {"pretrained": "other.ckpt"})
    assert twins_of(tmp_path / "two", static, another, ours) == {"experts.ckpt": None}, "which of them, nobody knows"


def test_upcycled_networks_start_from_the_weights_of_their_twin(tmp_path: Path) -> None:
    statics = [(0, {"pretrained": name}) for name in ("a.ckpt", "b.ckpt")]
    ours = [(8, {"pretrained": name, "condconv.init": "upcycle"}) for name in ("a.ckpt", "c.ckpt")]
    assert twins_of(tmp_path, *statics, *ours) == {"a.ckpt": "a.ckpt", "c.ckpt": None}


def test_names_and_folders_of_runs_are_no_settings(tmp_path: Path) -> None:
    for seed, folder in ((1, "adam"), (2, "w")):  # parts of "adamw" and "width"
        write_run(tmp_path, 0, seed, folder=folder)
    found = compared(tmp_path)
    assert [row.value.n for row in found.rows] == [2]
    assert found.rows[0].group.settings["optim.optimizer.name"] == "adamw"
    assert found.rows[0].group.settings["callbacks.checkpoint.dirpath"] == "<run>/checkpoints"


def test_runs_of_before_a_setting_was_there_are_the_same_training(tmp_path: Path) -> None:
    older = write_run(tmp_path, 0, 1, overrides={"callbacks.checkpoint.mode": "max"})
    write_run(tmp_path, 0, 2, overrides={"regularization": True, "callbacks.checkpoint.mode": None})
    write_run(tmp_path, 0, 3, overrides={"regularization": False})
    assert "regularization" not in (older / "config.yaml").read_text()
    found = compared(tmp_path)
    assert found.columns == ["regularization"]
    assert {row.group.settings["regularization"]: row.value.n for row in found.rows} == {True: 2, False: 1}


def test_derived_settings_do_not_become_columns(tmp_path: Path) -> None:
    for lr in (0.001, 0.002):
        write_run(tmp_path, 0, 1, overrides={"optim.lr": lr})
    for folder in tmp_path.iterdir():
        text = (folder / "config.yaml").read_text()
        if "lr: 0.002" in text:  # as if optim.optimizer.lr were ${optim.lr}
            (folder / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    found = compared(tmp_path)
    assert found.columns == ["optim.lr"]
    assert found.following == ["optim.optimizer.lr"]


@pytest.mark.parametrize("together", [True, False])
def test_settings_typed_for_different_runs_are_all_columns(together: bool, tmp_path: Path) -> None:
    """Epochs of one pair of runs and augmentation of the other are two changes; typed for both, they go together."""
    first, second = {"data.augment": "autoaugment"}, {"trainer.max_epochs": 50}
    if together:
        first, second = {**first, "trainer.max_epochs": 8}, {**second, "data.augment": "none"}
    for change in (first, second):
        write_run(tmp_path, 0, 1, overrides=change)
        write_run(tmp_path, 8, 1, overrides=change)
    found = compared(tmp_path)
    assert found.columns == ["condconv.experts", "data.augment", *([] if together else ["trainer.max_epochs"])]
    assert "trainer.max_epochs" in found.following or not together
    assert len({row.group.label for row in found.rows}) == 4


def test_names_leave_out_what_most_groups_have(tmp_path: Path) -> None:
    changes = ({}, {"condconv.router_gain": 0.0}, {"condconv.init": "independent"}, {"optim.lr": 0.5})
    given = {"condconv.router_gain": 1.0, "condconv.init": "network", "optim.lr": 0.1}
    write_run(tmp_path, 0, 1, overrides=given)
    for change in changes:
        write_run(tmp_path, 8, 1, overrides={**given, **change})
    names = {row.group.label for row in compared(tmp_path).rows}
    assert names == {
        *("static", "8 experts", "8 experts, router gain 0", "8 experts, init independent", "8 experts, lr 0.5")
    }


def test_names_tell_all_groups_apart() -> None:
    """Whatever differs, and whatever some of them lack."""
    random = Random(5)
    keys = ("condconv.routing", "model.width", "optim.optimizer.lr_factor_by_role.router", "data.augment")
    for _ in range(300):
        found = {}
        for _ in range(random.randrange(2, 9)):
            experts = random.choice((0, 8))
            settings = {key: random.choice((1, 1, 2)) for key in keys if random.random() < 0.7}
            settings = {k: v for k, v in settings.items() if experts or not OF_EXPERTS.match(k)} | {EXPERTS: experts}
            found[identity(settings)] = Group(settings)
        groups = list(found.values())
        name_groups(groups)
        assert len({group.label for group in groups}) == len(groups), [(g.label, g.settings) for g in groups]


def test_static_runs_ignore_settings_of_the_experts(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 1, overrides={"condconv.routing": "fc"})
    write_run(tmp_path, 0, 1, overrides={"condconv.routing": "softmax"}, ended="2026-02-01T00:00:00+00:00")
    found = compared(tmp_path)
    assert len(found.rows) == 1 and len(found.left_out) == 1, "the same network with the same seed"


def test_a_chosen_baseline(tmp_path: Path) -> None:
    write_sweep(tmp_path, experts=(0, 1, 8), seeds=(1, 2))
    found = compared(tmp_path, baseline="experts=1")
    assert found.baseline == "1 expert"
    assert [row.baseline.label if row.baseline else None for row in found.rows] == ["1 expert", None, "1 expert"]


def test_losses_are_better_when_lower(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, 0, seed, figures={"test/loss": 1.0 + seed / 100})
        write_run(tmp_path, 8, seed, figures={"test/loss": 0.9 + seed / 100 + seed / 1000})
    found = compared(tmp_path)
    row = found.rows[1]
    assert found.metric.name == "test/loss" and row.difference is not None
    assert row.difference.mean < 0 and found.metric.better(row.difference) == "better"


def test_equal_differences_are_not_taken_for_certainty(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, 0, seed, top1=0.5)
        write_run(tmp_path, 8, seed, top1=0.625)
    found = findings(compared(tmp_path))
    assert any(each.kind == "caution" and "says nothing about noise: 8 experts" in each.text for each in found)


def test_bad_news_stands_first_and_overfitting_is_said(tmp_path: Path) -> None:
    for seed, noise in ((1, 0.0), (2, 0.001), (3, 0.002)):
        write_run(tmp_path, 0, seed, top1=0.5, figures={"test/top1": 0.5, "train/top1": 0.6})
        worse = {"test/top1": 0.4 + noise, "train/top1": 0.8 + noise}
        write_run(tmp_path, 8, seed, figures=worse)
        write_run(tmp_path, 4, seed, figures={"test/top1": 0.6 + noise, "train/top1": 0.6 + noise})
        write_run(tmp_path, 2, seed, figures={"test/top1": 0.5 + noise - 0.001, "train/top1": 0.6})
    found = findings(compared(tmp_path))
    told = [each.kind for each in found]
    assert told[:2] == ["summary", "worse"] and told.index("unclear") < told.index("better")
    assert found[0].text.endswith("1 worse, 1 without a difference shown, 1 better.")
    assert found[1].text.startswith("8 experts: test/top1 −9.90 points (95 % interval −10.15 to −9.65, n = 3)")
    fit = [each.text for each in found if "fitted better" in each.text]
    assert len(fit) == 1 and "8 experts +20.10 points" in fit[0] and "4 experts" not in fit[0]


def test_detection_runs_are_compared_by_their_ap(tmp_path: Path) -> None:
    for experts, value in ((0, 0.31), (8, 0.33)):
        write_run(tmp_path, experts, 1, figures={"val/AP": value, "val/AP50": 0.5, "train/loss": 2.0})
    found = compared(tmp_path)
    assert found.metric.title == "val/AP (%)"
    assert [round(row.value.mean, 6) for row in found.rows] == [31.0, 33.0]


def test_the_training_loss_is_an_epochs_not_a_batchs(tmp_path: Path) -> None:
    for experts in (0, 8):
        write_run(tmp_path, experts, 1, figures={"test/top1": 0.5, "train/loss": 9.9})
    row = compared(tmp_path).rows[1]
    assert row.train is not None
    assert row.train.mean == pytest.approx(0.59, abs=0.06), "not the last mean of the curve that write_run draws"
    assert row.train_difference is not None and row.train_difference.mean == pytest.approx(0.0, abs=1e-9)


def test_the_training_loss_may_be_what_is_compared(tmp_path: Path) -> None:
    for experts, batch in ((0, 9.9), (8, 9.0)):
        write_run(tmp_path, experts, 1, figures={"test/top1": 0.5, "train/loss": batch})
    write_run(tmp_path, 8, 2, figures={"test/top1": 0.5, "train/loss": float("nan")})
    found = compared(tmp_path, metric="train/loss")
    static, ours = (row.value.mean for row in found.rows)
    assert static == ours == pytest.approx(0.59, abs=0.06) and found.rows[1].value.n == 1
    assert found.rows[1].difference is not None and found.rows[1].difference.mean == 0
    assert "not a finite number" in found.left_out[0].reason


def test_means_over_other_seeds_are_not_set_beside_each_other(tmp_path: Path) -> None:
    write_sweep(tmp_path, experts=(0, 4, 8), seeds=(1, 2))
    write_run(tmp_path, 0, 3, top1=0.1)
    told = {each.kind: each.text for each in findings(compared(tmp_path)) if "eans of" in each.text}
    assert told["fact"].startswith("Means of test/top1 (%) by experts (seeds 1, 2) ") and "static 6" in told["fact"]
    assert told["caution"].endswith("do not differ by the difference shown: 4 experts; 8 experts.")


def test_other_commits_in_one_mean_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, 0, 1, commit="aaa")
    write_run(tmp_path, 0, 2, commit="bbb")
    assert compared(tmp_path).rows[0].cautions == ["runs of 2 commits (aaa, bbb)"]


def test_costs_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds that ran on a slower machine must not make the group that has them look slow."""
    for seed, speed in ((1, 1.0), (2, 2.0)):
        write_run(tmp_path, 0, seed, cpu_seconds=80.0 * speed)
        write_run(tmp_path, 8, seed, cpu_seconds=120.0 * speed)
    write_run(tmp_path, 4, 1, cpu_seconds=100.0)
    write_run(tmp_path, 2, 3, cpu_seconds=60.0)
    rows = {row.group.experts: row for row in compare([read_run(folder) for folder in sorted(tmp_path.iterdir())]).rows}
    ratios = {experts: row.ratio("cpu_seconds_per_epoch") for experts, row in rows.items()}
    assert ratios == {0: None, 2: pytest.approx(0.5), 4: pytest.approx(1.25), 8: pytest.approx(1.5)}
    assert rows[4].ratio("params") == 5
