"""The measure: exact fields score 1; a turn, a wrong colour and a lost hole are seen."""

from __future__ import annotations

import pytest
import torch

from prd.toybox.score import GRID, grid_points, score_field, summarise, topology
from prd.toybox.world import ExactField, parse_caption, scene_sdf


class Turned:
    """A field turned by 90 degrees about z, its colours those of the unturned one at the same place."""

    def __init__(self, inner: ExactField) -> None:
        self.inner = inner

    def sdf(self, points):
        x, y, z = points.unbind(-1)
        return self.inner.sdf(torch.stack([y, -x, z], dim=-1))

    def rgb(self, points):
        return self.inner.rgb(points)


EXACT = ["a red wedge", "a blue torus", "a cyan mug on a yellow cylinder", "a purple cone"]


@pytest.fixture(scope="module")
def exact_scores():
    return score_field(ExactField(EXACT, [0, 0, 0, 1]), EXACT)


def test_exact_fields_score_one_and_are_recognised(exact_scores):
    for score, prompt in zip(exact_scores, EXACT, strict=True):
        assert score.recognised and score.best == score.prompt == prompt
        assert score.iou == pytest.approx(1.0) and score.color_error < 1e-3
        assert score.score == pytest.approx(1.0, abs=1e-3)
        assert score.right_topology
    assert exact_scores[1].euler == 0  # the torus
    assert exact_scores[3].euler == 2  # the second form of the cone counts as well as the first


def test_the_orientation_margin_tells_a_turned_wedge(exact_scores):
    assert exact_scores[0].orientation_margin > 0.2
    assert exact_scores[1].orientation_margin is None  # a torus looks the same from everywhere
    (turned,) = score_field(Turned(ExactField(["a red wedge"])), ["a red wedge"])
    assert turned.iou < 0.8 < exact_scores[0].iou
    assert turned.orientation_margin < -0.2
    assert turned.score < exact_scores[0].score - 0.2


def test_a_wrongly_coloured_cube_is_recognised_as_the_other():
    (score,) = score_field(ExactField(["a blue cube"]), ["a red cube"])
    assert not score.recognised and score.best == "a blue cube"
    assert score.iou == pytest.approx(1.0) and score.color_error > 0.2
    (other_way,) = score_field(ExactField(["a red cube on a blue cylinder"]), ["a blue cube on a red cylinder"])
    assert not other_way.recognised and other_way.best == "a red cube on a blue cylinder"


def test_a_prompt_outside_the_world_is_an_error():
    with pytest.raises(ValueError, match="no caption of the toy box"):
        score_field(ExactField(["a red cube"]), ["a red dragon"])


def test_topology_counts_holes_and_pieces():
    def solid(text):
        return (scene_sdf(parse_caption(text).parts(), grid_points()) < 0).view(GRID, GRID, GRID)

    assert topology(solid("a red sphere")) == (2, 1)
    assert topology(solid("a red torus")) == (0, 1)
    assert topology(solid("a red mug")) == (0, 1)  # the handle's hole
    assert topology(torch.zeros(8, 8, 8, dtype=torch.bool)) == (0, 0)
    two = torch.zeros(16, 16, 16, dtype=torch.bool)
    two[2:6, 2:6, 2:6] = True
    two[9:13, 9:13, 9:13] = True
    assert topology(two) == (2, 2)
    hollow = torch.zeros(16, 16, 16, dtype=torch.bool)
    hollow[3:12, 3:12, 3:12] = True
    hollow[6:9, 6:9, 6:9] = False
    assert topology(hollow) == (4, 1)  # an outer and an inner sphere


def test_the_summary_is_the_mean(exact_scores):
    summary = summarise(exact_scores)
    assert summary["count"] == 4 and summary["r_at_1"] == 1.0 and summary["iou"] == 1.0
    assert set(summary["iou_by_shape"]) == {"wedge", "torus", "mug", "cone"}
    assert set(summary["orientation_margin"]) == {"wedge"}  # the mug's is a stack
    assert summarise([]) == {}
