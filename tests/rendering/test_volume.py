from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from prd import TriplaneTurbo
from prd.cameras import Cameras, orbit_cameras
from prd.distillation.regularizers import eikonal_loss
from prd.fields.grid import GridField
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.rendering.alpha import AlphaModel, DensityAlpha, NeusAlpha, VolSDFAlpha, neus_alpha, render_weights
from prd.rendering.rays import cube_near_far
from prd.rendering.volume import VolumeRenderer
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import changed, volume_renderer

SHARP = volume_renderer(num_samples=256, inv_std=400.0)
SOFT = volume_renderer(num_samples=48, inv_std=30.0, cull_below=0)


class Sphere(AutogradGradient):
    """Spheres of radius [B] around the origin, whose colour is p / 2 + 0.5."""

    def __init__(self, radius: Tensor) -> None:
        self.radius = radius

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + 0.5


def two_cameras(dtype: torch.dtype = torch.float32, batch: int = 1) -> Cameras:
    elevation = torch.tensor([[20.0, -35.0]], dtype=dtype).expand(batch, -1)
    azimuth = torch.tensor([[0.0, 110.0]], dtype=dtype).expand(batch, -1)
    return orbit_cameras(elevation, azimuth, 2.4, 50.0)


def first_hits(cameras: Cameras, size: int, radius: float) -> tuple[Tensor, Tensor]:
    """Distance to the sphere along each ray (nan: missed) and the rays' smallest distance to the centre."""
    origins, directions = cameras.rays(size, size)
    middle = -(origins * directions).sum(-1)
    miss = (origins + middle[..., None] * directions).norm(dim=-1)
    return middle - (radius**2 - miss**2).sqrt(), miss


def test_sphere_matches_its_silhouette_normal_colour_and_depth() -> None:
    cameras, radius, size = two_cameras(), 0.6, 24
    views = SHARP(Sphere(torch.tensor([radius])), cameras, height=size, width=size, background=0.25)
    distance, miss = first_hits(cameras, size, radius)
    inside, outside = miss < radius - 0.06, miss > radius + 0.06
    assert inside.sum() > 100 and outside.sum() > 100
    assert views.opacity[inside].min() > 0.99 and views.opacity[outside].max() < 1e-3
    origins, directions = cameras.rays(size, size)
    hit = (origins + distance[..., None] * directions)[inside]
    assert (views.normal[inside] - hit / radius).norm(dim=-1).max() < 0.03
    assert (views.rgb[inside] - (0.5 * hit + 0.5)).abs().max() < 0.01
    assert (views.rgb[outside] - 0.25).abs().max() < 1e-3
    forward = -cameras.camera_to_world[..., :3, 2][:, :, None, None]
    z = (distance[..., None] * (directions * forward).sum(-1, keepdim=True))[inside]
    near, far = (float(plane[0, 0]) for plane in cameras.near_far)
    assert (views.depth[inside] - z).abs().max() < 0.01
    assert (views.disparity[inside] - (far - z) / (far - near)).abs().max() < 0.005
    assert views.disparity[outside].max() < 1e-3


def test_a_ray_that_misses_everything_is_empty() -> None:
    rendered = volume_renderer(num_samples=64).render(
        Sphere(torch.tensor([-3.0])), two_cameras(), (8, 8), torch.full((3,), 0.3)
    )
    views = rendered.views
    assert views.opacity.max() == 0 and views.normal.abs().max() == 0 and views.disparity.max() < 1e-6
    torch.testing.assert_close(views.rgb, torch.full_like(views.rgb, 0.3))
    assert rendered.samples is not None and torch.isfinite(eikonal_loss(rendered.samples))
    without_culling = volume_renderer(num_samples=64, cull_below=0)
    assert without_culling(Sphere(torch.tensor([-3.0])), two_cameras(), height=8, width=8).opacity.max() < 1e-6


def test_the_published_floor_leaks_and_is_an_option() -> None:
    published = volume_renderer(num_samples=64, alpha_floor=1e-5, cull_below=0, near=0.1, far=4.0)
    opacity = published(Sphere(torch.tensor([-3.0])), two_cameras(), height=4, width=4).opacity
    torch.testing.assert_close(opacity, torch.full_like(opacity, 64e-5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("image", ["opacity", "rgb", "normal", "disparity"])
@pytest.mark.parametrize(
    ("renderer", "step", "tolerance"),
    [
        (SOFT, 1e-5, 1e-5),
        # the fine samples move with the radius and are not differentiated through: many, and a longer step
        (changed(SOFT, num_samples=160, num_importance_samples=160), 1e-3, 0.05),
    ],
)
def test_gradient_with_respect_to_the_radius(
    image: str, renderer: VolumeRenderer, step: float, tolerance: float
) -> None:
    cameras = two_cameras(torch.float64)

    def value(radius: Tensor) -> Tensor:
        views = renderer(Sphere(radius), cameras, height=7, width=7, background=0.1)
        picture: Tensor = getattr(views, image)
        weights = torch.linspace(-1, 2, picture.numel(), dtype=torch.float64).cos().view_as(picture)
        return (picture * weights).sum()

    radius = torch.tensor([0.55], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(radius), radius)
    with torch.no_grad():
        expected = (value(radius + step) - value(radius - step)) / (2 * step)
    assert abs(expected) > 0.05
    assert abs(gradient - expected) <= tolerance * abs(expected)


def test_culling_changes_next_to_nothing() -> None:
    cameras = two_cameras(batch=2)
    field = Sphere(torch.tensor([0.3, 0.7], requires_grad=True))
    images, gradients = [], []
    for cull_below in (0.0, 1e-4):
        renderer = volume_renderer(num_samples=48, inv_std=64.0, cull_below=cull_below)
        rendered = renderer.render(field, cameras, (12, 12), 0.5)
        views, samples = rendered.views, rendered.samples
        assert samples is not None
        images.append(torch.cat([views.rgb, views.normal, views.disparity, views.opacity], dim=-1))
        gradients.append(torch.autograd.grad(images[-1].sum(), field.radius)[0])
        counted = len(samples.gradient)
    assert 0 < counted < 0.5 * 2 * 2 * 12 * 12 * 48
    assert (images[0] - images[1]).abs().max() < 2e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=0)


class Steep(Sphere):
    """Spheres whose signed distance has the slope `slope` instead of 1."""

    def __init__(self, slope: float) -> None:
        super().__init__(torch.tensor([0.6]))
        self.slope = slope

    def sdf(self, points: Tensor) -> Tensor:
        return self.slope * super().sdf(points)


@torch.no_grad()
@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0, 5.0, 11.0])
@pytest.mark.parametrize("alpha", [NeusAlpha(64.0), VolSDFAlpha(0.02), DensityAlpha(3.0)])
def test_culling_removes_no_opacity_at_any_slope(alpha: AlphaModel, slope: float) -> None:
    renderer, cameras = volume_renderer(num_samples=40, alpha=alpha), two_cameras()
    culled, whole = (r(Steep(slope), cameras, height=16, width=16) for r in (renderer, changed(renderer, cull_below=0)))
    assert (culled.opacity - whole.opacity).abs().max() < 4e-3  # 40 segments of an opacity of 1e-4 at most
    assert (culled.rgb - whole.rgb).abs().max() < 4e-3
    assert (culled.disparity - whole.disparity).abs().max() < 4e-3


@torch.no_grad()
def test_culling_changes_nothing_on_what_the_toy_student_makes() -> None:
    """Its signed distance has slopes up to 7: as in training, through a grid of 32^3."""
    pipe = TriplaneTurbo.from_pretrained("toybox")
    prompts, draws = ["a red cube", "a green mug"], [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    field = GridField(pipe(prompts, generator=draws, output_type="field").field, 32)
    assert field.node_gradient.norm(dim=-1).max() > 2
    renderer, cameras = volume_renderer(num_samples=40, inv_std=64.0), two_cameras(batch=2)
    culled, whole = (r(field, cameras, height=32, width=32) for r in (renderer, changed(renderer, cull_below=0)))
    assert (culled.opacity - whole.opacity).abs().max() < 1e-3
    assert (culled.rgb - whole.rgb).abs().max() < 1e-3


def test_culling_asks_for_few_gradients_with_a_graph() -> None:
    counts: list[tuple[bool, int]] = []

    class Counting(Steep):
        def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
            counts.append((torch.is_grad_enabled(), points.shape[1]))
            return super().sdf_and_gradient(points)

    volume_renderer(num_samples=40)(Counting(3.0), two_cameras(), height=16, width=16)
    (plain, candidates), (graph, kept) = counts
    assert not plain and graph
    assert kept < 0.5 * candidates < 0.2 * 2 * 16 * 16 * 40


def test_gradient_scales_touch_only_the_colour_image() -> None:
    cameras = two_cameras()

    class Painted(Sphere):
        def __init__(self, radius: Tensor, colour: Tensor) -> None:
            super().__init__(radius)
            self.colour = colour

        def rgb(self, points: Tensor) -> Tensor:
            return self.colour.expand_as(points)

    def gradients(renderer: VolumeRenderer, image: str) -> tuple[float, float]:
        radius, colour = torch.tensor([0.5], requires_grad=True), torch.full((3,), 0.8, requires_grad=True)
        views = renderer(Painted(radius, colour), cameras, height=8, width=8, background=0.2)
        views_image: Tensor = getattr(views, image)
        grads = torch.autograd.grad(views_image.sum(), (radius, colour), allow_unused=True)
        return tuple(0.0 if g is None else float(g.sum()) for g in grads)  # type: ignore[return-value]

    scaled = changed(SOFT, rgb_gradient_scale=0.01, rgb_weight_gradient_scale=0.1)
    plain_radius, plain_colour = gradients(SOFT, "rgb")
    radius, colour = gradients(scaled, "rgb")
    assert plain_radius != 0 and plain_colour != 0
    assert radius == pytest.approx(0.1 * plain_radius, rel=1e-4)
    assert colour == pytest.approx(0.01 * plain_colour, rel=1e-4)
    assert gradients(scaled, "opacity") == pytest.approx(gradients(SOFT, "opacity"), rel=1e-6)


def test_second_order_gradient_reaches_the_field() -> None:
    class Scaled(Sphere):
        def sdf(self, points: Tensor) -> Tensor:
            return self.radius[:, None, None] * (points.norm(dim=-1, keepdim=True) - 0.5)

    scale = torch.tensor([1.5], requires_grad=True)
    samples = SOFT.render(Scaled(scale), two_cameras(), (4, 4), 0.5).samples
    assert samples is not None
    loss = eikonal_loss(samples)
    torch.testing.assert_close(torch.autograd.grad(loss, scale)[0], torch.tensor([1.0]), rtol=1e-4, atol=0)


def test_chunks_and_seeds_do_not_change_the_image() -> None:
    field, cameras = Sphere(torch.tensor([0.5, 0.4])), two_cameras(batch=2)
    renderer = volume_renderer(num_samples=16, num_importance_samples=16)

    def draw(renderer: VolumeRenderer, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return renderer(field, cameras, height=6, width=6, generator=generator).rgb

    torch.testing.assert_close(draw(renderer, 1), draw(changed(renderer, max_rays=7), 1), rtol=0, atol=1e-6)
    assert relative_difference(draw(renderer, 1), draw(renderer, 1)) <= ROUNDING
    assert relative_difference(draw(renderer, 1), draw(renderer, 2)) > 10 * ROUNDING


@torch.no_grad()
def test_importance_sampling_refines_a_thin_surface() -> None:
    cameras, sphere = two_cameras(), Sphere(torch.tensor([0.6]))
    exact = volume_renderer(num_samples=2000, inv_std=200.0)(sphere, cameras, height=12, width=12)
    errors = [
        float((renderer(sphere, cameras, height=12, width=12).depth - exact.depth).abs().mean())
        for renderer in (
            volume_renderer(num_samples=64, inv_std=200.0),
            volume_renderer(num_samples=32, num_importance_samples=32, inv_std=200.0),
        )
    ]
    assert errors[1] < 0.5 * errors[0]


def test_alpha_is_exact_and_finite_everywhere() -> None:
    sdf = torch.linspace(-3, 3, 61, requires_grad=True)
    cos, dt = torch.tensor(-0.7), torch.tensor(0.05)
    alpha = neus_alpha(sdf, cos, dt, 100.0)
    wide = sdf.detach().double()
    before, after = torch.sigmoid(100 * (wide + 0.0175)), torch.sigmoid(100 * (wide - 0.0175))
    torch.testing.assert_close(alpha.double(), 1 - after / before, rtol=1e-4, atol=1e-6)
    alpha.sum().backward()
    assert sdf.grad is not None and torch.isfinite(sdf.grad).all()


def test_weights_sum_to_what_is_not_transmitted() -> None:
    alpha = torch.rand(5, 9, dtype=torch.float64)
    torch.testing.assert_close(render_weights(alpha).sum(-1), 1 - (1 - alpha).prod(-1))


def test_rays_enter_and_leave_the_cube() -> None:
    origins = torch.tensor([[3.0, 0, 0], [0, 0, 0], [3.0, 0, 0], [0, 5.0, 5.0]])
    directions = torch.tensor([[-1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0], [0, -math.sqrt(0.5), -math.sqrt(0.5)]])
    near, far = cube_near_far(origins, directions)
    torch.testing.assert_close(near[[0, 1, 3], 0], torch.tensor([2.0, 0.0, 4 * math.sqrt(2)]))
    torch.testing.assert_close(far[[0, 1, 3], 0], torch.tensor([4.0, 1.0, 6 * math.sqrt(2)]))
    assert near[2] == far[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 1},
        {"near": 0.1},
        {"near": 2.0, "far": 1.0},
        {"inv_std": 0.0},
        {"alpha_floor": 1e-5},
        {"max_rays": 0},
        {"num_samples": 8.5},
        {"inv_std": torch.tensor(100.0)},
        {"num_importance_samples": True},
        {"far": math.inf, "near": 0.1},
        {"near": math.nan, "far": 1.0},
        {"alpha_floor": 1e-5, "density": "volsdf", "cull_below": 0.0},
        {"density": "density"},
        {"cull_below": 1e-4, "alpha": NeusAlpha(floor=1e-5)},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        volume_renderer(**settings)


def test_the_variance_along_a_ray_is_that_of_its_density() -> None:
    """Before a wall, NeuS's density is logistic along the normal: variance pi^2 / (3 s^2) for a frontal ray."""

    class Wall(Sphere):
        def sdf(self, points: Tensor) -> Tensor:
            return points[..., :1]

    cameras = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 1.0)  # nearly parallel rays along -X
    renderer = volume_renderer(num_samples=400, inv_std=20.0, cull_below=0)
    views = renderer(Wall(torch.zeros(1)), cameras, height=2, width=2)
    assert views.opacity.min() > 0.999
    expected = torch.full_like(views.z_variance, math.pi**2 / (3 * 20.0**2))
    torch.testing.assert_close(views.z_variance, expected, rtol=5e-3, atol=0)


def test_chunks_change_no_gradient_of_first_or_second_order() -> None:
    """Holds for images and for an eikonal term: the chunks' activations are made again in the backward pass."""
    torch.manual_seed(0)
    heads = TriplaneHeads(4, 8).double()
    planes = (0.3 * torch.randn(2, 6, 4, 8, 8, dtype=torch.float64)).requires_grad_()
    inv_std = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    cameras = two_cameras(torch.float64, batch=2)

    def gradients(max_rays: int | None) -> tuple[Tensor, ...]:
        renderer = volume_renderer(
            num_samples=12, num_importance_samples=12, alpha=NeusAlpha(inv_std), max_rays=max_rays
        )
        generator = torch.Generator().manual_seed(0)
        views = renderer(TriplaneField(planes, heads), cameras, height=5, width=5, generator=generator)
        loss = views.rgb.square().sum() + views.packed_normal().square().sum() + views.z_variance.sum()
        return loss.detach(), *torch.autograd.grad(loss, (planes, inv_std, heads.sdf[0].weight))

    for whole, chunked in zip(gradients(None), gradients(7), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-11)
    second = []
    for max_rays in (None, 7):
        renderer = volume_renderer(num_samples=12, alpha=NeusAlpha(inv_std), max_rays=max_rays)
        samples = renderer.render(TriplaneField(planes, heads), cameras, (5, 5), 0.5).samples
        assert samples is not None
        second.append(torch.autograd.grad(eikonal_loss(samples), planes)[0])
    assert second[0].abs().max() > 1e-4
    torch.testing.assert_close(second[0], second[1], rtol=1e-9, atol=1e-13)


def test_the_eikonal_loss_of_a_batch_is_the_mean_of_its_samples() -> None:
    """Samples whose surfaces take up a different number of segments, and one that has none."""

    class Slopes(Sphere):
        def sdf(self, points: Tensor) -> Tensor:
            return (1 + self.radius.abs())[:, None, None] * super().sdf(points)

    radii, renderer = torch.tensor([0.3, 0.8, -3.0]), volume_renderer(num_samples=24, inv_std=30.0)

    @torch.no_grad()
    def loss(radius: Tensor) -> float:
        cameras = two_cameras(batch=len(radius))
        samples = renderer.render(Slopes(radius), cameras, (9, 9), 0.5).samples
        assert samples is not None
        return float(eikonal_loss(samples))

    alone = [loss(radius[None]) for radius in radii]
    assert alone == pytest.approx([0.09, 0.64, 0.0], rel=1e-4)
    assert loss(radii) == pytest.approx(sum(alone) / 3, rel=1e-5)


MEMORY = """
import resource, torch
from prd.cameras import CamerasConfig
from prd.distillation.regularizers import eikonal_loss, sparsity_loss
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.rendering.protocol import SampleDraws
from prd.rendering.volume import VolumeConfig, VolumeRenderer
torch.manual_seed(0)
planes = (0.1 * torch.randn(1, 6, 32, 256, 256)).requires_grad_()
planes.grad = torch.zeros_like(planes)
field = TriplaneField(planes, TriplaneHeads(32, 64, sdf_init_scale=0.3))
renderer = VolumeRenderer(VolumeConfig(near=0.1, far=4.0, max_rays=1024))
cameras = CamerasConfig().sample(torch.rand(1, 3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
rendered = renderer.render(field, cameras, (128, 128), 0.5, SampleDraws([torch.Generator().manual_seed(0)]))
views, gradient = rendered.views, rendered.samples
loss = views.rgb.square().mean() + views.packed_normal().mean() + views.disparity.mean()
(loss + eikonal_loss(gradient) + sparsity_loss(views.opacity)).backward()
print((peak() - before) / 2**20)
"""


@pytest.mark.slow
def test_a_training_render_takes_at_most_three_gigabytes() -> None:
    """4 views of 128 x 128 with 192 samples a ray, forward and backward with the eikonal loss, above the model."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 3.0
