"""The contract of `Field`, over every representation: what renderers, exporters and metrics may rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prd.fields.fast import (
    evaluate_grid,
    evaluate_nodes,
    grid_points,
    grid_slabs,
    node_gradient,
    one_sample,
    sample,
    sdf_along,
    some_samples,
)
from prd.fields.grid import GridField
from prd.fields.hash_grid import FeatureGrids
from prd.fields.positional_triplane import PositionalHeads, PositionalTriplaneField
from prd.fields.protocol import AutogradGradient, Field, FieldSamples
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.generators.att3d import Att3dConfig, HyperField
from prd.toybox.world import ExactField

BATCH, RESOLUTION = 2, 7


class Spheres(AutogradGradient):
    """The least that a field must write: `sdf` and `rgb`."""

    def __init__(self, radius: Tensor) -> None:
        self.radius = radius

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return torch.sigmoid(points * self.radius[:, None, None])


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def triplane(count: int, dtype: torch.dtype) -> tuple[TriplaneField, Tensor]:
    torch.manual_seed(0)
    planes = draw(count, 6, 4, 6, 7, dtype=dtype).requires_grad_()
    return TriplaneField(planes, TriplaneHeads(4, 16, sdf_init_scale=0.3).to(dtype)), planes


def positional(dtype: torch.dtype) -> tuple[Field, Tensor]:
    torch.manual_seed(0)
    planes = draw(BATCH, 3, 4, 6, 7, dtype=dtype).requires_grad_()
    heads = PositionalHeads(4, 16, 2, sdf_init_scale=0.3).to(dtype)
    return PositionalTriplaneField(planes, planes, heads), planes


def hyper(representation: str, dtype: torch.dtype) -> tuple[Field, Tensor]:
    torch.manual_seed(0)
    config = Att3dConfig(resolutions=(3, 5, 9), table_size=200, head_width=16, representation=representation)  # type: ignore[arg-type]
    grids = FeatureGrids(config.resolutions, config.features, config.table_size)  # two dense levels, one hashed
    head = nn.Sequential(nn.Linear(grids.channels, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    parameters = (0.5 * draw(BATCH, grids.num_parameters, dtype=dtype)).requires_grad_()
    return HyperField(parameters, grids, head, config), parameters


def spheres(dtype: torch.dtype) -> tuple[Field, Tensor]:
    radius = torch.tensor([0.4, 0.7], dtype=dtype, requires_grad=True)
    return Spheres(radius), radius


def grid_of_triplane(dtype: torch.dtype) -> tuple[Field, Tensor]:
    field, planes = triplane(BATCH, dtype)
    return GridField(field, RESOLUTION), planes


def some_of_spheres(dtype: torch.dtype) -> tuple[Field, Tensor]:
    radius = torch.tensor([0.4, 0.5, 0.7], dtype=dtype, requires_grad=True)
    return FieldSamples(Spheres(radius), [2, 0], 3), radius


def toy(dtype: torch.dtype) -> tuple[Field, None]:
    return ExactField(["a red cube", "a green arrow on a blue cylinder"]), None


@dataclass(frozen=True)
class Member:
    """A representation: `make(dtype)` gives a field of two samples and what it is made of, None: nothing is learned."""

    make: Callable[[torch.dtype], tuple[Field, Tensor | None]]
    smooth: bool = True  # its gradient is that at the point; else the central difference over a grid's spacing


MEMBERS = {
    "triplane": Member(lambda dtype: triplane(BATCH, dtype)),
    "positional_triplane": Member(positional),
    "hash_grid_density": Member(lambda dtype: hyper("density", dtype)),
    "hash_grid_sdf": Member(lambda dtype: hyper("sdf", dtype)),
    "grid": Member(grid_of_triplane, smooth=False),
    "exact_toy": Member(toy),
    "field_samples": Member(some_of_spheres),
    "two_methods": Member(spheres),
}

every = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
learned = pytest.mark.parametrize(
    "member", [m for name, m in MEMBERS.items() if name != "exact_toy"], ids=[n for n in MEMBERS if n != "exact_toy"]
)


def inside_cube(count: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points [B, N, 3] within the cube, other ones for each sample."""
    return torch.rand(BATCH, count, 3, generator=torch.Generator().manual_seed(3), dtype=dtype) * 1.8 - 0.9


def nodes(resolution: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return grid_points(resolution, dtype=dtype).view(1, -1, 3).expand(BATCH, -1, -1)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_have_their_shapes_ranges_type_and_place(member: Member, dtype: torch.dtype) -> None:
    field, _ = member.make(dtype)
    points = inside_cube(dtype=dtype)
    sdf, deformation = field.sdf_and_deformation(points)
    same, gradient = field.sdf_and_gradient(points)
    rgb = field.rgb(points)
    assert sdf.shape == same.shape == (BATCH, 40, 1) and rgb.shape == gradient.shape == (BATCH, 40, 3)
    assert deformation is None or deformation.shape == (BATCH, 40, 3)
    for values in (field.sdf(points), sdf, same, gradient, rgb, *(() if deformation is None else (deformation,))):
        assert values.dtype == dtype and values.device == points.device and bool(torch.isfinite(values).all())
    assert 0 <= float(rgb.detach().min()) and float(rgb.detach().max()) <= 1
    torch.testing.assert_close(sdf, field.sdf(points))
    torch.testing.assert_close(same, field.sdf(points))
    assert field.sdf(points[:, :0]).shape == (BATCH, 0, 1)  # no points are asked where no ray hits


@every
def test_the_distance_is_positive_outside_and_negative_somewhere_inside(member: Member) -> None:
    field, _ = member.make(torch.float64)
    with torch.no_grad():
        assert bool((field.sdf(nodes(2)) > 0).all())  # the corners of the cube
        assert bool((field.sdf(nodes(RESOLUTION)) < 0).flatten(1).any(dim=1).all())


@every
def test_the_gradient_is_the_slope_of_the_distance(member: Member) -> None:
    """Against central differences in float64."""
    field, _ = member.make(torch.float64)
    points, step = (inside_cube(), 1e-6) if member.smooth else (nodes(RESOLUTION), 2 / (RESOLUTION - 1))
    if not member.smooth:
        points = points[:, (points[0].abs() < 0.99).all(dim=-1)]  # the nodes that have neighbours on both sides
    _, gradient = field.sdf_and_gradient(points)
    assert float(gradient.detach().norm(dim=-1).mean()) > 0.1
    for axis in range(3):
        offset = step * torch.eye(3, dtype=torch.float64)[axis]
        slope = (field.sdf(points + offset) - field.sdf(points - offset)) / (2 * step)
        torch.testing.assert_close(gradient[..., axis : axis + 1], slope, rtol=1e-5, atol=1e-5)


@every
def test_the_gradient_has_a_graph_only_where_gradients_are_made(member: Member) -> None:
    field, parameter = member.make(torch.float32)
    with torch.no_grad():
        assert not any(values.requires_grad for values in field.sdf_and_gradient(inside_cube(dtype=torch.float32)))
    if parameter is not None:
        points = inside_cube(dtype=torch.float32)
        assert field.sdf_and_gradient(points)[1].requires_grad and not points.requires_grad


@learned
@pytest.mark.parametrize("answer", ["sdf", "rgb"])
def test_distance_and_colour_teach_what_the_field_is_made_of(member: Member, answer: str) -> None:
    field, parameter = member.make(torch.float64)
    assert parameter is not None
    (gradient,) = torch.autograd.grad(getattr(field, answer)(inside_cube()).sum(), parameter)
    assert bool(gradient.any()) and bool(torch.isfinite(gradient).all())


@learned
def test_the_slope_at_a_parameter_is_right(member: Member) -> None:
    """The derivative of a random sum of all answers along a random direction, against central differences."""
    points, step = inside_cube(12), 1e-6

    def total(field: Field) -> Tensor:
        answers = torch.cat([field.sdf(points), field.rgb(points), field.sdf_and_gradient(points)[1]], dim=-1)
        return (answers * answers.new_tensor([1.0, -2.0, 0.5, 1.5, 0.2, -0.3, 0.4])).sum()

    field, parameter = member.make(torch.float64)
    assert parameter is not None
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(total(field), parameter)
    values = []
    for sign in (1, -1):
        field, parameter = member.make(torch.float64)
        assert parameter is not None
        with torch.no_grad():
            parameter += sign * step * direction
        values.append(total(_again(field, member, parameter)).detach())
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-5)


def _again(field: Field, member: Member, parameter: Tensor) -> Field:
    """The field of changed parameters; one that was sampled beforehand is sampled again."""
    if not isinstance(field, GridField):
        return field
    heads = triplane(BATCH, torch.float64)[0].heads
    return GridField(TriplaneField(parameter.detach(), heads), RESOLUTION)


@every
def test_some_samples_are_those_rows(member: Member) -> None:
    field, _ = member.make(torch.float64)
    points = inside_cube()
    assert some_samples(field, range(BATCH), BATCH) is field
    turned, alone = some_samples(field, [1, 0], BATCH), one_sample(field, 1, BATCH)
    for part, rows in ((turned, [1, 0]), (alone, [1])):
        torch.testing.assert_close(part.sdf(points[rows]), field.sdf(points)[rows])
        torch.testing.assert_close(part.rgb(points[rows]), field.rgb(points)[rows])
        torch.testing.assert_close(part.sdf_and_gradient(points[rows])[1], field.sdf_and_gradient(points)[1][rows])
        theirs, ours = part.sdf_and_deformation(points[rows])[1], field.sdf_and_deformation(points)[1]
        assert (theirs is None) == (ours is None)
        if theirs is not None and ours is not None:
            torch.testing.assert_close(theirs, ours[rows])


@every
def test_a_grid_is_the_answers_at_its_nodes(member: Member) -> None:
    """At once, in slabs, and for the geometry alone; a field's own way and the one of all fields."""
    field, _ = member.make(torch.float32)
    points = nodes(RESOLUTION, torch.float32)
    shape = (BATCH, *(RESOLUTION,) * 3)
    wanted_sdf, wanted_deformation = field.sdf_and_deformation(points)
    alike: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            sdf, rgb, deformation = evaluate_nodes(field, RESOLUTION, BATCH)
            whole = evaluate_grid(field, RESOLUTION, BATCH)
            slabs = list(grid_slabs(field, RESOLUTION, 3, batch=BATCH))
        torch.testing.assert_close(sdf, wanted_sdf.view(shape), **alike)
        torch.testing.assert_close(rgb, field.rgb(points).view(*shape, 3), **alike)
        torch.testing.assert_close(whole[0], sdf, **alike)
        torch.testing.assert_close(torch.cat([part for part, _ in slabs], dim=1), sdf, **alike)
        for offsets in (deformation, whole[1]):
            assert (offsets is None) == (wanted_deformation is None)
            if offsets is not None and wanted_deformation is not None:
                torch.testing.assert_close(offsets, wanted_deformation.view(*shape, 3), **alike)
        if wanted_deformation is not None:
            parts = [part for _, part in slabs if part is not None]
            torch.testing.assert_close(torch.cat(parts, dim=1), wanted_deformation.view(*shape, 3), **alike)


@every
def test_the_faster_ways_give_what_the_plain_ones_give(member: Member) -> None:
    field, _ = member.make(torch.float64)
    points = inside_cube()
    sdf, gradient, rgb = sample(field, points)
    torch.testing.assert_close(sdf, field.sdf(points))
    torch.testing.assert_close(gradient, field.sdf_and_gradient(points)[1])
    torch.testing.assert_close(rgb, field.rgb(points))
    origins, directions = inside_cube(5), torch.nn.functional.normalize(inside_cube(5) - 0.1, dim=-1)
    t = torch.rand(BATCH, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = origins[:, :, None] + t[..., None] * directions[:, :, None]
    torch.testing.assert_close(sdf_along(field, origins, directions, t), field.sdf(along.flatten(1, 2)).view(t.shape))
    nodal = node_gradient(field)
    assert nodal is None or nodal.shape == (BATCH, *(RESOLUTION,) * 3, 3)


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 4, 3), (2, 4, 2), (4, 3)])
@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "two_methods"])
def test_points_of_a_wrong_shape_are_named(name: str, shape: tuple[int, ...]) -> None:
    field, _ = MEMBERS[name].make(torch.float32)
    for ask in (field.sdf, field.rgb, field.sdf_and_deformation):
        with pytest.raises(ValueError, match=r"points=\(.*\): expected \["):
            ask(torch.zeros(shape))
