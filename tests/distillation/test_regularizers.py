from __future__ import annotations

import math

import pytest
import torch

from prd.distillation.regularizers import (
    eikonal_loss,
    laplacian_loss,
    normal_consistency_loss,
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)

CUBE = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)], dtype=torch.float64)
CUBE_FACES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4]]
    + [[1, 5, 7], [1, 7, 3]]
)


def test_eikonal_is_zero_on_unit_gradients_and_finite_on_zero_ones() -> None:
    gradient = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.0, -0.8]])
    assert eikonal_loss(gradient) == pytest.approx(0, abs=1e-12)
    assert eikonal_loss(3 * gradient) == pytest.approx(4, rel=1e-6)
    flat = torch.zeros(2, 3, requires_grad=True)
    eikonal_loss(flat).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_sparsity_falls_with_opacity() -> None:
    assert sparsity_loss(torch.zeros(4)) == pytest.approx(0.1)
    assert sparsity_loss(torch.ones(4)) == pytest.approx(math.sqrt(1.01))


def test_opaque_is_the_entropy_of_a_hit() -> None:
    assert opaque_loss(torch.full((3,), 0.5)) == pytest.approx(math.log(2))
    assert opaque_loss(torch.tensor([0.0, 1.0])) < 0.01
    opacity = torch.tensor([0.2, 0.8, 0.0, 1.0], requires_grad=True)
    opaque_loss(opacity).backward()
    assert opacity.grad is not None
    assert opacity.grad[0] > 0 > opacity.grad[1]  # descent pushes a faint pixel to 0, a dense one to 1
    assert torch.isfinite(opacity.grad).all()


def test_orientation_counts_what_faces_away() -> None:
    direction = torch.tensor([[0.0, 0.0, -1.0]])
    normal = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.6, -0.8], [0.0, 0.0, -1.0]]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.25, 0.1]], requires_grad=True)
    loss = orientation_loss(weights, normal, direction)
    assert float(loss.detach()) == pytest.approx(0.25 * 0.64 + 0.1)
    loss.backward()
    assert weights.grad is None  # opacity is not paid for by turning away
    assert normal.grad is not None and normal.grad[0, 0].abs().max() == 0 and normal.grad[0, 1, 2] < 0


def test_z_variance_counts_the_rays_that_hit() -> None:
    variance, opacity = torch.tensor([0.2, 0.4, 9.0]), torch.tensor([0.9, 0.6, 0.1])
    assert z_variance_loss(variance, opacity) == pytest.approx(0.3)
    assert z_variance_loss(variance, torch.zeros(3)) == 0


def test_normal_consistency_of_a_cube_and_of_a_plane() -> None:
    # of 18 edges 12 are right angles (1 - cos = 1), 6 are the faces' diagonals (0)
    assert normal_consistency_loss(CUBE, CUBE_FACES) == pytest.approx(12 / 18)
    plane = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert normal_consistency_loss(plane, torch.tensor([[0, 1, 2], [1, 3, 2]])) == pytest.approx(0, abs=1e-7)
    assert normal_consistency_loss(plane, torch.tensor([[0, 1, 2]])) == 0  # no edge is shared


def test_a_face_without_area_bends_nothing() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 2, 0]], requires_grad=True)
    loss = normal_consistency_loss(vertices, torch.tensor([[0, 1, 2], [1, 3, 2], [3, 1, 1], [0, 3, 4]]))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    folded = normal_consistency_loss(vertices, torch.tensor([[0, 1, 3], [0, 3, 4]]))  # the second is a line
    assert float(folded.detach()) == 0
    (loss + folded).backward()
    assert vertices.grad is not None and torch.isfinite(vertices.grad).all()


@pytest.mark.parametrize("loss", [normal_consistency_loss, laplacian_loss])
@pytest.mark.parametrize(
    ("vertices", "faces", "named"),
    [
        (CUBE[:, :2], CUBE_FACES, "vertices"),
        (CUBE.long(), CUBE_FACES, "vertices"),
        (CUBE, CUBE_FACES[:, :2], "faces"),
        (CUBE, CUBE_FACES.float(), "faces"),
        (CUBE, CUBE_FACES - 1, "faces: name vertices -1..6 of 8"),
        (CUBE, CUBE_FACES + 1, "faces: name vertices 1..8 of 8"),
    ],
)
def test_bad_meshes_are_named(loss, vertices, faces, named) -> None:
    with pytest.raises(ValueError, match=named):
        loss(vertices, faces)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: eikonal_loss(torch.zeros(0, 3)), "gradient"),
        (lambda: sparsity_loss(torch.zeros(0)), "opacity"),
        (lambda: opaque_loss(torch.zeros(0)), "opacity"),
        (lambda: opaque_loss(torch.zeros(2), eps=0.7), "eps"),
        (lambda: z_variance_loss(torch.zeros(4, 1), torch.zeros(4)), "z_variance"),
        (lambda: orientation_loss(torch.zeros(2, 5), torch.zeros(2, 4, 3), torch.zeros(2, 3)), "normal"),
        (lambda: orientation_loss(torch.zeros(2, 5), torch.zeros(2, 5, 3), torch.zeros(1, 3)), "direction"),
    ],
)
def test_bad_shapes_are_named(call, named) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_laplacian_of_a_tetrahedron_and_of_a_flat_fan() -> None:
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])
    assert laplacian_loss(corners, faces) == pytest.approx(4 / 3 * math.sqrt(3))  # neighbours' mean is -corner / 3
    alone = torch.cat([corners, torch.full((1, 3), 9.0)])
    assert laplacian_loss(alone, faces) == pytest.approx(4 / 3 * math.sqrt(3))
    together = torch.zeros(4, 3, requires_grad=True)
    laplacian_loss(together, faces).backward()
    assert together.grad is not None and torch.isfinite(together.grad).all()


@pytest.mark.parametrize("loss", [normal_consistency_loss, laplacian_loss])
def test_mesh_losses_have_the_gradient_of_their_finite_differences(loss) -> None:
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vertices = (CUBE + 0.1 * noise).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, CUBE_FACES), vertices)
    step = vertices.detach() - 0.02 * torch.autograd.grad(loss(vertices, CUBE_FACES), vertices)[0]
    assert loss(step, CUBE_FACES) < loss(vertices.detach(), CUBE_FACES)


@pytest.mark.parametrize("loss", [sparsity_loss, opaque_loss, lambda x: z_variance_loss(x, torch.ones_like(x))])
def test_image_losses_have_the_gradient_of_their_finite_differences(loss) -> None:
    opacity = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, opacity)


def test_eikonal_has_the_gradient_of_its_finite_differences() -> None:
    gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(eikonal_loss, gradient)
