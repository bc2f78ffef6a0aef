"""Means and intervals against scipy's own t test and against numbers worked out by hand."""

from __future__ import annotations

import pytest
from scipy import stats

from reports.statistics import paired_difference, spread


def test_interval_is_the_one_of_the_paired_t_test() -> None:
    pairs = [(61.2, 60.1), (60.4, 60.3), (62.0, 60.0), (59.9, 60.5)]
    found = paired_difference(pairs)
    expected = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    assert found is not None and found.n == 4
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(0.65)
    assert found.verdict == "unclear"


def test_three_pairs_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, so 2 ± 4.302653 / sqrt(3).
    found = paired_difference([(1, 0), (2, 0), (3, 0)])
    assert found is not None
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("pairs", "verdict"), [([(5, 1), (6, 2)], "above"), ([(1, 5), (2, 6)], "below"), ([(5, 1)], "single")]
)
def test_verdicts(pairs: list[tuple[float, float]], verdict: str) -> None:
    found = paired_difference(pairs)
    assert found is not None and found.verdict == verdict


def test_one_value_has_no_deviation_and_none_has_no_mean() -> None:
    one = spread([3.0])
    assert one is not None and (one.n, one.mean, one.sd) == (1, 3.0, None)
    assert spread([]) is None and paired_difference([]) is None
    two = spread([1.0, 3.0])
    assert two is not None and two.sd == pytest.approx(2**0.5)
