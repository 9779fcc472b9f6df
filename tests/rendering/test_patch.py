"""Two resolutions in one image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.fields.protocol import AutogradGradient
from prd.rendering.patch import paste, resize
from prd.rendering.protocol import SampleDraws
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import patch_renderer, volume_renderer

CAMERAS = orbit_cameras(torch.tensor([[10.0, -20.0]]), torch.tensor([[0.0, 120.0]]), 2.4, 50.0)
PLAIN = volume_renderer(num_samples=32)


class Sphere(AutogradGradient):
    def __init__(self, radius: Tensor) -> None:
        self.radius = radius

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + 0.5


def test_the_patch_is_the_full_render_and_the_rest_the_enlarged_coarse_one() -> None:
    field, back = Sphere(torch.tensor(0.6)), torch.rand(1, 2, 24, 20, 3, generator=torch.Generator().manual_seed(1))
    views = patch_renderer(num_samples=32, patch=8, downsample=4)(field, CAMERAS, height=24, width=20, background=back)
    full = PLAIN(field, CAMERAS, height=24, width=20, background=back)
    rays = PLAIN.bundle(*(resize(x, 6, 5) for x in CAMERAS.rays(24, 20)), torch.full((1, 1, 2, 6, 5), 0.5))
    coarse = PLAIN.render_rays(field, CAMERAS, rays, (6, 5), resize(back, 6, 5)).views
    for name in ("rgb", "normal", "depth", "disparity", "opacity", "z_variance"):
        image, fine = getattr(views, name), getattr(full, name)
        square = (slice(None), slice(None), slice(8, 16), slice(6, 14))  # the middle, without a generator
        torch.testing.assert_close(image[square], fine[square], rtol=0, atol=1e-6)
        expected = paste(getattr(coarse, name), fine[square], [(8, 6)], 24, 20)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    assert (views.rgb - full.rgb).abs().max() > 0.05  # the rest is coarse


@pytest.mark.parametrize(("height", "width"), [(64, 67), (67, 64), (64, 64)])
def test_the_object_keeps_its_place_and_proportions(height: int, width: int) -> None:
    """A size that is no multiple of `downsample` stretches nothing."""
    field, soft = Sphere(torch.tensor(0.5)), volume_renderer(num_samples=32, inv_std=12.0)  # no edge between pixels
    enlarged = patch_renderer(num_samples=32, inv_std=12.0, patch=2, downsample=4)(
        field, CAMERAS, height=height, width=width
    ).opacity
    full = soft(field, CAMERAS, height=height, width=width).opacity

    def moments(opacity: Tensor) -> Tensor:
        image = opacity[0, 0, ..., 0]
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        found = []
        for axis, other in ((rows, 1), (columns, 0)):
            share = image.sum(other) / image.sum()
            mean = (share * axis).sum()
            found += [mean, (share * (axis - mean).square()).sum().sqrt()]
        return torch.stack(found)

    coarse, exact = moments(enlarged), moments(full)
    torch.testing.assert_close(coarse[0::2], exact[0::2], rtol=0.02, atol=0)
    torch.testing.assert_close(coarse[1] / coarse[3], exact[1] / exact[3], rtol=0.015, atol=0)


def test_both_resolutions_carry_gradient_and_a_seed_repeats() -> None:
    def render(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        radius = torch.tensor(0.5, requires_grad=True)
        draws = SampleDraws([torch.Generator().manual_seed(seed)])
        rendered = patch_renderer(num_samples=32, patch=6, downsample=2).render(
            Sphere(radius), CAMERAS, (16, 16), 0.5, draws
        )
        assert rendered.samples is not None
        opacity = rendered.views.opacity
        return opacity, torch.autograd.grad(opacity.sum(), radius)[0], rendered.samples.gradient

    image, slope, gradient = render(0)
    again, same_slope, _ = render(0)
    other, _, _ = render(1)
    assert relative_difference(again, image) <= ROUNDING and relative_difference(same_slope, slope) <= ROUNDING
    assert relative_difference(other, image) > 100 * ROUNDING
    assert slope > 10  # pixels of area gained a unit of radius
    torch.testing.assert_close(gradient.norm(dim=-1), torch.ones(len(gradient)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patch": 1}, "patch"),
        ({"downsample": 0}, "downsample"),
        ({"patch": 65, "height": 64}, r"patch=65: does not fit into 64 x 128"),
        ({"downsample": 40, "width": 64}, "downsample=40: leaves less than 2 of 128 x 64"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        patch_renderer(**settings)


@pytest.mark.parametrize(("size", "named"), [(6, "patch"), (16, "height")])
def test_images_too_small_are_refused(size: int, named: str) -> None:
    renderer = patch_renderer(patch=8, downsample=1 if size == 6 else 16)
    with pytest.raises(ValueError, match=named):
        renderer(Sphere(torch.tensor(0.5)), CAMERAS, height=size, width=size)


def test_each_sample_has_a_patch_of_its_own() -> None:
    renderer = patch_renderer(patch=6, downsample=4)

    def corners(*seeds: int) -> list[tuple[int, int]]:
        return renderer.corners(len(seeds), (24, 24), SampleDraws([torch.Generator().manual_seed(s) for s in seeds]))

    assert corners(1, 2) == [*corners(1), *corners(2)] and corners(1) != corners(2)
    assert all(0 <= row <= 18 and 0 <= column <= 18 for row, column in corners(*range(50)))
