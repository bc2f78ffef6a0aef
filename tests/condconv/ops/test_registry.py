"""The list of backends, what each takes, and asking for one that cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import CPU_BACKENDS, Case

import condconv
from condconv.ops.choice import choose
from condconv.ops.registry import BACKENDS, check_name, get_backend, list_backends

DENSE = Case()
POINTWISE = Case(kernel=(1, 1))
GROUPED = Case(channels=6, out_channels=4, groups=2)
MULTIPLIER = Case(channels=3, out_channels=6, groups=3)
DEPTHWISE = Case(channels=5, out_channels=5, groups=5)


def test_names() -> None:
    assert condconv.list_backends is list_backends
    assert list_backends()[:2] == ["auto", "reference"]
    assert {"mixture", "gemm", "depthwise", "depthwise_sum", "grouped", "single"} <= set(list_backends())
    assert len(set(list_backends())) == len(list_backends())
    for key, backend in BACKENDS.items():
        assert key == backend.name
        assert backend.summary


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("mixture", [DENSE, POINTWISE, GROUPED, MULTIPLIER, DEPTHWISE]),
        ("grouped", [DENSE, POINTWISE, GROUPED, MULTIPLIER, DEPTHWISE]),
        ("gemm", [DENSE, POINTWISE, GROUPED, MULTIPLIER]),
        ("depthwise", [DEPTHWISE]),
        ("depthwise_sum", [GROUPED, MULTIPLIER, DEPTHWISE]),
    ],
)
def test_what_each_backend_takes(name: str, taken: list[Case]) -> None:
    for case in (DENSE, POINTWISE, GROUPED, MULTIPLIER, DEPTHWISE):
        assert case.supported_by(name) == (case in taken), case


def test_single_takes_every_layer_of_one_example() -> None:
    for case in (DENSE, POINTWISE, GROUPED, MULTIPLIER, DEPTHWISE):
        assert case._replace(batch=1).supported_by("single")
        assert not case._replace(batch=2).supported_by("single")
        assert choose(case._replace(batch=1).problem()).backend == "single"
    one_tap = DEPTHWISE._replace(batch=1, size=(1, 1), padding=(1, 1))
    assert choose(one_tap.problem()).backend == "depthwise", "the library runs such kernels group by group"


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_refusal_says_why_and_names_the_backend(name: str) -> None:
    for case in (DENSE, DEPTHWISE, GROUPED):
        reason = BACKENDS[name].supports(case.problem())
        if reason is None:
            assert get_backend(name, case.problem()).name == name
            continue
        with pytest.raises(ValueError, match=f"CondConv backend '{name}' cannot run this layer: ") as error:
            get_backend(name, case.problem())
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("gem", "gemm"), ("Grouped", "grouped"), ("mixtures", "mixture"), ("autos", "auto")]
)
def test_unknown_names_get_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown CondConv backend '{name}'\. Did you mean '{hint}'") as error:
        check_name(name)
    assert all(known in str(error.value) for known in list_backends())


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(ValueError, match=r"Unknown CondConv backend 'zzz'\. Available: auto"):
        check_name("zzz")


def test_one_expert_needs_no_kernels_of_examples() -> None:
    for case in (DENSE, GROUPED, DEPTHWISE._replace(kernel=(3, 3))):
        problem = case._replace(batch=8, experts=1, size=(14, 14)).problem(torch.float32, True)
        assert choose(problem).backend == "mixture"
        assert choose(replace(problem, experts=2)).backend != "mixture"
    # Where it was measured to be no faster: as with more experts.
    for case in (POINTWISE, DEPTHWISE._replace(kernel=(5, 5), padding=(2, 2))):
        problem = case._replace(batch=8, experts=1, size=(14, 14)).problem(torch.float32, True)
        assert choose(problem).backend == choose(replace(problem, experts=2)).backend != "mixture"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_auto_always_chooses_what_can_run(batch: int, dtype: torch.dtype, channels_last: bool) -> None:
    for case in (DENSE, POINTWISE, GROUPED, MULTIPLIER, DEPTHWISE):
        for size in ((3, 3), (8, 8), (28, 28)):
            problem = case._replace(batch=batch, size=size).problem(dtype, channels_last)
            choice = choose(problem)
            assert BACKENDS[choice.backend].supports(problem) is None
            assert choice.reason
