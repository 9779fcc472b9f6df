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
from prd.toybox.world import ExactField
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
    stacks = pool.draw(20, generator, stacks=1.0).captions
    assert all(c.split()[1] != c.split()[5] for c in stacks)
    words = {c.split()[1] for c in pool.draw(60, generator, stacks=0.0).captions}
    assert len(words) == 6


def test_the_same_generator_draws_the_same_batch(pool):
    one, two = (pool.draw(3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert one.captions == two.captions
    assert relative_difference(two.rgb, one.rgb) <= ROUNDING
    assert relative_difference(two.disparity, one.disparity) <= ROUNDING
    assert relative_difference(one.cameras.camera_to_world, two.cameras.camera_to_world) <= ROUNDING
