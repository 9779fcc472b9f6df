"""Coarse-to-fine evaluation finds the dense grid's surface, and misses only what its docstring says."""

import pytest
import torch

from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.isosurface.coarse_to_fine import evaluate_near_surface, extract_coarse_to_fine
from prd.isosurface.extract import EmptySurfaceError, extract_isosurface
from prd.isosurface.marching_tetrahedra import marching_tetrahedra
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.toybox.world import ExactField


class Sheet(AutogradGradient):
    """A slab of half-thickness `half` about the plane n . p = 0.13, cut to a disc; never more than the distance."""

    normal = torch.tensor([0.48, 0.6, 0.64])

    def __init__(self, half):
        self.half = half

    def sdf(self, points):
        across = ((points * self.normal).sum(-1, keepdim=True) - 0.13).abs() - self.half
        return torch.maximum(across, points.norm(dim=-1, keepdim=True) - 0.7)


class Snake(AutogradGradient):
    """A thin bent tube that starts as a ball: coarse corners see the ball alone."""

    def sdf(self, points):
        x, y, z = points.unbind(-1)
        path = torch.stack([y - 0.4 * torch.sin(4 * x), z - 0.3 * torch.cos(3 * x)], dim=-1).norm(dim=-1)
        tube = torch.maximum(path - 0.06, x.abs() - 0.8)
        ball = (points - torch.tensor([-0.5, -0.36, 0.02])).norm(dim=-1) - 0.2
        return torch.minimum(tube, ball)[..., None]


def same_meshes(one, two, tolerance=1e-5):
    for (vertices, faces), (others, same) in zip(one, two, strict=True):
        assert torch.equal(faces, same)
        torch.testing.assert_close(vertices, others, atol=tolerance, rtol=0)


@pytest.mark.parametrize("caption", ["a red torus", "a blue mug", "a green wedge", "a red cube on a blue cylinder"])
@pytest.mark.parametrize("resolution", [33, 48])
def test_exact_distances_give_the_mesh_of_the_dense_grid(caption, resolution):
    field = ExactField([caption])
    dense = extract_isosurface(field, resolution)
    same_meshes(dense, extract_coarse_to_fine(field, resolution, lipschitz=1.0))
    near = evaluate_near_surface(field, resolution, lipschitz=1.0)
    assert near.nodes.numel() < 0.7 * resolution**3


def test_trained_fields_give_the_mesh_of_the_dense_grid():
    """With what the shipped student makes. Its gradient reaches 11 in places, so that no useful constant holds: that
    these surfaces are found is their own doing, as pieces much thicker than a coarse cell."""
    pipe = TriplaneTurbo.from_pretrained("toybox")
    prompts = ["a red torus", "a blue mug", "a green cone on a yellow cube"]
    field = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="field").field
    with torch.no_grad():
        dense = extract_isosurface(field, 65, batch=3)
        same_meshes(dense, extract_coarse_to_fine(field, 65, batch=3))
        same_meshes(dense, extract_coarse_to_fine(field, 65, batch=3, lipschitz=2.0))


class Speck(AutogradGradient):
    """A ball, and a speck that lies between the corners of one coarse cell."""

    def sdf(self, points):
        ball = points.norm(dim=-1) - 0.4
        speck = (points - 0.6875).norm(dim=-1) - 0.045
        return torch.minimum(ball, speck)[..., None]


def test_a_speck_within_a_coarse_cell_needs_a_constant():
    """Without one, what no coarse corner sees is lost: this is the price of asking few nodes."""
    dense, fast = extract_isosurface(Speck(), 65), extract_coarse_to_fine(Speck(), 65)
    farthest = [float(vertices.norm(dim=-1).max()) for ((vertices, _),) in (dense, fast)]
    assert farthest[0] > 1 and farthest[1] < 0.5
    same_meshes(dense, extract_coarse_to_fine(Speck(), 65, lipschitz=1.0))


@pytest.mark.parametrize("marching", [None, marching_tetrahedra])
def test_random_triplane_fields_give_the_mesh_of_the_dense_grid(marching):
    """A batch whose surfaces cross coarse edges everywhere, with deformation, in slabs; and the gradients agree."""
    torch.manual_seed(1)
    planes = (0.5 * torch.randn(3, 6, 8, 6, 6)).requires_grad_()
    field = TriplaneField(planes, TriplaneHeads(8, 16))
    ways = {} if marching is None else {"marching": marching}
    dense = extract_isosurface(field, 41, batch=3, **ways)
    fine = extract_coarse_to_fine(field, 41, batch=3, factor=5, max_nodes=20_000, **ways)
    same_meshes(dense, fine)
    one, two = (
        torch.autograd.grad(sum(v.square().mean() for v, _ in meshes), planes, retain_graph=True)[0]
        for meshes in (dense, fine)
    )
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)


def test_a_thin_sheet_is_found_with_the_lipschitz_constant_and_can_be_missed_without():
    """Half a fine cell thick, between the corners of coarse cells: sign changes alone see it only in places."""
    resolution, half = 49, 0.012
    dense = extract_isosurface(Sheet(half), resolution)
    same_meshes(dense, extract_coarse_to_fine(Sheet(half), resolution, factor=8, lipschitz=1.0))
    try:
        (without,) = extract_coarse_to_fine(Sheet(half), resolution, factor=8)
    except EmptySurfaceError:
        without = torch.zeros(0, 3), torch.zeros(0, 3)
    assert len(without[1]) < len(dense[0][1])


def test_a_connected_piece_is_followed_where_no_coarse_corner_sees_it():
    resolution, factor = 65, 16
    dense = extract_isosurface(Snake(), resolution)
    same_meshes(dense, extract_coarse_to_fine(Snake(), resolution, factor=factor))
    corners = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 3)
    assert (Snake().sdf(corners[None]) < 0).sum() <= 1  # the ball alone, or less


def test_shapes_that_leave_the_cube_are_closed_within_half_a_cell():
    class Big(AutogradGradient):
        def sdf(self, points):
            return points.norm(dim=-1, keepdim=True) - 1.2

    ((vertices, faces),) = extract_coarse_to_fine(Big(), 30, factor=4, lipschitz=1.0)
    same_meshes(extract_isosurface(Big(), 30), [(vertices, faces)], tolerance=0.5 * 2 / 29)


def test_empty_surfaces_and_bad_input_are_named():
    class Void(AutogradGradient):
        def sdf(self, points):
            return points.norm(dim=-1, keepdim=True) + 0.2

    with pytest.raises(EmptySurfaceError, match=r"sample\(s\) \[0\]"):
        extract_coarse_to_fine(Void(), 17)
    ((vertices, faces),) = extract_coarse_to_fine(Void(), 17, on_empty="flag", lipschitz=1.0)
    assert vertices.shape == faces.shape == (0, 3)
    for bad in ({"resolution": 1}, {"factor": 0}, {"lipschitz": 0.0}, {"lipschitz": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            extract_coarse_to_fine(Void(), **{"resolution": 17, **bad})
