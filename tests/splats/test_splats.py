"""Splats on surfaces: where they lie, how they are turned, and what trained heads do to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.fields.grid import GridField
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.isosurface.extract import EmptySurfaceError, extract_isosurface
from prd.rendering.sphere_trace import SphereTracer
from prd.splats.project import rotation_matrices
from prd.splats.splats import REACH, THICKNESS, Splats, extract_splats, normal_rotations, splats_on, vertex_areas
from prd.toybox.world import ExactField
from tests.rendering.made import splat_renderer, surface_renderer
from tests.splats.made import random_splats


def triplane(splats: bool = True, seed: int = 0) -> TriplaneField:
    """Two near-spheres whose splat heads, if there are any, answer something."""
    torch.manual_seed(seed)
    planes = 0.3 * torch.randn(2, 6, 4, 8, 8)
    heads = TriplaneHeads(4, 8, sdf_init_scale=0.1, splats=splats)
    if heads.splats is not None:
        torch.nn.init.normal_(heads.splats.get_parameter("4.weight"))
    return TriplaneField(planes, heads)


def test_a_ball_is_covered_by_discs_along_its_surface() -> None:
    (splats,) = extract_splats(ExactField(["a red sphere"]), 24)
    radius = splats.means.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.68), rtol=0, atol=0.01)
    assert float((splats.normals() * splats.means / radius).sum(-1).min()) > 0.97
    assert torch.equal(splats.scales[:, 0], splats.scales[:, 1])
    torch.testing.assert_close(splats.scales[:, 2], THICKNESS * splats.scales[:, 0])
    area = float((math.pi * splats.scales[:, 0] ** 2).sum())
    assert area == pytest.approx(4 * math.pi * 0.68**2, rel=0.02)
    torch.testing.assert_close(splats.colors, ExactField(["a red sphere"]).rgb(splats.means[None])[0])


def test_normals_of_every_direction_are_met() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    axes = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])
    normals = torch.nn.functional.normalize(torch.cat([drawn, axes]), dim=-1)
    rotations = normal_rotations(normals)
    torch.testing.assert_close(rotation_matrices(rotations)[..., 2], normals)
    torch.testing.assert_close(rotations.norm(dim=-1), torch.ones(len(normals), dtype=torch.float64))
    nowhere = normal_rotations(torch.zeros(1, 3, dtype=torch.float64))
    assert nowhere.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_areas_of_vertices_are_shares_of_their_faces() -> None:
    vertices = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [2.0, 3.0, 0.0]])
    areas = vertex_areas(vertices, torch.tensor([[0, 1, 2], [1, 3, 2]]))
    assert areas.tolist() == [1.0, 2.0, 2.0, 1.0]


def test_heads_that_answer_nothing_change_nothing() -> None:
    """A new head begins there, and the planes' other heads are drawn as without it."""
    torch.manual_seed(3)
    plain = TriplaneHeads(4, 8)
    torch.manual_seed(3)
    fresh = TriplaneHeads(4, 8, splats=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    added = {name for name in fresh.state_dict() if name not in plain.state_dict()}
    assert added == {"splats.0.weight", "splats.2.weight", "splats.4.weight"}
    planes = 0.3 * torch.randn(2, 6, 4, 8, 8)
    for one, other in zip(extract_splats(TriplaneField(planes, plain), 12, batch=2),
                          extract_splats(TriplaneField(planes, fresh), 12, batch=2), strict=True):  # fmt: skip
        for name in ("means", "scales", "rotations", "opacities", "colors"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=2e-3)


def test_heads_move_within_their_reach_and_are_taught_by_images() -> None:
    field = triplane()
    with torch.no_grad():
        surfaces = extract_isosurface(field, 12, batch=2)
        drawn = splats_on(field, surfaces)
    for splats, (vertices, faces) in zip(drawn, surfaces, strict=True):
        sigma = (vertex_areas(vertices, faces).clamp_min(1e-8) / math.pi).sqrt()
        moved = (splats.means - vertices).abs().amax(-1)
        assert bool((moved <= REACH * sigma + 1e-6).all()) and float(moved.max()) > 0
        assert bool((splats.scales > 0).all()) and bool(((splats.opacities > 0) & (splats.opacities < 1)).all())
    cameras = orbit_cameras(torch.full((2, 1), 20.0), torch.full((2, 1), 30.0), 2.4, 50.0)
    views = splat_renderer(grid_resolution=12).render(field, cameras, (16, 16), 0.5).views
    (views.rgb.square().mean() + views.opacity.square().mean()).backward()
    assert field.heads.splats is not None
    for name, parameter in field.heads.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        if not name.startswith("deformation"):
            assert float(parameter.grad.abs().max()) > 0, name


def test_a_sample_is_that_of_the_batch() -> None:
    field = triplane()
    both = extract_splats(field, 12, batch=2)
    for index, splats in enumerate(both):
        (alone,) = extract_splats(field.select(index), 12)
        torch.testing.assert_close(alone.means, splats.means)
        torch.testing.assert_close(alone.colors, splats.colors)


def test_a_field_without_heads_gets_splats_too() -> None:
    field = triplane(splats=False)
    for source in (field, GridField(field, 12, 2)):
        assert all(len(splats) > 50 for splats in extract_splats(source, 12, batch=2))


def test_an_empty_surface_is_flagged_or_raised() -> None:
    field: Any = ExactField(["a red sphere"])

    class Nothing(ExactField):
        def sdf(self, points: Tensor) -> Tensor:
            return super().sdf(points) + 9

    field = Nothing(["a red sphere"])
    with pytest.raises(EmptySurfaceError):
        extract_splats(field, 8)
    (none,) = extract_splats(field, 8, on_empty="flag")
    assert len(none) == 0
    cameras = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 50.0)
    rendered = splat_renderer(on_empty="flag", grid_resolution=8).render(field, cameras, (8, 8), 0.3)
    assert float(rendered.views.opacity.max()) == 0 and rendered.stats["surfaces_empty"].tolist() == [1.0]
    torch.testing.assert_close(rendered.views.rgb, torch.full_like(rendered.views.rgb, 0.3))


def test_renders_are_like_the_exact_ones() -> None:
    """A red cube, beside the mesh of the same grid."""
    field = ExactField(["a red cube"])
    cameras = orbit_cameras(torch.tensor([[25.0, -20.0]]), torch.tensor([[30.0, 200.0]]), 2.6, 50.0)
    exact = SphereTracer(3)(field, cameras, height=48, width=48)
    errors = {}
    for name, renderer in (
        ("mesh", surface_renderer(grid_resolution=40)),
        ("splats", splat_renderer(grid_resolution=40)),
    ):
        views = renderer(field, cameras, height=48, width=48)
        errors[name] = float((views.rgb - exact.rgb).square().mean())
        assert float((views.opacity - exact.opacity).abs().mean()) < 0.04
        seen = exact.opacity[..., 0] > 0.99
        assert float((views.depth - exact.depth)[seen].abs().mean()) < 0.1
        assert float((views.normal * exact.normal).sum(-1)[seen].mean()) > 0.8
    assert errors["mesh"] < errors["splats"] < 2e-3  # outlines and edges are blurred by the pixel's filter


def test_supersampled_images_are_means() -> None:
    field, cameras = ExactField(["a red cube"]), orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 50.0)
    fine = splat_renderer(grid_resolution=16).render(field, cameras, (20, 20), 0.5).views.opacity
    coarse = splat_renderer(grid_resolution=16, supersample=2).render(field, cameras, (10, 10), 0.5).views.opacity
    means = fine.unflatten(2, (10, 2)).unflatten(4, (10, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(coarse, means)


@pytest.mark.parametrize("name", ["scales", "rotations", "opacities", "colors"])
def test_tensors_of_other_shapes_are_named(name: str) -> None:
    splats = random_splats(4)
    tensors = {part: getattr(splats, part) for part in ("means", "scales", "rotations", "opacities", "colors")}
    with pytest.raises(ValueError, match=f"{name}="):
        Splats(**{**tensors, name: tensors[name][1:]})
