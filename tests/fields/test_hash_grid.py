"""Grids of given parameters: dense levels against torch's own lookup, hashed ones against the published hash."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prd.fields.hash_grid import FeatureGrids


def points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def parameters(grids: FeatureGrids) -> torch.Tensor:
    return torch.randn(2, grids.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_dense_levels_interpolate_as_grid_sample_does() -> None:
    grids = FeatureGrids((4, 7), 3)
    w, p = parameters(grids), points(60)
    parts = []
    for table, resolution in zip(grids.levels(w), grids.resolutions, strict=True):
        volume = table.view(2, resolution, resolution, resolution, 3).permute(0, 4, 3, 2, 1)  # [B, F, z, y, x]
        looked_up = F.grid_sample(volume, p[:, None, None], align_corners=True)[:, :, 0, 0]
        parts.append(looked_up.transpose(1, 2))
    torch.testing.assert_close(grids.encode(w, p), torch.cat(parts, dim=-1), rtol=1e-10, atol=1e-10)


def test_a_node_has_its_own_entry_and_fine_levels_are_hashed() -> None:
    grids = FeatureGrids((3, 9), 1, table_size=100)
    assert grids.entries == (27, 100) and grids.num_parameters == 127 and grids.channels == 2
    nodes = torch.tensor([[2, 0, 1], [8, 5, 3]])
    assert grids.index(nodes[:1], 3).tolist() == [2 * 9 + 1]
    expected = (8 ^ (5 * 2_654_435_761) ^ (3 * 805_459_861)) % 100
    assert grids.index(nodes[1:], 9).tolist() == [expected]
    w = parameters(grids)
    place = nodes[1].double() / 8 * 2 - 1  # a node of the fine level
    fine = grids.encode(w, place.expand(2, 1, 3))[..., 1]
    torch.testing.assert_close(fine[:, 0], grids.levels(w)[1][:, expected, 0])


def test_a_regular_grid_is_the_pointwise_encoding() -> None:
    grids = FeatureGrids((4, 6, 11), 2, table_size=300)  # two dense levels and a hashed one
    w, nodes = parameters(grids), torch.linspace(-1, 1, 8, dtype=torch.float64)
    lattice = torch.cartesian_prod(nodes[2:5], nodes, nodes).expand(2, -1, -1)
    dense = grids.encode_grid(w, nodes[2:5], nodes)
    torch.testing.assert_close(dense.flatten(1, 3), grids.encode(w, lattice), rtol=1e-10, atol=1e-10)


def test_gradients_in_parameters_and_points() -> None:
    grids = FeatureGrids((3, 5), 2, table_size=30)
    w, p = parameters(grids).requires_grad_(), (points(6) * 0.9).requires_grad_()
    assert torch.autograd.gradcheck(grids.encode, (w, p))
    (slope,) = torch.autograd.grad(grids.encode(w, p).square().sum(), p, create_graph=True)
    slope.square().sum().backward()  # twice: normals are part of a rendering loss
    assert bool(w.grad.any())


def test_what_cannot_be_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resolutions=\(1,\): each level needs at least 2"):
        FeatureGrids((1,), 2)
    with pytest.raises(ValueError, match=r"parameters=\(2, 5\): expected \[B, 16\]"):
        FeatureGrids((2,), 2).levels(torch.zeros(2, 5))
