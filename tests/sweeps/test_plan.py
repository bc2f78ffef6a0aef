"""Which jobs a sweep has, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from configs.messages import UserError
from sweeps.folder import save_plan
from sweeps.names import LONGEST, job_name, unique_names
from sweeps.plan import make_plan, select, varied

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["condconv.experts=8", "seed=1"], "experts-8_seed-1"),
        (["seed=1", "condconv.experts=8"], "experts-8_seed-1"),
        (
            ["condconv.layers=[depthwise,pointwise]", "condconv.classifier=false"],
            "layers-depthwise+pointwise_classifier-false",
        ),
        (["+model.width=0.25"], "width-0.25"),
        (["optim=sgd"], "optim-sgd"),
    ],
)
def test_names_are_readable(overrides: list[str], name: str) -> None:
    assert job_name(overrides) == name


@pytest.mark.parametrize(
    "value", ["/data/a b.pth", "../..", "ünï", "a:b|c", "x" * 300, "", "{a: 1, b: [2]}", "'quoted'", "a/b", "a\\b"]
)
def test_names_are_safe_for_every_disk(value: str) -> None:
    name = job_name([f"pretrained={value}"])
    assert SAFE.fullmatch(name) and len(name) <= LONGEST and not name.endswith((".", "-", " "))


def test_what_safe_letters_cannot_tell_apart_a_hash_does() -> None:
    names = unique_names([["a=x/y"], ["a=x:y"], ["a=x_y"], ["b=M"], ["b=m"]])
    assert len({name.casefold() for name in names}) == 5
    assert job_name(["a=x/y"]) == names[0], "a job's name depends on itself alone"


def names(*arguments: str, **options: object) -> list[str]:
    return [job.name for job in make_plan(arguments, **options).jobs]


def test_every_combination() -> None:
    plan = make_plan(["condconv.experts=0,8", "seed=range(1,4)", "model=resnet18"])
    assert plan.fixed == ("model=resnet18",)
    assert [job.name for job in plan.jobs] == [f"experts-{e}_seed-{s}" for e in (0, 8) for s in (1, 2, 3)]
    assert plan.command_line(plan.jobs[-1]) == ["model=resnet18", "condconv.experts=8", "seed=3"]


def test_the_command_line_replaces_what_the_file_varies() -> None:
    params = {"seed": "1,2,3", "condconv.experts": [0, 8]}
    assert len(names(params=params)) == 6
    assert names("seed=7", params=params) == ["experts-0_seed-7", "experts-8_seed-7"]
    assert len(names("optim.lr=0.1,0.2", params=params)) == 12
    params = {"seed": "1,2,3", "condconv.experts": [0, 8], "model.width": [1.0]}
    given = ("model.width=1.0,2.0", "seed=1,2", "condconv.experts=8")
    expected = [f"experts-8_width-{width}_seed-{seed}" for seed in (1, 2) for width in ("1.0", "2.0")]
    assert names(*given, params=params) == expected, "in the file's order, so that a larger sweep finds its jobs again"


def test_values_of_yaml_are_those_of_the_command_line() -> None:
    params = {"condconv.placement": [None, "all"], "test": [True], "x.list": [[1, None], [3]], "x.one": None}
    plan = make_plan([], params=params)
    parsed = [OverridesParser.create().parse_overrides(list(job.overrides)) for job in plan.jobs]
    values = [tuple(override.value() for override in overrides) for overrides in parsed]
    assert values == [(p, True, x, None) for p in (None, "all") for x in ([1, None], [3])]


def test_what_belongs_to_the_sweep_is_not_passed_on() -> None:
    own = ["sweep=experts", "sweep_dir=/x", "retry_failed=true", "launcher=joblib", "hydra.sweeper.launcher.n_jobs=3"]
    plan = make_plan([*own, "seed=1,2"])
    assert plan.fixed == () and [job.overrides for job in plan.jobs] == [("seed=1",), ("seed=2",)]


def test_callbacks_that_change_the_training_make_another_sweep(tmp_path: Path) -> None:
    arguments = ["model=resnet18", "condconv.experts=0,8"]
    save_plan(tmp_path, make_plan(arguments))
    save_plan(tmp_path, make_plan([*arguments, "callbacks.routing=null", "logger=csv", "callbacks=none"]))
    for other in ("callbacks.batchnorm.examples=4", "+callbacks.average.decay=0.9", "optim.base_lr=0.1"):
        with pytest.raises(UserError, match="other settings"):
            save_plan(tmp_path, make_plan([*arguments, other]))


def test_what_varies() -> None:
    plan = make_plan(["condconv.experts=0,8", "seed=1,2", "model=resnet18"], variants=[["data=digits"]])
    assert varied(plan) == {"condconv.experts", "seed"}


def test_jobs_by_name() -> None:
    plan = make_plan(["condconv.experts=0,8,16", "seed=1,2"])
    assert select(plan, None) is plan
    assert [job.name for job in select(plan, "experts-8_*").jobs] == ["experts-8_seed-1", "experts-8_seed-2"]
    chosen = select(plan, ["experts-16_seed-2", "*-0_seed-1", "*_seed-1"])
    assert [job.name for job in chosen.jobs] == [
        f"experts-{e}" for e in ("0_seed-1", "8_seed-1", "16_seed-1", "16_seed-2")
    ]
    assert chosen.fixed == plan.fixed
    with pytest.raises(UserError, match=r"only=experts-4_\*: no job has such a name.*experts-0_seed-1"):
        select(plan, ["*-0_*", "experts-4_*"])


@pytest.mark.parametrize(
    ("arguments", "fixed"),
    [
        ([], ("model=mobilenet_v1", "model.width=0.25", "compile=false")),
        (["model=resnet18"], ("compile=false", "model=resnet18")),
        (["model.width=0.5"], ("model=mobilenet_v1", "compile=false", "model.width=0.5")),
        (["experiment=imagenet/x"], ("experiment=imagenet/x",)),
    ],
)
def test_settings_that_hold_unless_given(arguments: list[str], fixed: tuple[str, ...]) -> None:
    defaults = {"model": "mobilenet_v1", "model.width": 0.25, "compile": False}
    assert make_plan(arguments, unless_given=defaults).fixed == fixed


def test_variants_are_alternatives_crossed_with_the_rest() -> None:
    variants = [["condconv.routing=fc"], ["condconv.routing=softmax", "condconv.temperature=3"]]
    assert names(params={"seed": "1,2"}, variants=variants) == [
        "routing-fc_seed-1",
        "routing-softmax_temperature-3_seed-1",
        "routing-fc_seed-2",
        "routing-softmax_temperature-3_seed-2",
    ]
    # A key of theirs on the command line replaces them all.
    assert names("condconv.routing=single,fc", params={"seed": "1"}, variants=variants) == [
        "routing-single_seed-1",
        "routing-fc_seed-1",
    ]


def test_kept_variants_win_over_the_command_line() -> None:
    variants = [["trainer.max_epochs=50"], ["data.augment=none"]]
    plan = make_plan(["seed=1", "trainer.max_epochs=2"], variants=variants, keep_variants=True)
    assert [plan.command_line(job) for job in plan.jobs] == [
        ["seed=1", "trainer.max_epochs=50"],
        ["seed=1", "trainer.max_epochs=2", "data.augment=none"],
    ]
    with pytest.raises(UserError, match=r"max_epochs=2,3: this sweep varies trainer\.max_epochs itself"):
        make_plan(["trainer.max_epochs=2,3"], variants=variants, keep_variants=True)


def test_each_combination_has_one_static_twin() -> None:
    options = {"params": {"seed": "1,2", "condconv.routing": "fc,softmax"}, "static_twin": True}
    twins = [name for name in names(**options) if name.startswith("experts-0")]
    assert names(**options) == [
        "experts-0_seed-1",
        "routing-fc_seed-1",
        "routing-softmax_seed-1",
        "experts-0_seed-2",
        "routing-fc_seed-2",
        "routing-softmax_seed-2",
    ]
    assert len(twins) == 2
    # What is no property of the experts is kept: the twin of each width has that width.
    widths = names("model.width=0.5,1.0", "condconv.experts=8", static_twin=True)
    assert widths == ["experts-0_width-0.5", "width-0.5", "experts-0_width-1.0", "width-1.0"]
    # Nothing is added where the twin is there already, or where all are static.
    assert names("condconv.experts=0,8", static_twin=True) == ["experts-0", "experts-8"]
    assert names("condconv.experts=0", "seed=1,2", static_twin=True) == ["experts-0_seed-1", "experts-0_seed-2"]


def test_a_twins_own_setting_replaces_the_shared_one() -> None:
    plan = make_plan(["condconv.experts=8", "seed=1,2"], static_twin=True)
    assert plan.fixed == ("condconv.experts=8",)
    assert plan.command_line(plan.jobs[0]) == ["condconv.experts=0", "seed=1"]


def test_intervals_are_for_searches() -> None:
    with pytest.raises(UserError, match=r"interval.*hparams_search=optuna"):
        make_plan(["optim.lr=interval(0.1,1.0)"])
