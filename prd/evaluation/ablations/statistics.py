"""Means over seeds with intervals of confidence, paired differences, and what they say of a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t

CONFIDENCE = 0.95
FEWEST = 3  # seeds of which an interval decides; fewer are an indication

Verdict = Literal["holds", "contradicted", "does not show", "indication", "not measured"]


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its interval of confidence; none of one value."""

    n: int
    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of values and its 95 % interval by Student's t with n - 1 degrees of freedom.

    None without values; one value has no interval.
    """
    n = len(values)
    if n == 0:
        return None
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(1, mean, None, None)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def paired(cell: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Return the interval of the differences cell - baseline over the seeds that both have; None without one."""
    return interval([cell[seed] - baseline[seed] for seed in sorted(cell.keys() & baseline.keys())])


def verdict(
    difference: Interval | None, claimed: Literal["worse", "better"], better: Literal["higher", "lower"]
) -> Verdict:
    """Return what a difference (cell - baseline) says of the claim that the cell is worse, or better.

    "holds" if its interval lies on the claimed side of 0, "contradicted" on the other, "does not show" if it contains
    0; "indication" with fewer than `FEWEST` seeds, "not measured" without one.
    """
    if difference is None:
        return "not measured"
    if difference.low is None or difference.high is None or difference.n < FEWEST:
        return "indication"
    if difference.low <= 0 <= difference.high:
        return "does not show"
    is_better = (difference.low > 0) == (better == "higher")
    return "holds" if is_better == (claimed == "better") else "contradicted"
