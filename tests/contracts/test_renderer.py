"""The contract of `Renderer`, over every renderer: what training and examples may rely on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.custom_renderer import SilhouetteConfig, SilhouetteRenderer
from prd.cameras import Cameras, orbit_cameras
from prd.distillation.regularizers import REGULARIZERS, applies, regularize
from prd.fields.grid import GridField
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.rendering.protocol import Draws, Rendered, Renderer, SampleDraws, SharedGrids, at_step, image_size
from prd.rendering.views import Views
from prd.splats.renderer import SplatRenderer
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import patch_renderer, splat_renderer, surface_renderer, volume_renderer

SIZE = (20, 26)  # height and width


RENDERERS: dict[str, Renderer] = {
    "volume": volume_renderer(num_samples=32),
    "volume_importance": volume_renderer(num_samples=16, num_importance_samples=16),
    "volume_proposal": volume_renderer(num_samples=16, num_importance_samples=16, proposal_grid=24),
    "volume_volsdf": volume_renderer(num_samples=48, density="volsdf", beta=0.02),
    "volume_planes": volume_renderer(num_samples=64, near=1.0, far=4.0, cull_below=0.0),
    "surface_cubes": surface_renderer(grid_resolution=20),
    "surface_tetrahedra": surface_renderer(grid_resolution=16, isosurface="tetrahedra"),
    "splats": splat_renderer(grid_resolution=20),
    "patch": patch_renderer(num_samples=32, patch=10, downsample=3, height=20, width=26),
    "example": SilhouetteRenderer(SilhouetteConfig(sharpness=40.0)),
}
LIBRARY = {name: renderer for name, renderer in RENDERERS.items() if name != "example"}

every = pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
own = pytest.mark.parametrize("renderer", LIBRARY.values(), ids=LIBRARY)  # of the library: errors are worded alike


class Balls(AutogradGradient):
    """Balls of radius [B] around the origin in colours [B, 3]; a method may answer something else."""

    def __init__(self, radius: Tensor, colour: Tensor, **answers: Any) -> None:
        self.radius, self.colour = radius, colour
        for name, answer in answers.items():
            setattr(self, name, lambda points, answer=answer: answer)

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return self.colour[:, None].expand_as(points)


def balls(batch: int = 2, grad: bool = False, **answers: Any) -> Balls:
    radius = torch.tensor([0.55, 0.4, 0.3])[:batch].requires_grad_(grad)
    colour = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.2, 0.9]])[:batch].requires_grad_(grad)
    return Balls(radius, colour, **answers)


def cameras(batch: int = 2, dtype: torch.dtype = torch.float32) -> Cameras:
    elevation = torch.tensor([[20.0, -35.0]], dtype=dtype).expand(batch, -1)
    azimuth = torch.tensor([[0.0, 110.0]], dtype=dtype) + 15 * torch.arange(batch, dtype=dtype)[:, None]
    return orbit_cameras(elevation, azimuth, 2.4, 50.0)


def draws(*seeds: int) -> SampleDraws:
    return SampleDraws([torch.Generator().manual_seed(seed) for seed in seeds])


def images(views: Views) -> dict[str, Tensor]:
    return {part.name: getattr(views, part.name).detach() for part in fields(Views) if part.name != "cameras"}


@every
def test_it_keeps_the_protocol(renderer: Renderer) -> None:
    assert isinstance(renderer, Renderer)
    config = renderer.config
    assert isinstance(config, type(renderer).config_class)  # type: ignore[attr-defined]
    assert image_size(renderer) == (config.height, config.width)
    assert type(type(renderer).from_config(config)) is type(renderer)
    assert renderer.passes in (0, 1, 2) and renderer.field_grid is None and not renderer.accepts_grid(5)
    larger = renderer.with_config(replace(config, height=40))
    assert image_size(larger) == (40, config.width) and type(larger) is type(renderer)


@every
def test_images_have_their_shapes_and_ranges(renderer: Renderer) -> None:
    seen = cameras()
    before = seen.camera_to_world.clone(), seen.fovy.clone()
    rendered = renderer.render(balls(), seen, SIZE, 0.25, draws(0, 1))
    for name, channels in (
        ("rgb", 3), ("normal", 3), ("depth", 1), ("disparity", 1), ("opacity", 1), ("z_variance", 1),
    ):  # fmt: skip
        image = getattr(rendered.views, name)
        assert image.shape == (2, 2, *SIZE, channels) and bool(torch.isfinite(image).all()), name
    views = rendered.views
    for image in (views.rgb, views.disparity, views.opacity):
        assert bool((image >= 0).all()) and bool((image <= 1).all())
    assert bool((views.normal.norm(dim=-1, keepdim=True) <= views.opacity + 1e-3).all())
    assert bool((views.z_variance >= 0).all())
    near, far = seen.near_far
    assert bool((views.depth > near[:, :, None, None, None]).all())
    assert bool((views.depth <= far[:, :, None, None, None] + 1e-4).all())
    assert torch.equal(before[0], seen.camera_to_world) and torch.equal(before[1], seen.fovy)
    assert torch.equal(views.cameras.camera_to_world, before[0]) and torch.equal(views.cameras.fovy, before[1])
    for values in rendered.stats.values():
        assert bool(torch.isfinite(values).all()) and not values.requires_grad


@own
@pytest.mark.parametrize("distance", [1.8, 3.0])
def test_orthographic_images_are_as_large_at_any_distance(renderer: Renderer, distance: float) -> None:
    """A ball covers pi r^2 of the 2.2 x 2.2 scene units that its image spans; its middle is `distance - r` away."""
    angles = torch.tensor([[20.0, -35.0]]).expand(2, -1), torch.tensor([[0.0, 110.0]]).expand(2, -1)
    seen = orbit_cameras(*angles, distance, math.degrees(2 * math.atan(1.1 / distance)), orthographic=True)
    views = renderer.render(balls(), seen, (26, 26), 0.25).views
    covered = views.opacity.mean(dim=(2, 3, 4))
    expected = math.pi * balls().radius[:, None].square() / 2.2**2
    soft = 0.3 if getattr(renderer.config, "density", "") == "volsdf" else 0.06  # VolSDF's edge is 2 beta outside
    near = 0.06
    if isinstance(renderer, SplatRenderer):  # widened by the filter of a pixel; gaps show what is behind them
        soft, near = 0.4, 0.2
    torch.testing.assert_close(covered, expected.expand_as(covered), rtol=soft, atol=0)
    middle = views.depth[:, :, 12:14, 12:14].mean(dim=(2, 3, 4))
    torch.testing.assert_close(middle, (distance - balls().radius)[:, None].expand_as(middle), rtol=0, atol=near)


@every
@pytest.mark.parametrize("kind", ["number", "colour", "image"])
def test_the_background_is_seen_where_nothing_is(renderer: Renderer, kind: str) -> None:
    back: Any = {
        "number": 0.25,
        "colour": torch.tensor([0.1, 0.5, 0.9]),
        "image": torch.linspace(0, 1, 2 * 2 * 20 * 26 * 3).view(2, 2, 20, 26, 3),
    }[kind]
    views = renderer.render(balls(), cameras(), SIZE, back).views
    empty = (views.opacity < 1e-3)[..., 0]
    assert float(empty.float().mean()) > 0.3 and bool(empty[:, :, 0].all())
    assert bool((views.opacity[:, :, 9:11, 12:14] > 0.9).all())  # the object is in the middle
    expected = torch.as_tensor(back).expand(2, 2, *SIZE, 3)
    tolerance = 0.02 if kind == "image" and "Patch" in type(renderer).__name__ else 2e-3  # enlarged from a coarse one
    torch.testing.assert_close(views.rgb[empty], expected[empty], rtol=0, atol=tolerance)
    assert bool((views.normal[empty].abs() < 2e-3).all()) and bool((views.disparity[empty] < 2e-3).all())


@every
def test_images_teach_the_field(renderer: Renderer) -> None:
    field = balls(grad=True)
    views = renderer.render(field, cameras(), SIZE, 0.25, draws(0, 1)).views
    (by_opacity,) = torch.autograd.grad(views.opacity.sum(), field.radius, retain_graph=True)
    (by_disparity,) = torch.autograd.grad(views.disparity.sum(), field.radius, retain_graph=True)
    assert bool((by_opacity > 1).all()) and bool((by_disparity > 0).all())  # larger balls are seen larger and nearer
    (by_rgb,) = torch.autograd.grad(views.rgb.sum(), field.colour)
    area = views.opacity.detach().sum(dim=(1, 2, 3))
    torch.testing.assert_close(by_rgb, area.expand(-1, 3), rtol=1e-3, atol=1e-2)


@every
def test_a_sample_is_the_same_whatever_its_company(renderer: Renderer) -> None:
    """Rendered in a batch and alone, each with its own draws."""
    whole = images(renderer.render(balls(), cameras(), SIZE, 0.25, draws(4, 5)).views)
    seen = cameras()
    for row, seed in enumerate((4, 5)):
        part = slice(row, row + 1)
        alone = Balls(balls().radius[part], balls().colour[part])
        own_cameras = Cameras(seen.camera_to_world[part], seen.fovy[part])
        single = renderer.render(alone, own_cameras, SIZE, 0.25, draws(seed))
        for name, image in images(single.views).items():
            torch.testing.assert_close(image, whole[name][part], rtol=1e-5, atol=1e-5)


@every
def test_the_draws_decide_the_images(renderer: Renderer) -> None:
    def render(given: Draws | None) -> Tensor:
        return renderer.render(balls(), cameras(), SIZE, 0.25, given).views.rgb

    assert relative_difference(render(draws(0, 1)), render(draws(0, 1))) <= ROUNDING
    assert relative_difference(render(None), render(None)) <= ROUNDING
    assert torch.allclose(render(draws(0, 1)), render(draws(0, 2)), atol=1e-6) == (renderer.passes == 0)
    called = renderer(balls(), cameras(), height=SIZE[0], width=SIZE[1], background=0.25)
    assert relative_difference(called.rgb, render(None)) <= ROUNDING


@every
def test_a_schedule_is_a_number_at_a_step(renderer: Renderer) -> None:
    known = {"inv_std": (50.0, 150.0), "sdf_gradient_scale": (0.5, 1.5), "sharpness": (30.0, 50.0)}
    settings = [part.name for part in fields(renderer.config)]
    found = [(name, between) for name, between in known.items() if name in settings]
    if not found:
        pytest.skip(f"{type(renderer.config).__name__} has none of {', '.join(known)}; add one of its own")
    name, between = found[0]
    middle = sum(between) / 2
    scheduled = renderer.with_config(replace(renderer.config, **{name: between}))
    now = at_step(scheduled, 5, 10)
    assert getattr(now.config, name) == middle
    assert getattr(scheduled.config, name) == between
    fixed = renderer.with_config(replace(renderer.config, **{name: middle}))
    one, two = (r.render(balls(), cameras(), SIZE, 0.25).views.rgb for r in (now, fixed))
    assert relative_difference(one, two) <= ROUNDING
    if getattr(renderer.config, "density", "neus") == "neus":
        with pytest.raises(TypeError, match=r"still spans steps; take resolved\(settings, step, total\)"):
            scheduled.render(balls(), cameras(), SIZE, 0.25)


@every
def test_regularizers_take_what_it_gives(renderer: Renderer) -> None:
    field = balls(grad=True)
    rendered = renderer.render(field, cameras(), SIZE, 0.25, draws(0, 1))
    total, values = regularize(rendered, {name: (loss, 0.5) for name, loss in REGULARIZERS.items()})
    expected = {
        name
        for name, loss in REGULARIZERS.items()
        if getattr(rendered, loss.needs) is not None  # type: ignore[attr-defined]
    }
    assert values.keys() == expected
    assert all(bool(torch.isfinite(value)) and value.ndim == 0 for value in values.values())
    torch.testing.assert_close(total.detach(), 0.5 * sum(values.values(), torch.zeros(())))

    def darker(rendered: Rendered) -> Tensor:
        return rendered.views.rgb.mean()

    assert applies(darker, rendered)
    torch.testing.assert_close(regularize(rendered, {"darker": (darker, 2.0)})[0], 2 * rendered.views.rgb.mean())


@own
@pytest.mark.parametrize(("held", "asked"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kind", ["planes", "grid"])
def test_as_many_cameras_as_samples(renderer: Renderer, held: int, asked: int, kind: str) -> None:
    torch.manual_seed(0)
    field: Any = TriplaneField(0.1 * torch.randn(held, 6, 4, 8, 8), TriplaneHeads(4, 8))
    if kind == "grid":
        field = GridField(field, getattr(renderer.config, "grid_resolution", None) or 8)
    with pytest.raises(ValueError, match=rf"\b{held}\b"):
        renderer.render(field, cameras(asked), SIZE, 0.5)
    renderer.render(field, cameras(held), SIZE, 0.5)


@every
@pytest.mark.parametrize("shape", [(4,), (1, 2, 6, 5, 3), (3, 2, *SIZE, 3), (1, 1, 2, *SIZE, 3), (0, 3)])
def test_a_background_that_does_not_fit_is_named(renderer: Renderer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="background="):
        renderer.render(balls(), cameras(), SIZE, torch.zeros(shape))


@every
@pytest.mark.parametrize("size", [(1, 20), (20, 1), (0, 20)])
def test_images_below_two_pixels_are_refused(renderer: Renderer, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="height="):
        renderer.render(balls(), cameras(), size, 0.5)


@own
@pytest.mark.parametrize("answer", [None, torch.zeros(2, 4), torch.zeros(1, 5, 3)])
def test_colours_of_a_wrong_shape_are_named(renderer: Renderer, answer: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"field\.rgb returned"):
        renderer.render(balls(rgb=answer), cameras(), SIZE, 0.5)


@own
def test_a_distance_that_is_no_number_is_refused(renderer: Renderer) -> None:
    class Diverged(Balls):
        def sdf(self, points: Tensor) -> Tensor:
            return torch.where(points[..., :1] > 0.3, torch.nan, super().sdf(points))

    field = Diverged(balls().radius, balls().colour)
    with pytest.raises(ValueError, match=r"NaN"):
        renderer.render(field, cameras(), SIZE, 0.5)


GRIDS: dict[str, Callable[..., Renderer]] = {"volume": volume_renderer, "patch": patch_renderer}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_grid_is_made_once_and_given_to_all_that_accept_it(kind: str, shared: bool) -> None:
    """Also to a renderer whose company is not used now: what is seen does not depend on it."""
    asked: list[int] = []

    class Counting(Balls):
        def grid(self, resolution: int) -> tuple[Tensor, Tensor, None]:
            asked.append(resolution)
            shape = (2, *(resolution,) * 3)
            return torch.ones(shape), torch.zeros(*shape, 3), None

    renderer = GRIDS[kind](num_samples=8, grid_resolution=8)
    surface, plain = surface_renderer(grid_resolution=8 if shared else 9), volume_renderer(num_samples=8)
    field = Counting(balls().radius, balls().colour)
    grids = SharedGrids(field, [renderer, surface, plain], 2, "cpu")
    assert grids.resolutions == (8,) and not asked  # made when it is first wanted
    assert grids.field_for(plain) is field
    given = grids.field_for(surface)
    assert isinstance(given, GridField) if shared else given is field
    sampled = grids.field_for(renderer)
    assert isinstance(sampled, GridField) and sampled.resolution == 8
    assert grids.field_for(renderer) is sampled and asked == [8]
    assert not shared or given is sampled


def test_draws_belong_to_the_samples() -> None:
    both = draws(1, 2).uniform((4, 3))
    assert both.shape == (4, 3) and 0 <= float(both.min()) and float(both.max()) < 1
    assert torch.equal(both, torch.cat([draws(1).uniform((2, 3)), draws(2).uniform((2, 3))]))
    with pytest.raises(ValueError, match=r"shape=\(3, 2\): 2 generators"):
        draws(1, 2).uniform((3, 2))
