"""Mean, standard deviation and the interval of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; of one value there is no deviation."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences with its two-sided 95 % t interval; of one pair there is no interval."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Where the interval lies: "above" or "below" zero, "unclear" across it, "single" for one pair."""
        if self.low is None or self.high is None:
            return "single"
        return "above" if self.low > 0 else "below" if self.high < 0 else "unclear"

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None of no values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Spread(n, mean, sd)


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """Of pairs (ours, baseline's), each of one seed: ours minus the baseline's; None of no pairs."""
    found = spread([ours - other for ours, other in pairs])
    if found is None:
        return None
    if found.sd is None:
        return Difference(found.n, found.mean, None, None)
    half = float(stdtrit(found.n - 1, (1 + CONFIDENCE) / 2)) * found.sd / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.mean - half, found.mean + half)
