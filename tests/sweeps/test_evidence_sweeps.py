"""The studies on CIFAR-10: their jobs, listed and not run, in an order that answers something at any time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import Commands

from condconv.routing import ROUTINGS
from sweeps.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
# Each study: the jobs of one seed, in order.
JOBS = {
    "experts": "experts-0 experts-8 experts-4 experts-16 experts-1",
    "second_backbone": "experts-0_model-resnet18_width-0.125 experts-8_model-resnet18_width-0.125",
    "router_gain": "model-mobilenet_v1_experts-8_router_gain-0.01 "
    "model-resnet18_width-0.125_experts-8_router_gain-0.01",
    "one_expert": "router_gain-0.01_experts-1 router-0.1_experts-1",
    "routing": " ".join(f"experts-8_routing-{name}" for name in ROUTINGS if name != "fc"),
    "first_block": " ".join(f"experts-8_from_block-{block}" for block in (1, 13, 10, 3)),
    "controls": "experts-0_width-0.27 experts-0_width-0.709",
    "upcycled": "experts-8 experts-0",
    "causes": "router_gain-0.0_router-0.0_experts-8 router_gain-0.0_router-0.0_model-resnet18_width-0.125_experts-8 "
    "expert-0.5_experts-8 expert-0.0_experts-8 router-10.0_experts-8 "
    "router-0.1_experts-8 expert_dropout-0.1_experts-8 init-independent_experts-8 "
    "base_lr-0.8_router-10.0_experts-8 base_lr-0.8_router_gain-5.0_experts-8 "
    "base_lr-0.8_router_gain-0.0_router-0.0_experts-8",
    "tuned": " ".join(
        f"{model}_base_lr-0.8_experts-{experts}"
        for experts in (0, 8)
        for model in ("model-resnet18_width-0.125", "model-mobilenet_v1")
    ),
    "tuning": " ".join(
        f"{model}_holdout-500_base_lr-{rate}_experts-{experts}"
        for rate in (0.8, 0.4, 1.6)
        for experts in (0, 8)
        for model in ("model-resnet18_width-0.125", "model-mobilenet_v1")
    ),
    "regimes": " ".join(
        f"{setting}_experts-{experts}"
        for experts in (0, 8)
        for setting in ("augment-autoaugment_cifar10", "max_epochs-50", "max_train_per_class-5000")
    ),
}
FAST = ("experts", "upcycled")


def test_every_study_is_here() -> None:
    found = {path.stem for path in (ROOT / "configs" / "sweep" / "cifar10").glob("*.yaml")}
    assert found == {*JOBS, "backbones"}


def test_settings_of_all_studies_leave_each_its_jobs() -> None:
    """`make evidence ARGS="... trainer.max_epochs=2"`, and other keys that the variants of a study have."""
    smaller = ["trainer.max_epochs=2", "model.width=0.1", "data.max_train_per_class=9", "condconv.router_gain=0.5"]
    with_variants = 0
    for path in (ROOT / "configs" / "sweep" / "cifar10").glob("*.yaml"):
        options = yaml.safe_load(path.read_text())["hydra"]["sweeper"]
        options = {key: value for key, value in options.items() if key in ("params", "variants", "keep_variants")}
        more = [override for override in smaller if override.partition("=")[0] not in options["params"]]
        names, again = (
            [job.name for job in make_plan(given, **options).jobs] for given in (["seed=1"], ["seed=1", *more])
        )
        assert names == again, path.stem
        with_variants += "variants" in options
    assert with_variants == 7


@pytest.mark.parametrize(
    "study", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_jobs_come_in_a_balanced_order(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for label in range(10):
        (tmp_path / "images" / "train" / f"class{label}").mkdir(parents=True)
    start = ["experiment=cifar10/reduced"]
    if study == "upcycled":
        start = ["experiment=cifar10/upcycled", "pretrained=experts-0_seed-${seed}/last.ckpt"]
    options = [*start, f"sweep=cifar10/{study}", "data.root=images", "seed=1,2", "hydra.sweeper.list_only=true"]
    code, out, err = Commands(tmp_path, monkeypatch, capsys).train("-m", *options)
    assert code == 0, err
    found = [line.split()[0] for line in out.splitlines() if "python train.py" in line]
    jobs = JOBS[study].split()
    if study == "experts":  # static and 8 experts of all seeds, the main question, before the rest
        assert found == [f"{name}_seed-{seed}" for name in jobs for seed in (1, 2)]
        return
    first = [name.removesuffix("_seed-1") for name in found[: len(jobs)]]
    assert sorted(first) == sorted(jobs) and (study == "routing" or first == jobs)
    assert found[len(jobs) :] == [name.replace("_seed-1", "_seed-2") for name in found[: len(jobs)]]
