"""Small handles are closed, large ones stay, and the number of triangles is met or said."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from prd.fields.protocol import AutogradGradient
from prd.meshes.handles import close_handles
from prd.meshes.mesh import build_mesh, extract_surfaces
from prd.meshes.options import MeshOptions
from prd.meshes.simplify import clean, decimate, merge_near


def tori(*radii: float) -> tuple[np.ndarray, np.ndarray]:
    """Tori side by side, of one tube radius each: pieces of genus one, as wide as their tubes."""
    parts = []
    for i, radius in enumerate(radii):
        part = trimesh.creation.torus(0.15, radius, major_sections=48, minor_sections=16)
        part.apply_translation((0.5 * i, 0, 0))
        parts.append(part)
    whole: Any = trimesh.util.concatenate(parts)
    return np.asarray(whole.vertices, np.float32), np.asarray(whole.faces, np.int64)


class Pierced(AutogradGradient):
    """A slab with five round tunnels of width 0.12 through it."""

    def sdf(self, points: torch.Tensor) -> torch.Tensor:
        outside = points.abs() - points.new_tensor([0.8, 0.4, 0.2])
        slab = outside.clamp(min=0).norm(dim=-1) + outside.amax(-1).clamp(max=0)
        middles = points.new_tensor([-0.6, -0.3, 0.0, 0.3, 0.6])
        across = torch.stack([points[..., :1] - middles, points[..., 1:2].expand(*points.shape[:-1], 5)], dim=-1)
        return torch.maximum(slab, 0.06 - across.norm(dim=-1).amin(-1))[..., None]

    def rgb(self, points: torch.Tensor) -> torch.Tensor:
        return torch.full_like(points, 0.5)


@pytest.fixture(scope="module")
def pierced() -> tuple[np.ndarray, np.ndarray]:
    (surface,) = extract_surfaces(Pierced(), MeshOptions(isosurface_resolution=64))
    assert surface is not None
    return clean(surface[0].numpy(), surface[1].numpy(), "all")


def euler(vertices: np.ndarray, faces: np.ndarray) -> int:
    shape = trimesh.Trimesh(vertices, faces, process=False)
    assert shape.is_watertight and shape.is_winding_consistent
    return int(shape.euler_number)


@pytest.mark.parametrize(("width", "closed"), [(0.05, 1), (0.15, 2), (0.02, 0)])
def test_handles_narrower_than_the_width_are_closed(width: float, closed: int) -> None:
    vertices, faces = tori(0.02, 0.05)  # girths of 0.04 and 0.1 times pi
    result = close_handles(vertices, faces, width)
    assert result[2] == closed and euler(*result[:2]) == 2 * closed
    if closed:
        assert trimesh.Trimesh(*result[:2], process=False).body_count == 2


def test_tunnels_are_walled_up_and_the_rest_stays(pierced: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = pierced
    before = trimesh.Trimesh(vertices, faces, process=False)
    assert euler(vertices, faces) == 2 - 2 * 5
    points, triangles, closed = close_handles(vertices, faces, 0.2)
    after = trimesh.Trimesh(points, triangles, process=False)
    assert closed == 5 and euler(points, triangles) == 2 and after.body_count == 1
    np.testing.assert_allclose(after.bounds, before.bounds, atol=1e-6)
    assert abs(after.volume) >= abs(before.volume) - 1e-4  # nothing is cut off


def test_a_surface_without_handles_stays_as_it_is() -> None:
    ball = trimesh.creation.icosphere(3)
    vertices, faces = np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int64)
    points, triangles, closed = close_handles(vertices, faces, 10)
    assert closed == 0 and points is vertices and triangles is faces


@pytest.mark.parametrize("target", [200, 120])
def test_the_number_of_triangles_is_met_or_the_nearest_found(
    target: int, pierced: tuple[np.ndarray, np.ndarray]
) -> None:
    vertices, faces = pierced
    kept = decimate(vertices, faces, target)
    assert euler(*kept) == -8 and len(kept[1]) < len(faces) / 2
    assert len(decimate(vertices, faces, target, "free")[1]) <= target


def test_what_is_not_met_is_a_warning_with_both_numbers(
    pierced: tuple[np.ndarray, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    vertices, faces = pierced
    raw = torch.from_numpy(vertices), torch.from_numpy(faces)
    with caplog.at_level(logging.WARNING):
        mesh = build_mesh(Pierced(), raw, target_faces=4, texture_size=None, close_handles=0)
    (line,) = caplog.messages
    assert f"target_faces=4: {len(mesh.faces)} triangles were reached" in line and "--topology free" in line
    assert mesh.euler_number == -8
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        mesh = build_mesh(Pierced(), raw, target_faces=500, texture_size=None, close_handles=0.2)
    assert [line for line in caplog.messages if "closed 5 handle(s) narrower than 0.2" in line] == caplog.messages
    assert mesh.euler_number == 2 and len(mesh.faces) <= 500
    caplog.clear()
    free = build_mesh(Pierced(), raw, target_faces=60, texture_size=None, topology="free", close_handles=0)
    assert len(free.faces) <= 60 and not [line for line in caplog.messages if "were reached" in line]


def test_near_vertices_are_merged_where_the_topology_stays() -> None:
    ball = trimesh.creation.icosphere(3, 0.5)
    vertices, faces = np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int64)
    split = ball.subdivide_to_size(1.0)
    assert len(merge_near(vertices, faces)[0]) == len(vertices) == len(split.vertices)
    near = vertices.copy()
    a, b = faces[0, :2]
    near[b] = near[a] + np.array([1e-3, 0, 0], np.float32)
    points, triangles = merge_near(near, faces)
    assert len(points) == len(vertices) - 1 and euler(points, triangles) == 2
    thin = trimesh.creation.box(extents=(1.0, 1.0, 1e-3))  # merged, it would be nothing
    flat = np.asarray(thin.vertices, np.float32), np.asarray(thin.faces, np.int64)
    assert merge_near(*flat)[0] is flat[0]
