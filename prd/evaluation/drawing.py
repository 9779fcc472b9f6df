"""Pictures of mesh files as a protocol asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.evaluation.protocols import Pictures
from prd.meshes.files import FileMesh
from prd.rendering.rasterize import Fragments, interpolate_covered, rasterize

AT_ONCE = 4  # views that are drawn together


def cameras_of(pictures: Pictures) -> Cameras:
    """Return the cameras [1, V] of a protocol: its azimuths, or, on the sphere, each vertex with each field of view."""
    if not pictures.sphere:
        azimuth = torch.tensor([pictures.azimuths], dtype=torch.float64, device="cpu")
        return orbit_cameras(torch.full_like(azimuth, pictures.elevation), azimuth, pictures.distance, pictures.fovy)
    back = np.asarray(icosphere().vertices)
    up = np.where(np.abs(back[:, 2:]) < 0.99, [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]])
    right = np.cross(up, back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    pose = np.tile(np.eye(4), (len(back), 1, 1))
    pose[:, :3, :3] = np.stack([right, np.cross(back, right), back], axis=2)
    pose[:, :3, 3] = back * pictures.distance
    each = torch.from_numpy(pose).repeat_interleave(len(pictures.fovys), dim=0)
    fovy = torch.deg2rad(torch.tensor(pictures.fovys, dtype=torch.float64, device="cpu")).repeat(len(back))
    return Cameras(each[None], fovy[None])


def icosphere() -> trimesh.Trimesh:
    """Return T3Bench's sphere of 162 vertices."""
    return trimesh.creation.icosphere(subdivisions=2, radius=1.0)


def normalised(mesh: FileMesh, pictures: Pictures) -> Tensor:
    """Return the vertices [V, 3] float64 where a protocol puts them; ValueError for a mesh without extent."""
    used = mesh.vertices[np.unique(mesh.faces)]
    low, high = used.min(axis=0), used.max(axis=0)
    centre = used.mean(axis=0) if pictures.normalisation == "mean" else (low + high) / 2
    reach = max(float(np.abs(used - centre).max()), 0.0)
    if not 0 < reach < math.inf:
        raise ValueError("has no extent: all of its vertices are at one place")
    vertices = (mesh.vertices - centre) * (pictures.extent / reach)
    return torch.from_numpy(np.where(np.isfinite(vertices), vertices, 0.0))


def draw(mesh: FileMesh, pictures: Pictures) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures [size, size, 3], in sRGB, of the views of a protocol, unlit.

    Raises ValueError for a mesh without extent.
    """
    vertices, cameras = normalised(mesh, pictures), cameras_of(pictures)
    reach = float(vertices.norm(dim=1).max()) + 1.0
    near = max(1e-2, pictures.distance - reach)
    matrix = (cameras.projection(near=near, far=pictures.distance + reach) @ cameras.world_to_camera())[0]
    homogeneous = torch.cat([vertices, torch.ones_like(vertices[:, :1])], dim=1)
    faces, colors = torch.from_numpy(mesh.faces), torch.from_numpy(mesh.colors)
    uv = torch.from_numpy(np.nan_to_num(mesh.uv))
    for part in matrix.split(AT_ONCE):
        clip = torch.einsum("vij,nj->vni", part, homogeneous)
        fragments = rasterize(clip, faces, pictures.size, pictures.size)
        pixels = fragments.covered()
        seen = interpolate_covered(colors, faces, fragments, pixels).float().numpy()
        _texture(seen, mesh, uv, faces, fragments, pixels)
        images = np.full((len(part) * pictures.size**2, 3), pictures.background, np.float32)
        images[pixels.numpy()] = seen
        yield from (images.clip(0, 1) * 255).round().astype(np.uint8).reshape(-1, pictures.size, pictures.size, 3)


def _texture(
    seen: NDArray[np.float32], mesh: FileMesh, uv: Tensor, faces: Tensor, fragments: Fragments, pixels: Tensor
) -> None:
    """Multiply the colours [P, 3] of pixels with the textures of the faces they see, bilinear and repeated."""
    if not mesh.textures:
        return
    texture = mesh.texture_of[fragments.face_index.reshape(-1)[pixels].numpy()]
    place = interpolate_covered(uv, faces, fragments, pixels).numpy()
    for number, picture in enumerate(mesh.textures):
        rows = np.nonzero(texture == number)[0]
        height, width = picture.shape[:2]
        x, y = place[rows, 0] * width - 0.5, (1 - place[rows, 1]) * height - 0.5
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        left, right, upper, lower = x0 % width, (x0 + 1) % width, y0 % height, (y0 + 1) % height
        above = picture[upper, left] * (1 - fx) + picture[upper, right] * fx
        below = picture[lower, left] * (1 - fx) + picture[lower, right] * fx
        seen[rows] *= (above * (1 - fy) + below * fy) / 255
