"""The measure: exact fields score 1; a turn, a wrong colour and a lost hole are seen."""

from __future__ import annotations

import pytest
import torch

from prd.toybox.score import GRID, _forms, even_coverage, grid_points, score_field, summarise, topology
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
        assert score.right_topology and score.right_outside
    assert exact_scores[1].euler == 0  # the torus
    assert exact_scores[3].euler == 2  # the second form of the cone counts as well as the first


def test_the_orientation_margin_tells_a_turned_wedge(exact_scores):
    assert exact_scores[0].orientation_margin > 0.2
    assert exact_scores[1].orientation_margin is None  # a torus looks the same from everywhere
    (turned,) = score_field(Turned(ExactField(["a red wedge"])), ["a red wedge"])
    assert turned.iou < 0.8 < exact_scores[0].iou
    assert turned.orientation_margin < -0.2
    assert turned.score < exact_scores[0].score - 0.2


def test_a_cavity_is_wrong_inside_and_right_outside_and_a_closed_hole_is_wrong():
    class Hollow(Turned):
        """With a ball of air in its middle."""

        def sdf(self, points):
            ball = 0.12 - points.norm(dim=-1, keepdim=True)
            return torch.maximum(self.inner.sdf(points), ball)

    class Filled(Turned):
        """With a disc in its hole."""

        def sdf(self, points):
            disc = torch.maximum(points[..., :2].norm(dim=-1, keepdim=True) - 0.6, points[..., 2:].abs() - 0.05)
            return torch.minimum(self.inner.sdf(points), disc)

    (cube,) = score_field(Hollow(ExactField(["a red cube"])), ["a red cube"])
    assert cube.euler == 4 and not cube.right_topology and cube.right_outside
    (torus,) = score_field(Filled(ExactField(["a red torus"])), ["a red torus"])
    assert torus.euler == 2 and not torus.right_topology and not torus.right_outside
    assert (summarise([cube])["right_topology"], summarise([cube])["right_outside"]) == (0.0, 1.0)


def test_a_wrongly_coloured_cube_is_recognised_as_the_other():
    (score,) = score_field(ExactField(["a blue cube"]), ["a red cube"])
    assert not score.recognised and score.best == "a blue cube"
    assert score.iou == pytest.approx(1.0) and score.color_error > 0.2
    (other_way,) = score_field(ExactField(["a red cube on a blue cylinder"]), ["a blue cube on a red cylinder"])
    assert not other_way.recognised and other_way.best == "a red cube on a blue cylinder"


def test_a_prompt_outside_the_world_is_an_error():
    with pytest.raises(ValueError, match="caption='a red dragon': the toy box knows"):
        score_field(ExactField(["a red cube"]), ["a red dragon"])


def test_colours_that_are_no_numbers_fit_no_caption():
    field = ExactField(["a red sphere"])
    field.rgb = lambda points: torch.full_like(points, torch.nan)
    with pytest.raises(ValueError, match="field: its colours are not finite"):
        score_field(field, ["a red sphere"])


def test_the_colour_error_is_the_mean_difference_on_the_exact_surface():
    asked = "a red cube on a blue cylinder"
    painted = ExactField(["a green cube on a yellow cylinder"])
    field = ExactField([asked])
    field.rgb = painted.rgb
    points = _forms()[("cube", "cylinder"), 0].points[None]
    expected = (painted.rgb(points) - ExactField([asked]).rgb(points)).abs().mean()
    assert float(expected) > 0.2
    assert score_field(field, [asked])[0].color_error == pytest.approx(float(expected), rel=1e-4)


FAMILIES = ["a cube", "a red toy", "an arrow on a green cube", "a red cone on a cylinder", "a cone", "a blue cylinder"]


@pytest.mark.parametrize("text", FAMILIES)
def test_every_member_is_a_right_answer_and_is_named(text):
    members = parse_caption(text).members
    scores = score_field(ExactField([text] * len(members), range(len(members))), [text] * len(members))
    for score, (closed, form) in zip(scores, members, strict=True):
        assert score.prompt == text and score.recognised and score.reached == (closed.text, form)
        assert score.best == closed.text and score.right_topology
        assert score.iou == pytest.approx(1.0) and score.color_error < 1e-3
    summary = summarise(scores)
    assert summary["r_at_1"] == summary["coverage"] == 1.0 and summary["precision"] == pytest.approx(1.0, abs=1e-3)
    assert summary["coverage_of_even_draws"] == pytest.approx(even_coverage(len(members), len(members)), abs=1e-4)


def test_what_is_no_member_is_measured_against_the_nearest():
    asked = ["a cube", "a red toy", "an arrow on a green cube", "a red cone"]
    made = ["a red sphere", "a blue torus", "a red arrow on a blue cube", "a blue cone"]
    for score, text in zip(score_field(ExactField(made), asked), made, strict=True):
        assert not score.recognised and score.reached is None and score.best == text
    toy = score_field(ExactField(["a blue torus"]), ["a red toy"])[0]
    assert toy.iou == pytest.approx(1.0) and toy.color_error > 0.2 and toy.right_topology  # of the red torus
    arrow = score_field(ExactField(["a red arrow"]), ["a red toy"])[0]
    assert arrow.orientation_margin is not None and arrow.orientation_margin > 0.2


def test_the_summary_of_several_draws_tells_how_many_members_they_reach():
    def summary(*numbers):
        return summarise(score_field(ExactField(["a cube"] * len(numbers), list(numbers)), ["a cube"] * len(numbers)))

    assert "coverage" not in summary(0) and "precision" not in summary(0)  # measured once
    collapsed, two, all_of_them = summary(0, 0, 0, 0), summary(0, 1, 0, 1), summary(*range(6), 0, 0)
    assert collapsed["coverage"] == 0.25 and two["coverage"] == 0.5 and all_of_them["coverage"] == 1.0
    assert collapsed["precision"] == two["precision"] == pytest.approx(1.0, abs=1e-3)
    assert collapsed["coverage_of_even_draws"] == pytest.approx(6 * (1 - (5 / 6) ** 4) / 4, abs=1e-4)
    wrong = score_field(ExactField(["a red sphere"] * 2), ["a cube"] * 2)  # draws that reach no member
    assert summarise(wrong)["coverage"] == 0 and summarise(wrong)["precision"] < 0.8
    mixed = summarise([*wrong, *score_field(ExactField(["a mug"] * 2, [0, 3]), ["a mug"] * 2)])
    assert mixed["coverage"] == 0.5  # the mean over captions


@pytest.mark.parametrize(("members", "draws"), [(1, 4), (2, 2), (6, 16), (10, 3)])
def test_even_draws_cover_what_the_formula_says(members, draws):
    drawn = torch.randint(members, (20000, draws), generator=torch.Generator().manual_seed(0))
    found = sum(((drawn == m).any(dim=1)).double() for m in range(members)) / min(members, draws)
    assert even_coverage(members, draws) == pytest.approx(float(found.mean()), abs=0.01)


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
