"""The world: its captions, and its signed distances against distances to points of its surfaces."""

from __future__ import annotations

import pytest
import torch

from prd.toybox.score import GRID, grid_points, surface_points, topology
from prd.toybox.world import (
    ANY_COLOR,
    ANY_SHAPE,
    BASES,
    COLORS,
    FORMS,
    LOWEST,
    SHAPES,
    Caption,
    ExactField,
    all_captions,
    open_captions,
    opened_forms,
    parse_caption,
    scene_sdf,
    shape_sdf,
    single_captions,
    stack_captions,
    unknown_words,
)

SINGLES = [(shape, form) for shape in SHAPES for form in range(FORMS.get(shape, 1))]
EXACT_OUTSIDE = ("sphere", "cube", "cylinder", "torus")


def test_the_world_is_large_enough_and_has_no_caption_twice():
    assert len(COLORS) >= 6 and len(SHAPES) >= 8
    assert len(single_captions()) == len(COLORS) * len(SHAPES)
    assert len(stack_captions()) >= 200
    texts = [c.text for c in all_captions()]
    assert len(set(texts)) == len(texts)
    assert all(parse_caption(text).text == text for text in (*texts[::37], texts[-1]))


@pytest.mark.parametrize(
    "text",
    [
        *("", "a red", "a pink cube", "a red cube on a red cylinder", "a red cube on a blue mug"),
        *("a toy", "a arrow", "an red arrow", "an cube", "a red arrow on an blue cube"),
        *("a red cube on a toy", "a red toy on a red cube", "a toy on a cube", "a cube on a cylinder"),
    ],
)
def test_an_unknown_caption_says_what_is_known(text):
    with pytest.raises(ValueError, match=r"caption=.*colours red, green.*shapes sphere.*bases cube"):
        parse_caption(text)


def test_unknown_words_are_listed_in_order():
    assert unknown_words("A shiny red cube on a whale") == ["shiny", "whale"]
    assert unknown_words("an arrow on a green toy") == []


def test_texts_of_every_caption_are_read_back():
    singles = [c for c in open_captions() if not c.is_stack]
    assert len(singles) == len(SHAPES) + len(COLORS)
    stacks = len(SHAPES) * len(COLORS) * len(BASES) * 2 + len(COLORS) * (len(COLORS) - 1) * len(BASES)
    assert len(open_captions()) == len(singles) + stacks
    captions = (*all_captions(), *open_captions())
    assert len({c.text for c in captions}) == len(captions)
    assert all(parse_caption(c.text) == c and unknown_words(c.text) == [] for c in captions)
    assert not any(c.is_open for c in all_captions()) and all(c.is_open for c in open_captions())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([(ANY_COLOR, "arrow")], "an arrow"),
        ([("red", "arrow")], "a red arrow"),
        ([(ANY_COLOR, "mug")], "a mug"),
        ([("cyan", ANY_SHAPE)], "a cyan toy"),
        ([(ANY_COLOR, "arrow"), ("green", "cube")], "an arrow on a green cube"),
        ([("red", "arrow"), (ANY_COLOR, "cylinder")], "a red arrow on a cylinder"),
        ([("red", ANY_SHAPE), ("blue", "cube")], "a red toy on a blue cube"),
    ],
)
def test_what_is_left_open_is_not_said(words, text):
    assert Caption(tuple(words)).text == text and parse_caption(text).words == tuple(words)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("a red sphere", 1), ("a red cone", 2), ("a red cone on a blue cube", 1)),
        *(("a sphere", 6), ("a cone", 12), ("a red toy", 10)),
        *(("a cone on a blue cube", 5), ("a red toy on a blue cube", 8), ("a red cone on a cube", 5)),
    ],
)
def test_members_are_the_right_answers(text, count):
    caption = parse_caption(text)
    assert len(caption.members) == len(set(caption.members)) == count
    for closed, form in caption.members:
        assert not closed.is_open and 0 <= form < closed.num_forms
        assert closed == caption or caption in opened_forms(closed)


def test_a_caption_is_a_member_of_what_it_opens_to_and_of_nothing_else():
    opened = {c.text: {member.text for member, _ in c.members} for c in open_captions()}
    for closed in all_captions()[::7]:
        asking = {text for text, members in opened.items() if closed.text in members}
        assert asking == {c.text for c in opened_forms(closed)} and len(asking) == (3 if closed.is_stack else 2)


def test_an_open_caption_has_no_parts_and_its_field_is_of_a_member():
    with pytest.raises(ValueError, match="'a red toy' leaves its colour or shape open; take the parts of one of its"):
        parse_caption("a red toy").parts()
    members = parse_caption("a red toy").members
    points = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for number, (closed, form) in enumerate(members):
        field, exact = ExactField(["a red toy"], [number]), ExactField([closed], [form])
        assert torch.equal(field.sdf(points), exact.sdf(points)) and torch.equal(field.rgb(points), exact.rgb(points))
    assert ExactField(["a red toy"]).scenes == [members[0][0].parts(members[0][1])]
    for number in (-1, len(members)):
        with pytest.raises(ValueError, match=f"form={number}: 'a red toy' has the members 0 to 9"):
            ExactField(["a red toy"], [number])


@pytest.mark.parametrize("shape, form", SINGLES)
def test_the_distance_never_exceeds_that_to_the_nearest_surface_point(shape, form):
    scene = parse_caption(f"a red {shape}").parts(form)
    grid = grid_points(96)
    surface = surface_points(scene, grid[scene_sdf(scene, grid).abs() < 0.03], 8000)
    assert len(surface) > 3000
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    nearest = torch.cdist(points, surface).amin(dim=1)
    sdf = scene_sdf(scene, points)
    spacing = 0.04  # of the sampled surface
    assert bool((sdf.abs() <= nearest + 2e-3).all())
    if shape in EXACT_OUTSIDE:
        assert bool((sdf.abs() >= nearest - spacing).all())
    else:  # a lower bound, but no smaller than a ray needs to arrive
        outside = sdf > 0.05
        assert float((sdf / nearest)[outside].min()) > 0.3


@pytest.mark.parametrize("shape, form", SINGLES)
def test_shapes_stay_in_the_cube_and_stand_where_they_say(shape, form):
    points = grid_points(96)
    inside = points[shape_sdf(shape, form, points) < 0]
    assert inside.norm(dim=-1).max() < 1.05 and inside.abs().max() < 0.97
    assert inside[:, 2].min().item() == pytest.approx(LOWEST[shape][form], abs=0.03)


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match="shape='cow'"):
        shape_sdf("cow", 0, torch.zeros(1, 3))


@pytest.mark.parametrize(
    "text",
    [f"a red {shape}" for shape in SHAPES] + [f"a red {s} on a blue {b}" for s in SHAPES for b in ("cube", "cylinder")],
)
def test_every_scene_is_one_piece_inside_the_cube(text):
    caption = parse_caption(text)
    for form in range(caption.num_forms):
        occupied = (scene_sdf(caption.parts(form), grid_points()) < 0).view(GRID, GRID, GRID)
        assert topology(occupied)[1] == 1
        shell = occupied.clone()
        shell[1:-1, 1:-1, 1:-1] = False
        assert not bool(shell.any())


def test_the_parts_of_a_stack_have_their_own_colours():
    field = ExactField(["a red cube on a blue cylinder"])
    points = torch.tensor([[[0.3, 0.0, 0.5], [0.65, 0.0, -0.4]]])  # on the cube's and the cylinder's side
    upper, lower = field.rgb(points)[0]
    assert upper.argmax() == 0 and lower.argmax() == 2


def test_colours_at_the_surface_are_the_lit_albedo():
    """At the top of a sphere the normal is +z: shade 0.6 + 0.33 * 0.7 / |light|, no tint."""
    field = ExactField(["a green sphere"])
    rgb = field.rgb(torch.tensor([[[0.0, 0.0, 0.68]]]))[0, 0]
    length = (0.62**2 + 0.34**2 + 0.70**2) ** 0.5
    expected = torch.tensor(COLORS["green"]) * (0.6 + 0.33 * 0.7 / length)
    torch.testing.assert_close(rgb, expected, atol=2e-3, rtol=0)
    everywhere = field.rgb(torch.rand(1, 500, 3) * 2 - 1)
    assert everywhere.min() >= 0 and everywhere.max() <= 1


def test_fields_check_their_points_and_forms():
    field = ExactField(["a red cone", "a red cone"], [0, 1])
    with pytest.raises(ValueError, match=r"expected \[2, N, 3\]"):
        field.sdf(torch.zeros(1, 5, 3))
    tip = torch.tensor([[[0.0, 0.0, 0.6]]]).expand(2, -1, -1)
    tall, flat = field.sdf(tip)[:, 0, 0]
    assert tall < 0 < flat
    with pytest.raises(ValueError, match="form=2"):
        ExactField(["a red cone"], [2])


def test_the_fields_gradient_is_the_normal():
    points = torch.tensor([[[0.7, 0.1, 0.0], [0.0, -0.2, 0.6]]])
    sdf, gradient = ExactField(["a blue sphere"]).sdf_and_gradient(points)
    torch.testing.assert_close(gradient, points / points.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(sdf[..., 0], points.norm(dim=-1) - 0.68, atol=1e-6, rtol=0)
