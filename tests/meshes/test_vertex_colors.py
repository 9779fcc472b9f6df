"""Colours per vertex, interpolated over the triangles, are those of the field and of the texture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from scipy.ndimage import map_coordinates

import prd
from prd.meshes.mesh import Mesh, query_rgb
from prd.meshes.vertex_colors import fitted_colors
from prd.pipelines.output import TextTo3DOutput

SINGLES = (
    *("red cube", "green sphere", "blue cone", "yellow cylinder"),
    *("purple torus", "cyan wedge", "red arrow", "blue mug"),
)
MEAN, MOST = 1.0, 3.0  # levels of 255: over the surface, and what 99 % of it stays below
EDGES = {"cube": 4.5, "cylinder": 4.5, "wedge": 4.5, "mug": 4.5}  # MOST of shapes whose light jumps where faces meet


def ball() -> tuple[np.ndarray, np.ndarray]:
    made = trimesh.creation.icosphere(3, 0.6)
    return np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64)


def bands(points: np.ndarray) -> np.ndarray:
    return (np.sin(9 * points) / 2 + 0.5).astype(np.float32)


def halves(points: np.ndarray) -> np.ndarray:
    return np.where(points[:, :1] > 0.013, [[0.9, 0.1, 0.1]], [[0.1, 0.2, 0.8]]).astype(np.float32)


def over_surface(vertices: np.ndarray, faces: np.ndarray, per_face: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, 3] of the corners of faces [N, 3], evenly over the surface."""
    shape = trimesh.Trimesh(vertices, faces, process=False)
    draw = np.random.default_rng(3)
    chosen = draw.choice(len(faces), per_face * len(faces), p=shape.area_faces / shape.area)
    return draw.dirichlet((1, 1, 1), len(chosen)), faces[chosen]


def between(weights: np.ndarray, corners: np.ndarray, values: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.einsum("nk,nkx->nx", weights, values[corners])
    return out


def test_fitted_colours_are_nearer_than_those_at_the_vertices() -> None:
    vertices, faces = ball()
    for rgb in (bands, halves):
        weights, corners = over_surface(vertices, faces, 10)
        wanted = rgb(between(weights, corners, vertices))
        errors = [
            ((between(weights, corners, colors) - wanted) ** 2).mean()
            for colors in (rgb(vertices), fitted_colors(vertices, faces, rgb))
        ]
        assert errors[1] < 0.9 * errors[0]


def test_no_colour_leaves_the_range_of_the_surface() -> None:
    vertices, faces = ball()
    found, clear = fitted_colors(vertices, faces, halves), np.abs(vertices[:, 0]) > 0.25
    np.testing.assert_allclose(found[clear], halves(vertices[clear]), atol=1e-6)
    assert found.min() >= np.float32(0.1) and found.max() <= np.float32(0.9)
    one = np.full(3, 0.25, np.float32)
    np.testing.assert_array_equal(fitted_colors(vertices, faces, lambda points: points * 0 + one)[0], one)


def texture_at(mesh: Mesh, uv: np.ndarray) -> np.ndarray:
    """Colours [N, 3] in 0..255 of a mesh's texture, bilinear between the middles of its texels."""
    assert mesh.texture is not None
    size = len(mesh.texture)
    place = np.stack([1 - uv[:, 1], uv[:, 0]]) * size - 0.5  # row, column
    layers = [map_coordinates(mesh.texture[..., k].astype(float), place, order=1, mode="nearest") for k in range(3)]
    return np.stack(layers, axis=1)


@pytest.mark.slow
def test_vertex_colours_and_texture_show_what_the_field_has() -> None:
    """The toy model's single objects, both ways, at points all over the surface."""
    pipe = prd.TriplaneTurbo.from_pretrained("toybox")
    for words in SINGLES:
        generator = torch.Generator().manual_seed(0)
        result = pipe(f"a {words}", generator=generator, isosurface_resolution=96, target_faces=10_000)
        assert isinstance(result, TextTo3DOutput)
        mesh = result.meshes[0]
        assert mesh is not None and mesh.uv is not None
        weights, corners = over_surface(mesh.vertices, mesh.faces, 4)
        points = between(weights, corners, mesh.vertices).astype(np.float32)
        field = 255 * query_rgb(result.field, points, torch.device("cpu"))
        colors = 255 * between(weights, corners, mesh.vertex_colors)
        texture = texture_at(mesh, between(weights, corners, mesh.uv))
        for name, error in (("field", colors - field), ("texture", colors - texture)):
            most = np.abs(error).max(axis=1)
            print(f"{words}, vertex colours and {name}: {most.mean():.2f}, {np.quantile(most, 0.99):.2f} levels")
            bound = EDGES.get(words.split()[1], MOST)
            assert most.mean() < MEAN and np.quantile(most, 0.99) < bound, (words, name)
