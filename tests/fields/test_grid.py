from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.fields import _grid_numba
from prd.fields.fast import grid_points
from prd.fields.grid import GridField, interpolate, sample_grid
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.isosurface.extract import extract_isosurface
from tests.rendering.made import surface_renderer, volume_renderer


class Tilted(AutogradGradient):
    """A plane n . p - offset [B], which trilinear interpolation reproduces, and a colour linear in the point."""

    normal = torch.tensor([0.6, 0.0, 0.8])

    def __init__(self, offset: Tensor) -> None:
        self.offset = offset

    def sdf(self, points: Tensor) -> Tensor:
        return (points * self.normal.to(points)).sum(-1, keepdim=True) - self.offset[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return points * points.new_tensor([0.1, 0.2, 0.3]) + 0.5

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.sdf(points), 0.25 * points


class Ball(AutogradGradient):
    def __init__(self, radius: Tensor) -> None:
        self.radius = radius

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return (0.5 + 0.4 * points).clamp(0, 1)


def test_linear_fields_are_reproduced_inside_the_cube() -> None:
    field = Tilted(torch.tensor([0.1, -0.3]))
    grid = GridField(field, 9, batch=2)
    points = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(grid.sdf(points), field.sdf(points))
    torch.testing.assert_close(grid.rgb(points), field.rgb(points))
    sdf, gradient, rgb = grid.sample(points)
    torch.testing.assert_close(sdf, field.sdf(points))
    torch.testing.assert_close(gradient, field.normal.expand(2, 50, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(rgb, field.rgb(points))
    deformation = grid.sdf_and_deformation(points)[1]
    assert deformation is not None
    torch.testing.assert_close(deformation, 0.25 * points)


def test_outside_the_distance_to_the_cube_is_added() -> None:
    grid = GridField(Tilted(torch.tensor([0.0])), 9)
    points = torch.tensor([[[3.0, 0.5, 0.0], [0.0, 0.0, -2.0], [2.0, 2.0, 0.0], [0.2, 0.1, 0.0]]])
    want = torch.tensor([0.6 + 2.0, -0.8 + 1.0, 0.6 + 2**0.5, 0.12])
    torch.testing.assert_close(grid.sdf(points)[0, :, 0], want)
    sdf, gradient = grid.sdf_and_gradient(points)
    torch.testing.assert_close(sdf[0, :, 0], want)
    half = 0.5**0.5
    want_gradient = torch.tensor([[1.0, 0, 0.8], [0.6, 0, -1], [half, half, 0.8], [0.6, 0, 0.8]])
    torch.testing.assert_close(gradient[0], want_gradient, rtol=0, atol=1e-5)


def test_a_triplane_field_is_taken_by_its_own_grid() -> None:
    torch.manual_seed(0)
    planes = torch.randn(2, 6, 4, 8, 8, requires_grad=True)
    field = TriplaneField(planes, TriplaneHeads(4, 8))
    grid = GridField(field, 6)
    nodes = grid_points(6).view(1, -1, 3).expand(2, -1, -1)
    torch.testing.assert_close(grid.sdf(nodes), field.sdf(nodes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.rgb(nodes), field.rgb(nodes), rtol=1e-4, atol=1e-5)
    sdf, gradient, rgb = grid.sample(nodes * 0.9)
    (sdf.sum() + gradient.square().sum() + rgb.sum()).backward()
    assert planes.grad is not None and (planes.grad.flatten(2).abs().sum(-1) > 0).all()


def test_gradients_to_the_field_agree_with_finite_differences() -> None:
    points = torch.rand(1, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8

    class Float64Ball(Ball):
        """Grid nodes are float32; the values on them are not."""

        def sdf(self, points: Tensor) -> Tensor:
            return super().sdf(points.double())

        def rgb(self, points: Tensor) -> Tensor:
            return (self.radius * points.double()).sin()

    def values(radius: Tensor) -> Tensor:
        sdf, gradient, rgb = GridField(Float64Ball(radius), 8).sample(points)
        return torch.cat([sdf, gradient, rgb], dim=-1)

    radius = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(values, radius)


def test_rendering_a_grid_agrees_with_rendering_the_field() -> None:
    ball = Ball(torch.tensor([0.5, 0.65]))
    cameras = orbit_cameras(torch.full((2, 2), 20.0), torch.tensor([[0.0, 100.0]]).expand(2, -1), 2.4, 50.0)
    renderer = volume_renderer(num_samples=48, inv_std=64.0)
    exact = renderer(ball, cameras, height=16, width=16)
    rendered = renderer.render(GridField(ball, 64, batch=2), cameras, (16, 16), 0.5)
    views, samples = rendered.views, rendered.samples
    assert samples is not None
    assert (views.opacity - exact.opacity).abs().max() < 0.05
    assert (views.rgb - exact.rgb).abs().max() < 0.03
    assert (views.normal - exact.normal).norm(dim=-1).mean() < 0.02
    assert samples.gradient.shape == (2, 64**3, 3)  # the eikonal loss sees the nodes
    assert (samples.gradient.norm(dim=-1) - 1).abs().median() < 0.01


def test_the_isosurface_reuses_the_grid() -> None:
    ball = Ball(torch.tensor([0.5]))
    (reused, faces), (direct, want) = extract_isosurface(GridField(ball, 16), 16)[0], extract_isosurface(ball, 16)[0]
    assert torch.equal(faces, want)
    torch.testing.assert_close(reused, direct)


def test_a_half_precision_field_is_interpolated_in_float32() -> None:
    class Half(Ball):
        def sdf(self, points: Tensor) -> Tensor:
            return super().sdf(points).bfloat16()

        def rgb(self, points: Tensor) -> Tensor:
            return super().rgb(points).bfloat16()

    points = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    radius = torch.tensor([0.5])
    half, full = GridField(Half(radius), 16), GridField(Ball(radius), 16)
    assert half.sdf(points).dtype == torch.float32
    torch.testing.assert_close(half.sdf(points), full.sdf(points), rtol=0, atol=0.01)


def test_a_field_of_the_wrong_shape_is_named() -> None:
    class Grey(Ball):
        def rgb(self, points: Tensor) -> Tensor:
            return super().rgb(points)[..., :1]

    class Flat(Ball):
        def sdf(self, points: Tensor) -> Tensor:
            return super().sdf(points)[..., 0]

    class Gridded(Ball):
        def grid(self, resolution: int) -> tuple[Tensor, Tensor, None]:
            return torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), None

    radius = torch.tensor([0.5])
    for field, message in (
        (Grey(radius), "rgb returned"),
        (Flat(radius), "sdf_and_deformation"),
        (Gridded(radius), "rgb of"),
    ):
        with pytest.raises(ValueError, match=rf"field(: |\.){message}"):
            GridField(field, 4)
    cameras = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 50.0)
    with pytest.raises(ValueError, match=r"field\.rgb returned"):
        surface_renderer(grid_resolution=8)(Grey(radius), cameras, height=8, width=8)
    with pytest.raises(ValueError, match="batch says how many"):
        GridField(Ball(torch.tensor([0.5, 0.4])), 4)


def test_misuse_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="resolution=1"):
        GridField(Ball(torch.tensor([0.5])), 1)
    grid = GridField(Ball(torch.tensor([0.5])), 8)
    with pytest.raises(ValueError, match="resolution=16"):
        grid.grid(16)
    with pytest.raises(ValueError, match="points"):
        grid.sdf(torch.zeros(3, 5, 3))


def test_a_dense_grid_has_its_gradient_under_autocast() -> None:
    torch.manual_seed(0)
    heads, planes = TriplaneHeads(4, 8), torch.randn(1, 6, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        sdf, rgb, _ = TriplaneField(planes, heads).grid(6)
    assert rgb is not None
    (gradient,) = torch.autograd.grad(sdf.float().sum() + rgb.float().sum(), planes)
    sdf, rgb, _ = TriplaneField(planes, heads).grid(6)
    assert rgb is not None
    (exact,) = torch.autograd.grad(sdf.sum() + rgb.sum(), planes)
    assert (gradient - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [slice(0, 7), slice(0, 4), slice(4, 7)])
@pytest.mark.parametrize("points_per_job", [1 << 14, 7])
def test_the_compiled_lookup_is_grid_sample(channels, dtype, points_per_job, monkeypatch) -> None:
    """Values and gradients, inside the cube, on its border and beyond, in one job and in several."""
    monkeypatch.setattr(_grid_numba, "POINTS_PER_JOB", points_per_job)
    draw = torch.Generator().manual_seed(0)
    volume = torch.rand(2, 5, 5, 5, 7, generator=draw, dtype=dtype).requires_grad_()
    points = torch.rand(2, 60, 3, generator=draw, dtype=dtype) * 2.6 - 1.3
    points[0, :3] = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    wanted = sample_grid(volume[..., channels], points)
    found = interpolate(volume, points, channels)
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(found, wanted, **tolerance)
    weights = torch.rand(found.shape, generator=draw, dtype=dtype)
    gradients = [torch.autograd.grad((values * weights).sum(), volume)[0] for values in (found, wanted)]
    torch.testing.assert_close(*gradients, **tolerance)


def test_the_compiled_lookup_of_nothing_and_of_nan() -> None:
    volume = torch.rand(1, 4, 4, 4, 2).requires_grad_()
    assert interpolate(volume, torch.empty(1, 0, 3)).shape == (1, 0, 2)
    points = torch.tensor([[[torch.nan, 0, 0], [torch.inf, 0, 0], [1, 0, 0]]])
    values = interpolate(volume, points)
    assert values[0, 0].isnan().all()
    torch.testing.assert_close(values[0, 1], values[0, 2])


@pytest.mark.parametrize("points_per_job", [1 << 14, 5])
def test_distances_along_rays_are_those_at_their_points(points_per_job, monkeypatch) -> None:
    monkeypatch.setattr(_grid_numba, "POINTS_PER_JOB", points_per_job)
    draw = torch.Generator().manual_seed(0)
    grid = GridField(Ball(torch.tensor([0.4, 0.7])), 8, batch=2)
    origins, directions = (torch.rand(2, 9, 3, generator=draw) * 4 - 2 for _ in range(2))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    t = torch.rand(2, 9, 6, generator=draw) * 4
    points = origins[:, :, None] + t[..., None] * directions[:, :, None]
    assert (points.abs() > 1).any() and (points.abs() < 1).all(dim=-1).any()
    wanted = grid.sdf(points.flatten(1, 2)).view(t.shape)
    torch.testing.assert_close(grid.sdf_along(origins, directions, t), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="with B = 2"):
        grid.sdf_along(origins[:1], directions[:1], t[:1])
    # rays of another type than the grid take the way that every device has
    doubled = grid.sdf_along(origins.double(), directions.double(), t.double())
    torch.testing.assert_close(doubled.float(), wanted, rtol=0, atol=1e-5)
