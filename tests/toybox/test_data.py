"""The teachers' training images are what the student's renderings will be compared with."""

from __future__ import annotations

import pytest
import torch

from prd.rendering.sphere_trace import SphereTracer
from prd.teachers.base import Condition, to_images
from prd.teachers.depth_control import DepthControlTeacher, control_images
from prd.toybox import asset
from prd.toybox.data import BACKGROUND, ViewPool
from prd.toybox.models import IMAGE_SIZE, NORMAL_SIZE
from prd.toybox.world import COLORS, ExactField, all_captions, parse_caption
from tests.compare import ROUNDING, relative_difference


@pytest.fixture(scope="module")
def pool():
    return ViewPool(1, torch.Generator().manual_seed(0), [("mug", 0), ("cone", 1), ("arrow", "cube")])


@pytest.fixture(scope="module")
def depth_teacher():
    return DepthControlTeacher.from_pretrained(asset("stable_diffusion"), controlnet=asset("controlnet"))


@pytest.mark.parametrize("only", [("mug", 0), ("cone", 1), ("arrow", "cube")])
def test_layers_compose_to_the_rendering_of_the_exact_field(pool, depth_teacher, only):
    batch = pool.draw(1, torch.Generator().manual_seed(1), only=only)
    form = only[1] if isinstance(only[1], int) else 0
    views = SphereTracer(supersample=2)(
        ExactField(batch.captions, [form]), batch.cameras, height=IMAGE_SIZE, width=IMAGE_SIZE, background=BACKGROUND
    )
    assert 0.05 < float(views.opacity.mean()) < 0.9
    torch.testing.assert_close(batch.rgb, views.rgb.permute(0, 1, 4, 2, 3), atol=1e-2, rtol=0)
    torch.testing.assert_close(batch.disparity, views.disparity.permute(0, 1, 4, 2, 3), atol=1e-2, rtol=0)
    # what the depth ControlNet is shown
    shown = depth_teacher.condition_on(Condition(torch.zeros(4, 1, 1), torch.zeros(4, 1, 1)), views).control
    assert shown.shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE) and shown.min() == 0 and shown.max() == 1
    torch.testing.assert_close(control_images(batch.disparity.flatten(0, 1)), shown, atol=2e-2, rtol=0)
    # what RichDreamer encodes: packed normal over 0.5 and disparity, area resized, mapped to [-1, 1]
    pixels = torch.cat([views.packed_normal((0.5, 0.5, 0.5)), views.disparity], dim=-1)
    seen = to_images(pixels, NORMAL_SIZE, "area") * 2 - 1
    error = (batch.normal_disparity[0] - seen).abs()
    assert float(error[:, 3].max()) < 1e-2
    assert float(error[:, :3].mean()) < 1e-2
    assert float(error[:, :3].flatten().quantile(0.99)) < 2e-2  # at edges normals come from other differences


def test_stacks_are_drawn_as_often_as_asked_in_two_colours(pool):
    generator = torch.Generator().manual_seed(2)
    assert all(" on a " not in c for c in pool.draw(20, generator, stacks=0.0).captions)
    stacks = [parse_caption(c) for c in pool.draw(20, generator, stacks=1.0).captions]
    assert all(upper != lower for (upper, _), (lower, _) in (c.words for c in stacks))
    words = {c.split()[1] for c in pool.draw(60, generator, stacks=0.0, open_words=0.0).captions}
    assert len(words) == 6


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_words_are_left_open_as_often_as_asked(pool, share):
    """The images are those of a member: of a mug that is red in the picture, and just "a mug" in the text."""
    batch = pool.draw(300, torch.Generator().manual_seed(5), open_words=share)
    captions = [parse_caption(text) for text in batch.captions]
    assert sum(c.is_open for c in captions) / 300 == pytest.approx(share, abs=0.07)
    if share:
        assert len({c.text for c in captions if c.is_open}) > 10
    colors = torch.tensor(list(COLORS.values()))
    for caption, rgb in list(zip(captions, batch.rgb, strict=True))[:40]:
        (color, shape), *rest = caption.words
        if rest or color == "":
            continue
        changed = (rgb - BACKGROUND).abs().amax(dim=1) > 0.3  # [4, H, W]
        mean = rgb.permute(0, 2, 3, 1)[changed].mean(dim=0)
        nearest = torch.cosine_similarity(colors - 0.35, mean[None] - 0.35).argmax()
        assert list(COLORS)[int(nearest)] == color and shape in ("mug", "cone", "toy")


def test_one_configuration_is_drawn_with_closed_captions(pool):
    captions = pool.draw(30, torch.Generator().manual_seed(6), only=("mug", 0), open_words=1.0).captions
    assert not any(parse_caption(text).is_open for text in captions)


def test_what_is_excluded_is_drawn_under_no_caption(pool):
    """No object of an excluded caption, whatever its text leaves open, and the shares stay as asked."""
    hidden = frozenset(
        {"a red mug", "a blue mug", "a red cone"} | {c.text for c in all_captions() if "red arrow on" in c.text}
    )
    drawn = pool.draw(300, torch.Generator().manual_seed(7), exclude=hidden, open_words=0.0).captions
    assert not hidden & set(drawn) and "a red mug" in pool.draw(300, torch.Generator().manual_seed(7)).captions
    assert sum(" on " in text for text in drawn) / 300 == pytest.approx(0.5, abs=0.08)
    opened = pool.draw(100, torch.Generator().manual_seed(7), exclude=hidden, open_words=1.0).captions
    assert "a red toy" not in opened  # of the mug and the cone both are excluded
    assert "a mug" in opened
    first, again = (pool.draw(5, torch.Generator().manual_seed(8), exclude=none) for none in (frozenset(), set()))
    assert first.captions == again.captions == pool.draw(5, torch.Generator().manual_seed(8)).captions


def test_nothing_left_to_draw_and_unknown_captions_are_errors(pool):
    generator = torch.Generator().manual_seed(9)
    with pytest.raises(ValueError, match="exclude: 'a mug' is no closed caption of the toy box; remove or correct it"):
        pool.draw(1, generator, exclude=frozenset({"a mug"}))
    mugs = frozenset(f"a {color} mug" for color in COLORS)
    with pytest.raises(ValueError, match=r"exclude: leaves nothing of \('mug', 0\) and its like; exclude fewer"):
        pool.draw(1, generator, only=("mug", 0), exclude=mugs)
    singles = mugs | {f"a {color} cone" for color in COLORS}
    with pytest.raises(ValueError, match="exclude: leaves nothing of"):
        pool.draw(1, generator, exclude=singles)
    assert len(pool.draw(3, generator, exclude=singles, stacks=1.0).captions) == 3


def test_the_same_generator_draws_the_same_batch(pool):
    one, two = (pool.draw(3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert one.captions == two.captions
    assert relative_difference(two.rgb, one.rgb) <= ROUNDING
    assert relative_difference(two.disparity, one.disparity) <= ROUNDING
    assert relative_difference(one.cameras.camera_to_world, two.cameras.camera_to_world) <= ROUNDING
