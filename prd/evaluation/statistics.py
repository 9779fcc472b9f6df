"""Intervals of means over prompts, by resampling the prompts (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Return the mean of values [N], of weights [N] where they are given."""
    return float(np.average(np.asarray(values, np.float64), weights=weights))


def bootstrap_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float] | None:
    """Return the 95 % interval [low, high] of the mean of values [N] over prompts; None for fewer than two."""
    if len(values) < 2:
        return None
    means = _resampled_means(np.asarray(values, np.float64), None if weights is None else np.asarray(weights))
    return [float(quantile) for quantile in np.quantile(means, (0.025, 0.975))]


def paired_difference(one: Sequence[float], other: Sequence[float]) -> dict[str, object]:
    """Return the mean of other - one over prompts, its 95 % interval, and the share of resamples above 0."""
    difference = np.asarray(other, np.float64) - np.asarray(one, np.float64)
    means = _resampled_means(difference, None)
    return {
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(list(difference)),
        "share_above_0": float((means > 0).mean() + (means == 0).mean() / 2),
        "prompts": len(difference),
    }


def _resampled_means(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Means [RESAMPLES] of prompts that are drawn with replacement, the same draws for the same number of prompts."""
    generator, count, means = np.random.default_rng(SEED), len(values), []
    chunk = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, chunk):
        drawn = generator.integers(0, count, (min(chunk, RESAMPLES - start), count))
        if weights is None:
            means.append(values[drawn].mean(axis=1))
        else:
            means.append((values * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.concatenate(means)
