"""Schedules against independent computations, step by step, and through LambdaLR with a resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.optim import keep_settings
from models.schedules import SCHEDULES, Schedule, StepSchedule, build_schedule

IMAGES, BATCH = 1281167, 2048
STEPS_PER_EPOCH = IMAGES / BATCH


def authors_rate(step: int, initial: float, total_steps: float, kind: str) -> np.float32:
    """The authors' `build_learning_rate` in float32, with TensorFlow's formula of exponential_decay spelt out."""
    step32 = np.float32(step)
    if kind == "exponential":
        exponent = np.floor(step32 / np.float32(STEPS_PER_EPOCH * 2.4))
        rate = np.float32(initial) * np.power(np.float32(0.97), exponent)
    else:
        rate = 0.5 * initial * (1 + np.cos(np.float32(np.pi) * step32 / np.float32(total_steps)))
    warmup_steps = int(5 * STEPS_PER_EPOCH)
    if step < warmup_steps:
        rate = np.float32(initial) * step32 / np.float32(warmup_steps)
    return np.float32(rate)


@pytest.mark.parametrize(("name", "kind"), [("exponential_staircase", "exponential"), ("cosine", "cosine")])
def test_equals_the_authors_learning_rate_at_every_step(name: str, kind: str) -> None:
    initial = 0.016 * BATCH / 256
    schedule = build_schedule(name, steps_per_epoch=STEPS_PER_EPOCH, total_epochs=350, warmup_epochs=5)
    total_steps = 350 * STEPS_PER_EPOCH
    # Every step of the first 20 epochs (warm-up and the first drops), then samples to the end.
    steps = [*range(int(20 * STEPS_PER_EPOCH)), *range(int(20 * STEPS_PER_EPOCH), int(total_steps), 997)]
    ours = np.array([initial * schedule(step) for step in steps])
    theirs = np.array([authors_rate(step, initial, total_steps, kind) for step in steps])
    # The authors' cosine cancels in float32 near its end: an absolute tolerance of one unit of 1 + cos there.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=initial * 2**-23)


def test_the_first_drop_comes_where_the_warm_up_would_have_hidden_it() -> None:
    schedule = build_schedule("exponential_staircase", steps_per_epoch=100, total_epochs=350, warmup_epochs=5)
    assert schedule(0) == 0
    assert schedule(499) == pytest.approx(0.998)
    # The decay counts from step 0: two drops (at 240 and 480) are already behind when the ramp ends.
    assert schedule(500) == pytest.approx(0.97**2)
    assert schedule(719) == pytest.approx(0.97**2)
    assert schedule(720) == pytest.approx(0.97**3)


def test_steps_fall_at_their_milestones() -> None:
    schedule = build_schedule("step", steps_per_epoch=10, total_epochs=9, milestones=[3, 6], decay_rate=0.1)
    factors = [schedule(step) for step in (0, 29, 30, 59, 60, 89, 500)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_cosine_ends_at_its_floor_and_stays_there() -> None:
    schedule = build_schedule("cosine", steps_per_epoch=10, total_epochs=4, min_factor=0.1)
    assert schedule(0) == 1
    assert schedule(20) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(40) == schedule(1000) == pytest.approx(0.1)


def test_constant_with_warm_up() -> None:
    schedule = build_schedule("constant", steps_per_epoch=4, total_epochs=2, warmup_epochs=1)
    assert [schedule(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def scheduler(schedule: Schedule, rate: float = 0.5) -> StepSchedule:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    keep_settings(optimizer)
    return StepSchedule(optimizer, schedule)


def rates(lr_scheduler: StepSchedule, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(lr_scheduler.optimizer.param_groups[0]["lr"])
        lr_scheduler.optimizer.step()
        lr_scheduler.step()
    return seen


def resumed(before: StepSchedule, now: StepSchedule) -> StepSchedule:
    now.optimizer.load_state_dict(before.optimizer.state_dict())
    now.load_state_dict(before.state_dict())
    return now


def test_a_warm_up_that_leaves_nothing_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    build_schedule("cosine", steps_per_epoch=5, total_epochs=3, warmup_epochs=2)
    build_schedule("cosine", steps_per_epoch=1, total_epochs=1)
    assert not recwarn.list
    for epochs, share in ((5, "56%"), (3, "93%")):
        message = f"warmup_epochs={epochs}, and the training has 3 epochs: .* to {share} of optim.lr"
        with pytest.warns(UserWarning, match=message):
            build_schedule("cosine", steps_per_epoch=5, total_epochs=3, warmup_epochs=epochs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_resuming_gives_the_same_rates(name: str) -> None:
    schedule = build_schedule(name, steps_per_epoch=3, total_epochs=5, warmup_epochs=1, decay_epochs=1, milestones=[2])
    whole = rates(scheduler(schedule), 15)
    first = scheduler(schedule)
    start = rates(first, 7)
    second = resumed(first, scheduler(schedule))
    assert second.state_dict() == first.state_dict()
    assert start + rates(second, 8) == whole == [0.5 * schedule(step) for step in range(15)]


def test_changed_rates_and_schedules_count_from_the_next_step() -> None:
    """A training that was made longer, and one at another rate: nothing of the old schedule is left."""
    short, long = (build_schedule("cosine", steps_per_epoch=3, total_epochs=epochs) for epochs in (2, 5))
    first = scheduler(short)
    rates(first, 6)
    assert rates(resumed(first, scheduler(long)), 3) == [0.5 * long(step) for step in (6, 7, 8)]
    assert rates(resumed(first, scheduler(long, rate=0.2)), 3) == [0.2 * long(step) for step in (6, 7, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "Unknown schedule 'linear'"),
        ({"name": "cosine", "steps_per_epoch": 0}, "must be positive"),
        ({"name": "cosine", "warmup_epochs": -1}, "warmup_epochs must be at least 0"),
        ({"name": "step"}, "needs increasing milestones"),
        ({"name": "step", "milestones": [4, 2]}, "needs increasing milestones"),
        ({"name": "cosine", "min_factor": 1.5}, "min_factor in"),
    ],
)
def test_wrong_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(**({"steps_per_epoch": 10, "total_epochs": 4} | options))
