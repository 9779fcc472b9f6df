"""Normal maps: the normals of the surface before it was simplified, in the tangent space of the one after.

glTF 2.0, section 3.9.3: X to the right of the texture, Y up, Z outward; tangents as MikkTSpace has them. A texture's
charts are never mirrored, so that the bitangent is always normal x tangent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

NEAREST = 4  # vertices of the fine surface whose normals are averaged
TINY = 1e-12
FLAT = 4e-5  # added to a map's values in [0, 1]: rounding takes 127.5, which is flat, to 128


def tangents(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], normals: NDArray[np.float32], uv: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return unit tangents [V, 3] towards increasing u, weighted by the angle of each face at the vertex (MikkTSpace).

    vertices [V, 3] on cuts once per chart, faces [F, 3], normals [V, 3] unit, uv [V, 2] v up.
    """
    points, out = vertices[faces].astype(np.float64), np.zeros((len(vertices), 3))
    (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).astype(np.float64).T for k in (1, 2))
    along, across = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    toward_u = (along * d[:, None] - across * b[:, None]) * np.sign(a * d - b * c)[:, None]  # [F, 3]
    for k in range(3):
        normal = normals[faces[:, k]].astype(np.float64)
        sides = [_unit(_across(points[:, (k + j) % 3] - points[:, k], normal)) for j in (1, 2)]
        angle = np.arccos((sides[0] * sides[1]).sum(axis=1).clip(-1, 1))
        np.add.at(out, faces[:, k], _unit(_across(toward_u, normal)) * angle[:, None])
    wrong = np.linalg.norm(out, axis=1) < TINY  # no face has an area in the texture there: any tangent will do
    out[wrong] = np.eye(3)[np.abs(normals[wrong]).argmin(axis=1)]
    return _unit(_across(out, normals.astype(np.float64))).astype(np.float32)


class FineSurface:
    """The surface before it was simplified: vertices [V, 3] and unit vertex normals [V, 3]."""

    def __init__(self, vertices: NDArray[np.float32], normals: NDArray[np.float32]) -> None:
        self.tree, self.normals = cKDTree(vertices), normals

    def normals_at(self, points: NDArray[np.float32], facing: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the unit normals [N, 3] nearest to points [N, 3], of those that face the same way as `facing`."""
        distance, near = self.tree.query(points, k=min(NEAREST, self.tree.n))
        distance, near = distance.reshape(len(points), -1), near.reshape(len(points), -1)
        found = self.normals[near].astype(np.float64)  # [N, K, 3]
        weight = (found * facing[:, None]).sum(axis=2).clip(min=0) / (distance + 1e-6)  # not the other side of a wall
        total = (found * weight[..., None]).sum(axis=1)
        return np.where(np.linalg.norm(total, axis=1, keepdims=True) > TINY, _unit(total), facing)


def in_tangent_space(
    fine: NDArray[np.float64], normals: NDArray[np.float32], tangents: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return directions as a normal map's values [N, 3] in [0, 1]: 0.5, 0.5, 1 where the surface is as it was.

    fine [N, 3] unit; normals, tangents [N, 3] as a viewer interpolates them, of any length
    """
    normal, tangent = _unit(normals.astype(np.float64)), _unit(tangents.astype(np.float64))
    frame = np.stack([tangent, np.cross(normal, tangent), normal], axis=2)  # columns
    frame[np.abs(np.linalg.det(frame)) < 1e-3] = np.eye(3)
    local = _unit(np.linalg.solve(frame, fine[..., None])[..., 0])
    return (local / 2 + (0.5 + FLAT)).clip(0, 1).astype(np.float32)


def _across(vectors: NDArray[Any], normals: NDArray[Any]) -> NDArray[np.float64]:
    """Return the parts of vectors [N, 3] across unit normals [N, 3]."""
    return np.asarray(vectors - (vectors * normals).sum(axis=1, keepdims=True) * normals)


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), TINY))
