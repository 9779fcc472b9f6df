"""Textures: unwrap a surface, find the surface point of every texel, fill the gutter.

UV coordinates have their origin at the lower left (v up), as in OBJ; row 0 of a texture is its top (v = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xatlas
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

PADDING = 4  # texels between charts: keeps bilinear filtering and two mip levels inside a chart's own gutter
CHUNK = 1 << 20  # candidate texels tested at once: bounds the memory of the rasteriser to some tens of MB
EDGE = 1e-9  # barycentric slack, so that a texel centre on an edge shared by two triangles is never lost


@dataclass(frozen=True)
class TexelPoints:
    """The surface point of every texel that some surface reaches.

    index   [T]     row * size + column of the texel in a size x size texture
    points  [T, 3]  scene units
    size            side of the square texture, texels
    """

    index: NDArray[np.int64]
    points: NDArray[np.float32]
    size: int


def unwrap(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Cut a surface into charts and pack them into one square (xatlas).

    vertices [V, 3], faces [F, 3]; size: side in texels of the texture to come, from which the gutter follows.

    Returns source [V'] (the vertex that each new vertex copies: vertices on a cut appear several times),
    faces [F, 3] into the new vertices (same triangles, same order), uv [V', 2] in [0, 1].
    Takes 0.3 s at 5k triangles and grows faster than linearly: decimate first.
    """
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    packing = xatlas.PackOptions()
    packing.padding = PADDING
    packing.resolution = size
    atlas.generate(pack_options=packing)
    if atlas.atlas_count != 1:
        raise ValueError(f"texture_size={size}: too small for the charts of {len(faces)} faces; take a larger one")
    source, charted, uv = atlas.get_mesh(0)
    return source.astype(np.int64), charted.astype(np.int64), uv.astype(np.float32)


def texel_points(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], uv: NDArray[np.float32], size: int
) -> TexelPoints:
    """Where on the surface the centre of each texel lies.

    vertices [V, 3], faces [F, 3], uv [V, 2]; size: side of the texture, texels. Triangles too small to cover a texel
    centre still mark the texels of their corners, so that no triangle takes its colour from another chart.
    """
    points = np.zeros((size * size, 3), np.float32)
    covered = np.zeros(size * size, bool)
    at = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1).astype(np.float64) * size  # [V, 2] column, row
    corner = np.clip(at[faces.ravel()].astype(np.int64), 0, size - 1)  # [3F, 2]
    index = corner[:, 1] * size + corner[:, 0]
    points[index], covered[index] = vertices[faces.ravel()], True
    for index, face, weights in _cover(at[faces], size):
        points[index] = np.einsum("tc,tcx->tx", weights, vertices[faces[face]])
        covered[index] = True
    reached = np.flatnonzero(covered)
    return TexelPoints(reached, points[reached], size)


def paint(texels: TexelPoints, rgb: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The texture [size, size, 3] with colours rgb [T, 3] in [0, 1] at the texels, the rest filled by the nearest."""
    image = np.zeros((texels.size**2, 3), np.uint8)
    image[texels.index] = to_bytes(rgb)
    empty = np.ones(texels.size**2, bool)
    empty[texels.index] = False
    shape = (texels.size, texels.size)
    rows, columns = distance_transform_edt(empty.reshape(shape), return_distances=False, return_indices=True)
    return image.reshape(*shape, 3)[rows, columns]


def to_bytes(rgb: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colours in [0, 1] as bytes, rounded."""
    return np.round(rgb * 255).astype(np.uint8)


def _cover(triangles: NDArray[np.float64], size: int):
    """Texels whose centre lies in each triangle [F, 3, 2] (column, row in texels), some faces at a time.

    Yields texel index [T], face [T], barycentric weights [T, 3].
    """
    low = np.clip(np.ceil(triangles.min(1) - 0.5), 0, size).astype(np.int64)  # [F, 2] first centre inside the box
    high = np.clip(np.floor(triangles.max(1) - 0.5) + 1, low, size).astype(np.int64)  # one past the last
    extent = high - low
    counts = extent.prod(1)
    for faces in np.split(np.arange(len(triangles)), np.flatnonzero(np.diff(counts.cumsum() // CHUNK)) + 1):
        count = counts[faces]
        face = np.repeat(faces, count)
        local = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        column = low[face, 0] + local % extent[face, 0]
        row = low[face, 1] + local // extent[face, 0]
        centre = np.stack([column, row], axis=1) + 0.5
        a, b, c = (triangles[face, k] for k in range(3))
        area = _cross(b - a, c - a)
        with np.errstate(divide="ignore", invalid="ignore"):  # a triangle without area covers nothing: NaN >= 0 fails
            weights = np.stack([_cross(b - centre, c - centre), _cross(c - centre, a - centre)], axis=1) / area[:, None]
        weights = np.concatenate([weights, 1 - weights.sum(1, keepdims=True)], axis=1)
        inside = (weights >= -EDGE).all(1)
        yield (row * size + column)[inside], face[inside], weights[inside]


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
