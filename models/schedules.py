"""Learning-rate schedules as plain functions `optimiser step -> factor of the base learning rate`.

One rule for all of them, that of the authors' `build_learning_rate` (tensorflow/tpu, official/efficientnet/utils.py)
[seen]: the decay counts from step 0, and while `step < int(warmup_epochs * steps_per_epoch)` it is *overridden* by the
linear ramp `step / warmup_steps`. So the very first step has learning rate 0, and there may be a small jump where the
ramp ends.

The functions are used per optimiser step through `StepSchedule`. They hold no state: a resumed run needs only the step
count, which it saves.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[int], float]

SCHEDULES = ("constant", "cosine", "exponential_staircase", "step")


class StepSchedule(LambdaLR):
    """Multiplies every group's rate by one schedule's factor.

    From a checkpoint it takes over the step alone. torch restores the base rates and the present ones too, so that a
    resumed run would have the old rates of what was changed in its config, and one that is made longer its old schedule
    for one more step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        base_rates = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = base_rates
        pairs = zip(base_rates, self.lr_lambdas, strict=True)
        self._last_lr = [
            rate * factor(self.last_epoch) for rate, factor in pairs
        ]  # as `step` computes them, to the bit
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def build_schedule(
    name: str,
    *,
    steps_per_epoch: float,
    total_epochs: float,
    warmup_epochs: float = 0.0,
    decay_rate: float = 0.97,
    decay_epochs: float = 2.4,
    milestones: Sequence[float] = (),
    min_factor: float = 0.0,
) -> Schedule:
    """Return the schedule `name` as a function from the number of optimiser steps taken to a factor of the base rate.

    Args:
        name: one of `SCHEDULES`.
            "constant": 1.
            "cosine": `min_factor + (1 - min_factor) * (1 + cos(pi * step / total_steps)) / 2`, constant afterwards.
            "exponential_staircase": `decay_rate ** floor(step / (decay_epochs * steps_per_epoch))`, at least
            `min_factor`; the authors' schedule with 0.97 and 2.4 [seen].
            "step": `decay_rate ** (number of milestones passed)`, at least `min_factor`.
        steps_per_epoch: optimiser steps in an epoch; need not be whole (the authors: 1281167 / 2048) [seen].
        total_epochs: length of the training; only "cosine" depends on it.
        warmup_epochs: length of the linear ramp from 0; 0 for none. A warning if it is all of the training.
        milestones: epochs at which "step" decays, increasing.
        min_factor: lowest factor after the warm-up, 0 to 1.

    Raises:
        ValueError: for an unknown name or a value out of its range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"Unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}.")
    if steps_per_epoch <= 0 or total_epochs <= 0 or decay_epochs <= 0:
        raise ValueError(
            "steps_per_epoch, total_epochs and decay_epochs must be positive, "
            f"got {steps_per_epoch}, {total_epochs} and {decay_epochs}."
        )
    if warmup_epochs < 0 or not 0 < decay_rate <= 1 or not 0 <= min_factor <= 1:
        raise ValueError(
            "warmup_epochs must be at least 0, decay_rate in (0, 1] and min_factor in [0, 1], "
            f"got {warmup_epochs}, {decay_rate} and {min_factor}."
        )
    if name == "step" and (not milestones or list(milestones) != sorted(set(milestones))):
        raise ValueError(f"Schedule 'step' needs increasing milestones in epochs, got {list(milestones)}.")
    decay = {
        "constant": lambda: _constant,
        "cosine": lambda: _cosine(steps_per_epoch * total_epochs, min_factor),
        "exponential_staircase": lambda: _staircase(steps_per_epoch * decay_epochs, decay_rate, min_factor),
        "step": lambda: _milestones([epoch * steps_per_epoch for epoch in milestones], decay_rate, min_factor),
    }[name]()
    warmup_steps, total_steps = int(warmup_epochs * steps_per_epoch), round(steps_per_epoch * total_epochs)
    if warmup_steps >= total_steps:
        rank_zero_warn(
            f"optim.schedule.warmup_epochs={warmup_epochs:g}, and the training has {total_epochs:g} epochs: its rate "
            f"grows to the end, to {(total_steps - 1) / warmup_steps:.0%} of optim.lr. Set it lower for so short a one."
        )
    return _with_warmup(decay, warmup_steps)


def _with_warmup(decay: Schedule, warmup_steps: int) -> Schedule:
    def factor(step: int) -> float:
        return step / warmup_steps if step < warmup_steps else decay(step)

    return factor


def _constant(step: int) -> float:
    return 1.0


def _cosine(total_steps: float, min_factor: float) -> Schedule:
    def factor(step: int) -> float:
        progress = min(step / total_steps, 1.0)
        return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _staircase(decay_steps: float, decay_rate: float, min_factor: float) -> Schedule:
    def factor(step: int) -> float:
        return max(decay_rate ** math.floor(step / decay_steps), min_factor)

    return factor


def _milestones(steps: Sequence[float], decay_rate: float, min_factor: float) -> Schedule:
    def factor(step: int) -> float:
        return max(decay_rate ** sum(step >= milestone for milestone in steps), min_factor)

    return factor
