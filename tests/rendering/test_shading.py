"""Shading of finished views: Lambert's law, white surfaces, and prompts that are left as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prd.cameras import orbit_cameras
from prd.fields.protocol import AutogradGradient
from prd.rendering.shading import shade_views, surface_points
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import volume_renderer


class Ball(AutogradGradient):
    """A red ball of radius 0.6."""

    def sdf(self, points):
        return points.norm(dim=-1, keepdim=True) - 0.6

    def rgb(self, points):
        return torch.tensor([0.8, 0.2, 0.1]).expand_as(points)


def render(background=0.5):
    cameras = orbit_cameras(torch.zeros(3, 1), torch.zeros(3, 1), 2.4, 50.0)  # from +X
    renderer = volume_renderer(num_samples=64, inv_std=300.0)
    return renderer(_Three(), cameras, height=17, width=17, background=background)


class _Three(Ball):
    def sdf(self, points):
        return super().sdf(points)


def test_each_prompt_is_shaded_as_it_asks() -> None:
    views = render()
    light = torch.tensor([[[2.0, 0.0, 0.0]]]).expand(3, 1, 3)  # from the camera
    ambient = torch.tensor([0.25, 0.25, 0.25])
    white, diffuse = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    shaded = shade_views(views, light, ambient, 0.5, textureless=white, diffuse=diffuse)
    assert relative_difference(shaded.rgb[2], views.rgb[2]) <= ROUNDING  # shadeless
    for name in ("normal", "opacity"):
        assert relative_difference(getattr(shaded, name), getattr(views, name)) <= ROUNDING
    middle = shaded.rgb[:, 0, 8, 8]
    torch.testing.assert_close(middle[0], torch.ones(3), rtol=0, atol=0.02)  # facing the light: full
    torch.testing.assert_close(middle[1], torch.tensor([0.8, 0.2, 0.1]), rtol=0, atol=0.02)
    seen = views.opacity[0, 0, :, :, 0] > 0.999
    normal = F.normalize(views.normal, dim=-1)[0, 0]
    towards = F.normalize(light[0, 0] - 0.6 * normal, dim=-1)  # of the ball's own points
    expected = 0.25 + 0.75 * (normal * towards).sum(-1).clamp(min=0)
    torch.testing.assert_close(shaded.rgb[0, 0, ..., 0][seen], expected[seen], rtol=0, atol=2e-3)
    empty = views.opacity[0, 0, :, :, 0] < 1e-4
    assert bool(empty.any()) and (shaded.rgb[:, 0][:, empty] - 0.5).abs().max() < 1e-3  # the background is not lit


def test_a_near_light_falls_off_towards_the_rim() -> None:
    """A point light shines past what a distant one still reaches: both see the middle, the near one less of the rim."""
    views, every = render(), torch.ones(3, dtype=torch.bool)

    def lit(x: float) -> torch.Tensor:
        light = torch.tensor([x, 0.0, 0.0]).expand(3, 1, 3)
        return shade_views(views, light, torch.zeros(3), 0.5, textureless=every, diffuse=~every).rgb[0, 0, ..., 0]

    near, far = lit(1.0).detach(), lit(1000.0).detach()
    assert abs(float(near[8, 8] - far[8, 8])) < 1e-3
    rim = (views.normal[0, 0, ..., 0] < 0.6) & (views.opacity[0, 0, ..., 0] > 0.999)
    assert bool(rim.any()) and bool((near[rim] < far[rim] - 0.2).all())


def test_what_a_pixel_sees_lies_on_the_surface() -> None:
    views = render()
    seen = views.opacity[0, 0, ..., 0] > 0.999
    assert (surface_points(views)[0, 0][seen].norm(dim=-1) - 0.6).abs().max() < 0.01


def test_a_light_from_behind_leaves_what_comes_from_everywhere() -> None:
    views = render()
    away = torch.tensor([[[-2.0, 0.0, 0.0]]]).expand(3, 1, 3)
    every = torch.ones(3, dtype=torch.bool)
    shaded = shade_views(views, away, torch.tensor([0.0, 0.3, 1.0]), 0.5, textureless=~every, diffuse=every)
    middle = shaded.rgb[:, 0, 8, 8, 0]
    torch.testing.assert_close(middle, torch.tensor([0.0, 0.24, 0.8]), rtol=0, atol=0.02)


def test_nothing_asked_for_is_nothing_done() -> None:
    views, none = render(), torch.zeros(3, dtype=torch.bool)
    assert shade_views(views, torch.ones(3, 1, 3), torch.ones(3), 0.5, textureless=none, diffuse=none) is views
