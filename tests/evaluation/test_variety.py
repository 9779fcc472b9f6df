"""Pairwise overlap of shapes, against what is known of balls and of sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prd.evaluation.variety import mean_pairwise_iou, occupancy, pairwise_iou
from tests.commands.made import Balls


def test_balls_within_each_other_overlap_by_the_ratio_of_their_volumes() -> None:
    radii = [0.5, 0.6, 0.8]
    found = pairwise_iou(occupancy(Balls(radii), batch=3, resolution=96))  # type: ignore[arg-type]
    for i, j in itertools.product(range(3), repeat=2):
        ratio = (min(radii[i], radii[j]) / max(radii[i], radii[j])) ** 3
        assert found[i, j] == pytest.approx(ratio, rel=0.02)


def test_packed_bits_are_counted_as_sets_are() -> None:
    rng = np.random.default_rng(0)
    inside = rng.random((5, 203)) < rng.random((5, 1))
    found = pairwise_iou(np.packbits(inside, axis=1))
    for i, j in itertools.product(range(5), repeat=2):
        assert found[i, j] == pytest.approx((inside[i] & inside[j]).sum() / (inside[i] | inside[j]).sum())
    mean = mean_pairwise_iou(list(np.packbits(inside, axis=1)))
    assert mean == pytest.approx(np.mean([found[i, j] for i, j in itertools.combinations(range(5), 2)]), abs=1e-4)


def test_fewer_than_two_have_no_overlap_and_empty_ones_are_alike() -> None:
    assert mean_pairwise_iou([]) is None and mean_pairwise_iou([np.zeros(4, np.uint8)]) is None
    assert mean_pairwise_iou(np.zeros((3, 4), np.uint8)) == 1
    assert mean_pairwise_iou([np.zeros(4, np.uint8), np.full(4, 255, np.uint8)]) == 0
