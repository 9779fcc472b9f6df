"""Meshes from files, and points on them: what a point cloud for LATTE3D is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from torch import Tensor

from prd.errors import PrdError
from prd.isosurface.marching_cubes import Surface
from prd.meshes.axes import noted_up, turned_back

REACH = 0.9  # half the longest side of a shape that was read from a file, scene units


class UnreadableMesh(PrdError, ValueError):
    """A file that is not there or holds no mesh, or one without area or not finite."""


def read_mesh(path: Path) -> Surface:
    """A mesh file's triangles, centred and scaled into the cube; UnreadableMesh without any.

    Those of .glb, .gltf and .obj are +Y up, front +Z; other files are in the scene's axes, but for those that
    `Mesh.export` wrote, which say which way up they are.
    """
    if not path.is_file():
        raise UnreadableMesh(f"{path}: no such file; give a mesh that trimesh reads, as .ply, .obj or .glb")
    try:
        loaded: Any = trimesh.load(path, force="mesh", process=False)
    except (ValueError, OSError, KeyError, IndexError, NotImplementedError) as error:
        raise UnreadableMesh(f"{path}: cannot be read as a mesh ({error})") from error
    vertices, faces = np.asarray(loaded.vertices, np.float32), np.asarray(loaded.faces, np.int64)
    if not len(faces) or not np.isfinite(vertices).all() or not loaded.area > 0:
        raise UnreadableMesh(f"{path}: holds no triangles with an area, or points that are not finite")
    up = noted_up(path) or ("y" if path.suffix.lower() in (".glb", ".gltf", ".obj") else None)
    if up is not None:
        vertices = turned_back(vertices, up)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2) * (2 * REACH / max(float((high - low).max()), 1e-6))
    return torch.from_numpy(vertices), torch.from_numpy(faces)


def sample_points(mesh: Surface, count: int, generator: torch.Generator) -> Tensor:
    """Points [N, 3] spread evenly over a mesh's surface."""
    vertices, faces = mesh
    a, b, c = (vertices[corner] for corner in faces.unbind(1))
    area = torch.linalg.cross(b - a, c - a).norm(dim=1)
    picked = torch.multinomial(area / area.sum(), count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, 1, generator=generator, dtype=torch.float32, device=generator.device)
    flip = u + v > 1
    u, v = torch.where(flip, 1 - u, u), torch.where(flip, 1 - v, v)
    return a[picked] + u * (b - a)[picked] + v * (c - a)[picked]
