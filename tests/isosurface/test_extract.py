"""The isosurface: closed in every ambiguous case, oriented, differentiable, honest about an empty field."""

import pytest
import torch

from prd.fields.fast import evaluate_grid, grid_points
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.isosurface._cube_cases import CORNERS, EDGES, cube_cases
from prd.isosurface.extract import (
    EmptySurfaceError,
    ensure_surface,
    extract_isosurface,
    grid_to_meshes,
    meshes_from_slabs,
)
from prd.isosurface.marching_cubes import marching_cubes, pad_border
from prd.isosurface.marching_tetrahedra import marching_tetrahedra
from tests.compare import ROUNDING, relative_difference

WAYS = [pytest.param(marching_cubes, id="cubes"), pytest.param(marching_tetrahedra, id="tetrahedra")]


class Ball(AutogradGradient):
    """Balls around (0.1, 0, -0.2), of one radius a sample."""

    def __init__(self, *radii):
        self.radii = torch.tensor(radii)[:, None, None]
        self.centre = torch.tensor([0.1, 0.0, -0.2])

    def sdf(self, points):
        return (points - self.centre).norm(dim=-1, keepdim=True) - self.radii

    def rgb(self, points):
        return torch.full_like(points, 0.5)


def directed_edges(faces):
    return torch.stack([faces, faces.roll(-1, 1)], dim=-1).view(-1, 2)


def assert_closed(faces):
    """Every directed edge occurs once, and so does its reverse: a closed, oriented 2-manifold along its edges."""
    edges = directed_edges(faces)
    count = int(faces.max()) + 1
    forward = (edges[:, 0] * count + edges[:, 1]).sort()[0]
    backward = (edges[:, 1] * count + edges[:, 0]).sort()[0]
    assert forward.tolist() == backward.tolist()
    assert len(forward.unique()) == len(forward)


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return (a * torch.linalg.cross(b, c)).sum() / 6


def blobs(generator, size):
    """Smooth random fields: white noise, low-pass filtered."""
    noise = torch.randn(1, 1, size + 4, size + 4, size + 4, generator=generator)
    return torch.nn.functional.avg_pool3d(noise, 5, stride=1)[0, 0]


@pytest.mark.parametrize("kind", ["white noise", "smooth", "signs only", "thin sheet"])
@pytest.mark.parametrize("marching", WAYS)
def test_random_fields_give_closed_surfaces(kind, marching):
    generator = torch.Generator().manual_seed(7)
    for _ in range(60):  # 240 fields over the four kinds, by either way of cutting cells
        if kind == "white noise":
            sdf = torch.randn(7, 8, 9, generator=generator)
        elif kind == "smooth":
            sdf = blobs(generator, 12)
        elif kind == "signs only":
            sdf = torch.randint(0, 2, (8, 7, 6), generator=generator) * 2.0 - 1
        else:
            sdf = blobs(generator, 12).abs() - 0.01
        vertices, faces = marching(pad_border(sdf)[0])
        assert_closed(faces)
        assert faces.unique().tolist() == list(range(len(vertices)))  # welded: no vertex without a face
        assert volume(vertices, faces) > 0


def test_table_separates_exactly_what_the_signs_separate():
    cases = cube_cases()
    assert cases[0] == cases[255] == [] and max(map(len, cases)) == 5
    for case, triangles in enumerate(cases):
        cut = {
            index
            for index, (axis, corner) in enumerate(EDGES)
            if (case >> CORNERS.index(corner) & 1) != (case >> CORNERS.index(corner) + (4, 2, 1)[axis] & 1)
        }
        assert {edge for triangle in triangles for edge in triangle} == cut


@pytest.mark.parametrize("marching", WAYS)
def test_sphere_has_its_radius_volume_and_outward_normals(marching):
    ((vertices, faces),) = extract_isosurface(Ball(0.6), 48, marching=marching)
    centred = vertices - torch.tensor([0.1, 0.0, -0.2])
    assert (centred.norm(dim=-1) - 0.6).abs().max() < 2e-3
    assert volume(vertices, faces).item() == pytest.approx(4 / 3 * torch.pi * 0.6**3, rel=0.01)
    a, b, c = (centred[faces[:, k]] for k in range(3))
    assert ((torch.linalg.cross(b - a, c - a) * (a + b + c)).sum(-1) > -1e-9).all()
    assert len(vertices) - 3 * len(faces) // 2 + len(faces) == 2  # Euler characteristic of a sphere


def test_axes_keep_their_order():
    sdf = torch.ones(4, 5, 6)
    sdf[1, 2, 3] = -1
    vertices, faces = marching_cubes(sdf)
    torch.testing.assert_close(vertices.mean(dim=0), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(volume(vertices, faces), torch.tensor(1 / 6))  # an octahedron of half-diagonal 0.5


@pytest.mark.parametrize("marching", WAYS)
def test_gradient_matches_finite_differences(marching):
    generator = torch.Generator().manual_seed(1)
    sdf = torch.randn(4, 4, 3, generator=generator, dtype=torch.float64)
    sdf = sdf.sign() * (sdf.abs() + 0.1)  # away from zero, where the topology would change
    deformation = 0.3 * torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64).clamp(-1, 1)
    arguments = (sdf.requires_grad_(), deformation.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, d: marching(s, d, 0.02)[0], arguments)


def test_deformation_moves_nodes_and_stops_at_half_a_cell():
    ((plain, _),) = extract_isosurface(Ball(0.5), 24)
    sdf, _ = evaluate_grid(Ball(0.5), 24)
    offset = torch.tensor([0.25, 0.0, -3.0]).expand(1, 24, 24, 24, 3)
    ((moved, _),) = grid_to_meshes(sdf, offset)
    cell = 2 / 23
    torch.testing.assert_close(moved - plain, torch.tensor([0.25, 0.0, -0.5]).mul(cell).expand_as(plain))


def test_gradient_stays_finite_where_the_field_is_almost_zero():
    sdf = torch.full((3, 3, 3), 1e-42)
    sdf[1, 1, 1] = -1e-42
    sdf.requires_grad_()
    vertices, _ = marching_cubes(sdf)
    vertices.square().sum().backward()
    assert torch.isfinite(vertices).all() and torch.isfinite(sdf.grad).all()


def test_a_shape_cut_by_the_cube_is_closed_there():
    meshes = extract_isosurface(Ball(0.5, 1.3), 20, batch=2)
    for vertices, faces in meshes:
        assert_closed(faces)
        assert vertices.abs().max() <= 1 + 1 / 19 + 1e-6
    assert len(meshes[1][0]) != len(meshes[0][0])


@pytest.mark.parametrize("marching", WAYS)
@pytest.mark.parametrize("max_nodes", [1, 3000, 9000])
@pytest.mark.parametrize("deformed", [False, True])
def test_slabs_give_the_mesh_of_the_whole(marching, max_nodes, deformed):
    """Vertex by vertex, for a shape that leaves the cube, one within it and white noise; with equal gradients."""
    resolution = 20
    generator = torch.Generator().manual_seed(2)
    points = grid_points(resolution).view(1, -1, 3)
    sdf = torch.cat([Ball(1.1).sdf(points), Ball(0.4).sdf(points), torch.randn(1, 20**3, 1, generator=generator)])
    sdf = sdf.view(3, *[resolution] * 3).requires_grad_()
    offset = 0.6 * torch.randn(3, *[resolution] * 3, 3, generator=generator) if deformed else None

    class Gridded(Ball):
        def geometry_grid(self, resolution, first, last):
            return sdf[:, first:last], None if offset is None else offset[:, first:last]

    whole = extract_isosurface(Gridded(0.0), resolution, batch=3, level=0.03, marching=marching)
    slabs = extract_isosurface(Gridded(0.0), resolution, batch=3, level=0.03, marching=marching, max_nodes=max_nodes)
    for (vertices, faces), (stitched, same) in zip(whole, slabs, strict=True):
        assert torch.equal(faces, same)
        torch.testing.assert_close(stitched, vertices, rtol=0, atol=1e-6)
        one, two = (torch.autograd.grad(v.square().sum(), sdf, retain_graph=True)[0] for v in (vertices, stitched))
        torch.testing.assert_close(one, two)


def test_a_triplane_field_in_slabs_gives_the_mesh_of_the_whole():
    torch.manual_seed(0)
    field = TriplaneField(0.3 * torch.randn(2, 6, 8, 12, 12), TriplaneHeads(8, 16))
    with torch.no_grad():
        field.heads.deformation.get_parameter("4.weight").mul_(10)
        whole = extract_isosurface(field, 40, batch=2)
        for (vertices, faces), (stitched, same) in zip(
            whole, extract_isosurface(field, 40, batch=2, max_nodes=30_000), strict=True
        ):
            assert torch.equal(faces, same)
            torch.testing.assert_close(vertices, stitched, atol=1e-6, rtol=0)


def test_grid_is_used_and_agrees_with_points():
    class Gridded(Ball):
        def grid(self, resolution):
            points = grid_points(resolution).view(1, -1, 3)
            shape = (len(self.radii), resolution, resolution, resolution)
            return self.sdf(points).view(shape), self.rgb(points).view(1, *shape[1:], 3), None

        def sdf_and_deformation(self, points):
            raise AssertionError("the grid is the faster way")

    ((fast, _), _) = extract_isosurface(Gridded(0.5, 0.6), 16)
    ((slow, _), _) = extract_isosurface(Ball(0.5, 0.6), 16, batch=2, chunk=100)
    torch.testing.assert_close(fast, slow)


def test_empty_surface_is_an_error_that_names_the_samples():
    with pytest.raises(EmptySurfaceError, match=r"sample\(s\) \[1\]") as error:
        extract_isosurface(Ball(0.5, -0.5), 12, batch=2)
    assert error.value.samples == [1] and isinstance(error.value, ValueError)


@pytest.mark.parametrize("max_nodes", [1, 1 << 20])
def test_an_empty_surface_can_be_flagged(max_nodes):
    full, some, none = extract_isosurface(Ball(9.0, 0.5, -0.5), 12, batch=3, on_empty="flag", max_nodes=max_nodes)
    assert full[1].shape == none[1].shape == (0, 3) and full[0].shape == none[0].shape == (0, 3) and len(some[1]) > 0
    with pytest.raises(EmptySurfaceError, match=r"sample\(s\) \[0, 2\]"):
        extract_isosurface(Ball(9.0, 0.5, -0.5), 12, batch=3, max_nodes=max_nodes)
    with pytest.raises(ValueError, match="on_empty='sphere'"):
        extract_isosurface(Ball(0.5), 12, on_empty="sphere", max_nodes=max_nodes)


def test_a_corrected_sample_can_be_kept_from_learning():
    sdf = torch.stack(
        [torch.ones(6, 6, 6), Ball(0.5).sdf(grid_points(6).view(1, -1, 3)).view(6, 6, 6)]
    ).requires_grad_()
    fixed, corrected = ensure_surface(sdf, detach=True)
    torch.testing.assert_close(fixed, ensure_surface(sdf)[0], rtol=0, atol=1e-6)
    assert corrected.tolist() == [True, False]
    sum(volume(*mesh) for mesh in grid_to_meshes(fixed, None)).backward()
    assert (sdf.grad[0] == 0).all() and (sdf.grad[1] != 0).any()


@pytest.mark.parametrize("resolution", [9, 10])
def test_ensure_surface_corrects_only_what_has_none(resolution):
    points = grid_points(resolution)[None]
    sdf = torch.cat([Ball(r).sdf(points.view(1, -1, 3)) for r in (-0.4, 0.5, 9.0)]).view(3, *points.shape[1:4])
    sdf.requires_grad_()
    fixed, corrected = ensure_surface(sdf)
    assert corrected.tolist() == [True, False, True]
    assert relative_difference(fixed[1], sdf[1]) <= ROUNDING
    meshes = grid_to_meshes(fixed, None)
    assert meshes[0][0].abs().max() < 2.1 / (resolution - 1)  # a small body around the centre
    assert meshes[2][0].abs().max() > 1 - 1.1 / (resolution - 1) and volume(*meshes[2]) > 4  # almost the whole cube
    for vertices, faces in meshes:
        assert_closed(faces)
        (gradient,) = torch.autograd.grad(volume(vertices, faces), sdf, retain_graph=True)
        assert gradient.sum() < 0  # raising the signed distance shrinks the body, corrected or not


class Wrong(Ball):
    def __init__(self, sdf, deformation=None):
        self.shapes = sdf, deformation

    def sdf_and_deformation(self, points):
        return tuple(None if shape is None else points.new_zeros(shape) for shape in self.shapes)


class WrongGrid(Wrong):
    def geometry_grid(self, resolution, first, last):
        return self.sdf_and_deformation(torch.zeros(()))


def test_bad_input_is_named():
    for bad in (1, 0, -3):
        with pytest.raises(ValueError, match=f"resolution={bad}"):
            extract_isosurface(Ball(0.5), bad)
    for field in (Wrong((1, 64)), Wrong((1, 64, 3)), Wrong((1, 64, 1), (1, 64)), Wrong((1, 63, 1))):
        with pytest.raises(ValueError, match="field: sdf_and_deformation"):
            extract_isosurface(field, 4)
    for field in (WrongGrid((1, 4, 4)), WrongGrid((1, 4, 4, 5)), WrongGrid((1, 4, 4, 4), (1, 4, 4, 4))):
        with pytest.raises(ValueError, match="field: its grid"):
            extract_isosurface(field, 4)
    with pytest.raises(ValueError, match=r"sdf=\(1, 3, 3, 4\)"):
        grid_to_meshes(torch.zeros(1, 3, 3, 4), None)
    with pytest.raises(ValueError, match=r"sdf=\(3, 3\)"):
        marching_cubes(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="deformation"):
        marching_cubes(torch.zeros(3, 3, 3), torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="NaN"):
        marching_cubes(torch.full((3, 3, 3), torch.nan))


def test_what_is_not_finite_is_named_before_it_is_called_empty():
    ball = grid_points(8).norm(dim=-1)[None] - 0.5
    offsets = torch.zeros(1, 8, 8, 8, 3)
    for sdf, deformation, level, named in (
        (torch.full_like(ball, torch.nan), None, 0.0, "sdf: holds NaN"),
        (ball, offsets * torch.nan, 0.0, "deformation: holds NaN"),
        (ball, offsets, float("nan"), "level=nan"),
    ):
        with pytest.raises(ValueError, match=named):
            grid_to_meshes(sdf, deformation, level)
    with pytest.raises(ValueError, match="deformation: holds NaN"):
        marching_cubes(ball[0], offsets[0] * torch.nan)
    with pytest.raises(ValueError, match="level=nan"):
        meshes_from_slabs(lambda: [(ball, None)], 8, float("nan"))
