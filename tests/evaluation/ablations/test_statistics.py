"""Intervals, paired differences and verdicts, by numbers computed by hand."""

from __future__ import annotations

import pytest

from prd.evaluation.ablations.statistics import Interval, interval, paired, verdict

T2, T1 = 4.302653, 12.706205  # Student's t, 97.5 %, of 2 and of 1 degree of freedom (any table)


def test_the_interval_of_three_values():
    """1, 2, 3: the standard deviation is 1, so half of the interval is t / sqrt(3)."""
    found = interval([1.0, 2.0, 3.0])
    assert found is not None and found.n == 3 and found.mean == 2
    assert found.low == pytest.approx(2 - T2 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(2 + T2 / 3**0.5, abs=1e-5)


def test_the_interval_of_two_values_one_and_none():
    """1 and 3: the standard deviation is sqrt(2), its mean's 1, so half of the interval is t."""
    found = interval([1.0, 3.0])
    assert found is not None and found.low == pytest.approx(2 - T1, abs=1e-4)
    assert interval([0.7]) == Interval(1, 0.7, None, None)
    assert interval([]) is None


def test_differences_are_taken_over_common_seeds():
    found = paired({0: 0.5, 1: 0.4, 2: 0.6, 7: 9.0}, {0: 0.6, 1: 0.6, 2: 0.9, 8: 9.0})
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(-0.2)  # of -0.1, -0.2, -0.3: the standard deviation is 0.1
    assert found.low == pytest.approx(-0.2 - 0.1 * T2 / 3**0.5, abs=1e-6)
    assert found.high == pytest.approx(-0.2 + 0.1 * T2 / 3**0.5, abs=1e-6)
    assert paired({0: 1.0}, {1: 1.0}) is None


BELOW, ABOVE, AROUND = Interval(3, -2, -3, -1), Interval(3, 2, 1, 3), Interval(3, 0.1, -1, 1.2)


@pytest.mark.parametrize(
    "difference, claimed, better, said",
    [
        (BELOW, "worse", "higher", "holds"),
        (ABOVE, "worse", "higher", "contradicted"),
        (BELOW, "better", "higher", "contradicted"),
        (ABOVE, "better", "higher", "holds"),
        (BELOW, "worse", "lower", "contradicted"),  # of an error
        (ABOVE, "worse", "lower", "holds"),
        (AROUND, "worse", "higher", "does not show"),
        (Interval(3, 0.0, 0.0, 0.0), "worse", "higher", "does not show"),
        (Interval(3, 1.0, 0.0, 2.0), "better", "higher", "does not show"),
        (Interval(2, -2, -3, -1), "worse", "higher", "indication"),
        (Interval(1, -2, None, None), "worse", "higher", "indication"),
        (None, "worse", "higher", "not measured"),
    ],
)
def test_a_verdict_is_the_side_of_zero(difference, claimed, better, said):
    assert verdict(difference, claimed, better) == said
