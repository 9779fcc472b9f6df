"""Antialiased outlines: areas, colours and gradients where a pixel is covered in part."""

import pytest
import torch
from scipy.spatial import ConvexHull

from prd.cameras import orbit_cameras
from prd.isosurface.marching_cubes import marching_cubes
from prd.rendering.antialias import antialias, mesh_edges
from prd.rendering.rasterize import interpolate, rasterize
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import soup


def orthographic(points, faces=None):
    """Clip-space vertices [1, N, 4] from x, y, z in [-1, 1]."""
    points = torch.as_tensor(points)
    return torch.cat([points, torch.ones_like(points[:, :1])], dim=1)[None]


def square(half, centre=(0.0, 0.0), tilt=0.0, dtype=torch.float64):
    """A square of half-width `half`, turned by tilt, as two faces: clip [1, 4, 4], faces."""
    x = torch.tensor([-1.0, 1, 1, -1], dtype=dtype) * half
    y = torch.tensor([-1.0, -1, 1, 1], dtype=dtype) * half
    angle = torch.as_tensor(tilt, dtype=dtype)
    px = angle.cos() * x - angle.sin() * y + centre[0]
    py = angle.sin() * x + angle.cos() * y + centre[1]
    clip = torch.stack([px, py, torch.zeros_like(px), torch.ones_like(px)], dim=-1)[None]
    return clip, torch.tensor([[0, 1, 2], [0, 2, 3]])


def coverage(clip, faces, size=32):
    fragments = rasterize(clip, faces, size, size)
    hard = (fragments.face_index >= 0).to(clip.dtype)[..., None]
    return antialias(hard, fragments, clip, faces)


@pytest.mark.parametrize("tilt", [0.0, 0.2, 0.6])
def test_antialiased_area_and_its_gradient_are_the_true_ones(tilt):
    for half in (0.413, 0.5, 0.6321):
        h = torch.tensor(half, dtype=torch.float64, requires_grad=True)
        area = coverage(*square(h, (0.013, -0.007), tilt)).mean() * 4
        (slope,) = torch.autograd.grad(area, h)
        assert area.item() == pytest.approx(4 * half**2, rel=0.01)
        assert slope.item() == pytest.approx(8 * half, rel=0.06)  # d (2 h)^2 / d h; corners are approximate


def test_antialias_is_exact_for_an_upright_edge():
    clip, faces = square(torch.tensor(0.5 + 0.3 / 16, dtype=torch.float64))  # the edge at 24.3 pixels of 32
    row = coverage(clip, faces)[0, 16, :, 0]
    torch.testing.assert_close(row[22:26], torch.tensor([1.0, 1, 0.3, 0], dtype=torch.float64))
    torch.testing.assert_close(row[6:10], torch.tensor([0, 0.3, 1, 1.0], dtype=torch.float64))


def test_antialias_sees_outlines_of_sub_pixel_triangles_and_inner_occlusions():
    index = torch.arange(41 * 41).view(41, 41)
    a, b, c, d = (index[i : 40 + i, j : 40 + j].reshape(-1) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1)))
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([a, c, d], -1)])
    xy = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 41), torch.linspace(-1, 1, 41), indexing="ij"), -1)
    fine = torch.cat([xy.view(-1, 2) * (0.5 + 0.3 / 16), torch.zeros(1681, 1)], dim=1)
    back = torch.tensor([[-2.0, -2, 0.5], [2, -2, 0.5], [0, 4, 0.5]])
    clip, all_faces = orthographic(torch.cat([fine, back])), torch.cat([faces, torch.tensor([[1681, 1682, 1683]])])
    fragments = rasterize(clip, all_faces, 32, 32)
    front = (fragments.face_index < len(faces)).float()[..., None]
    row = antialias(front, fragments, clip, all_faces)[0, 16, :, 0]
    torch.testing.assert_close(row[22:26], torch.tensor([1.0, 1, 0.3, 0]), atol=1e-4, rtol=0)
    # The same square behind a fine, slanted wall that the pixels see in its stead: nothing to blend.
    wall = torch.cat([xy.view(-1, 2), 0.3 + 0.2 * xy.view(-1, 2).sum(dim=1, keepdim=True)], dim=1)
    clip = orthographic(torch.cat([fine + torch.tensor([0, 0, 0.75]), wall]))
    both = torch.cat([faces, faces + 1681])
    fragments = rasterize(clip, both, 32, 32)
    assert (fragments.face_index >= len(faces)).all()
    colour = torch.rand(1, 32, 32, 1)
    assert relative_difference(antialias(colour, fragments, clip, both), colour) <= ROUNDING


def test_antialias_does_not_blend_a_farther_pixel_over_a_nearer_one():
    """An unseen strip between two pixel centres, its faces on the side of the pixel that sees the farther wall."""

    def upright(x0, x1, z):  # between columns x0 and x1 of 32
        low, high = x0 / 16 - 1, x1 / 16 - 1
        return [[low, -2, z], [high, -2, z], [high, 2, z], [low, 2, z]]

    points = torch.tensor(upright(-40, 80, 0.5) + upright(23.6, 80, 0.2) + upright(24.1, 24.45, -0.5))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]]).repeat(3, 1) + 4 * torch.arange(3).repeat_interleave(2)[:, None]
    fragments = rasterize(orthographic(points), faces, 32, 32)
    nearer = (fragments.face_index // 2 == 1).float()[..., None]
    row = antialias(nearer, fragments, orthographic(points), faces)[0, 16, :, 0]
    torch.testing.assert_close(row[22:26], torch.tensor([0, 0.4, 1, 1]), atol=1e-4, rtol=0)


def test_antialias_stays_within_the_colours():
    generator = torch.Generator().manual_seed(4)
    tiny, faces = soup(8, count=300, views=1)
    tiny = torch.cat(
        [
            tiny[..., :2] * 0.3 + torch.randn(1, 300, 1, 2, generator=generator).repeat(1, 1, 3, 1).view(1, -1, 2),
            tiny[..., 2:],
        ],
        -1,
    )
    fragments = rasterize(tiny, faces, 32, 32)
    blended = antialias((fragments.face_index >= 0).float()[..., None], fragments, tiny, faces)
    assert blended.min() > -1e-6 and blended.max() < 1 + 1e-6 and ((blended > 0) & (blended < 1)).any()


def test_mesh_edges_of_a_tetrahedron_and_of_a_square():
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [1, 3, 2], [2, 3, 0]])
    edges = mesh_edges(faces)
    assert len(edges.vertices) == 6 and (edges.faces >= 0).all() and (edges.faces[:, 0] != edges.faces[:, 1]).all()
    for vertices, pair in zip(edges.vertices, edges.faces, strict=True):
        assert all(set(vertices.tolist()) <= set(faces[f].tolist()) for f in pair)
    assert (mesh_edges(torch.tensor([[0, 1, 2], [0, 2, 3]])).faces[:, 1] >= 0).sum() == 1


@pytest.mark.parametrize("size", [1.0, 0.55])
def test_a_square_finds_its_place_and_size(size):
    target = coverage(*square(torch.tensor(0.45, dtype=torch.float64), (0.12, -0.2)))
    half = torch.tensor(0.45 * size, dtype=torch.float64, requires_grad=True)
    x, y = (torch.tensor(0.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([half, x, y], lr=0.02)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 60)
        optimizer.zero_grad()
        (coverage(*square(half, (x, y))) - target).square().mean().backward()
        optimizer.step()
    found = torch.stack([half, x, y]).detach()
    torch.testing.assert_close(found, torch.tensor([0.45, 0.12, -0.2], dtype=torch.float64), atol=0.01, rtol=0)


def test_the_gradient_leaves_out_half_a_pixel_of_colour_change():
    """As the docstring says: an upright outline that moves over a colour ramp of slope k a pixel.

    The image follows the outline exactly; its gradient is the colour at the pixel centre before the outline, whose
    mean over a pixel is k / 2 less than the colour at the outline.
    """
    for k in (0.0, 0.02, -0.03):
        places = torch.linspace(18.02, 20.02, 100, dtype=torch.float64)  # of 32 columns: two whole pixels
        total, slopes = [], []
        for place in places:
            edge = place.clone().requires_grad_()
            x = torch.stack([torch.full_like(edge, -8.0), edge, edge, torch.full_like(edge, -8.0)])
            clip = torch.stack([x / 16 - 1, x.new_tensor([-2, -2, 2, 2]), 0 * x, 0 * x + 1], dim=-1)[None]
            faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
            fragments = rasterize(clip, faces, 4, 32)
            ramp = interpolate(0.3 + k * x[:, None], faces, fragments)
            row = antialias(ramp, fragments, clip, faces)[0, 1, :, 0].sum()
            (slope,) = torch.autograd.grad(row, edge)
            assert slope.item() == pytest.approx(0.3 + k * ((place - 0.5).floor() + 0.5).item(), abs=1e-6)
            total.append(row.item())
            slopes.append(slope.item())
        exact = 0.3 + k * (places[0] + places[-1]).item() / 2  # the mean colour at the outline
        assert (total[-1] - total[0]) / (places[-1] - places[0]).item() == pytest.approx(exact, abs=1e-3)
        assert sum(slopes) / len(slopes) == pytest.approx(exact - k / 2, abs=1e-3)


def sphere(resolution):
    axis = torch.linspace(-1, 1, resolution)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    vertices, faces = marching_cubes(grid.norm(dim=-1) - 0.5)
    return vertices * (2 / (resolution - 1)) - 1, faces


def test_a_mesh_finds_the_silhouettes_of_another_shape():
    """From a ball of free vertices to a box, by outlines alone (and smoothing): the overlap of its images rises."""
    vertices, faces = sphere(11)
    cams = orbit_cameras(torch.tensor([[0.0, 0, 0, 0, 60, -60]]), torch.tensor([[0.0, 45, 90, 135, 20, 70]]), 2.4, 50.0)
    matrices = (cams.projection(1.0) @ cams.world_to_camera())[0]

    def silhouettes(points, triangles):
        clip = points @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
        fragments = rasterize(clip, triangles, 40, 40)
        return antialias((fragments.face_index >= 0).float()[..., None], fragments, clip, triangles)

    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1])] * 3) * torch.tensor([0.65, 0.35, 0.45])
    hull = torch.from_numpy(ConvexHull(corners.numpy()).simplices).long()
    a, b, c = (corners[hull[:, k]] for k in range(3))
    turned = (torch.linalg.cross(b - a, c - a) * a).sum(-1) < 0
    hull = torch.where(turned[:, None], hull.flip(1), hull)  # wound alike, outward
    target = silhouettes(corners, hull)

    def overlap(images):
        return (torch.minimum(images, target).sum() / torch.maximum(images, target).sum()).item()

    edges = mesh_edges(faces).vertices
    place = vertices.clone().requires_grad_()
    optimizer = torch.optim.Adam([place], lr=0.02)
    assert overlap(silhouettes(place, faces)) < 0.8
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 80)
        optimizer.zero_grad()
        lengths = (place[edges[:, 0]] - place[edges[:, 1]]).square().sum(-1)
        ((silhouettes(place, faces) - target).square().mean() + 0.3 * lengths.mean()).backward()
        optimizer.step()
    assert overlap(silhouettes(place.detach(), faces)) > 0.95
