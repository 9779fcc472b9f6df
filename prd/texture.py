"""Textures: unwrap a surface, find the surface point of every texel, fill the gutter.

UV coordinates have their origin at the lower left (v up), as in OBJ; row 0 of a texture is its top (v = 1).
"""

from __future__ import annotations

from collections.abc import Iterator
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


def _cover(triangles: NDArray[np.float64], size: int) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Texels whose centre lies in each triangle [F, 3, 2] (column, row in texels), some faces at a time.

    Yields texel index [T], face [T], barycentric weights [T, 3]. A triangle without area covers nothing.
    """
    low = np.clip(np.ceil(triangles.min(1) - 0.5), 0, size).astype(np.int64)  # [F, 2] first centre inside the box
    high = np.clip(np.floor(triangles.max(1) - 0.5) + 1, low, size).astype(np.int64)  # one past the last
    extent = high - low
    start, slope = _edge_functions(triangles, low + 0.5)
    counts = np.where(np.isfinite(slope).all((1, 2)), extent.prod(1), 0)  # candidates: the texels of the box
    for faces in np.split(np.arange(len(triangles)), np.flatnonzero(np.diff(counts.cumsum() // CHUNK)) + 1):
        count = counts[faces]
        face = np.repeat(faces, count)
        local = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        row, column = np.divmod(local, extent[face, 0])
        first, second = (start[face, k] + slope[face, k, 0] * column + slope[face, k, 1] * row for k in range(2))
        inside = (first >= -EDGE) & (second >= -EDGE) & (first + second <= 1 + EDGE)
        face, first, second = face[inside], first[inside], second[inside]
        index = (row[inside] + low[face, 1]) * size + column[inside] + low[face, 0]
        yield index, face, np.stack([first, second, 1 - first - second], axis=1)


def _edge_functions(
    triangles: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first two barycentric weights as affine functions of the offset from `origin` [F, 2].

    Returns their values at the origin [F, 2] and slopes [F, 2, 2] per column and row; not finite without area.
    """
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    (bx, by), (cx, cy) = (b - a).T, (c - a).T
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (bx * cy - by * cx)[:, None]
        slope_b = np.stack([cy, -cx], axis=1) / area
        slope_c = np.stack([-by, bx], axis=1) / area
        slope = np.stack([-slope_b - slope_c, slope_b], axis=1)
        start = (slope * (origin - a)[:, None]).sum(2) + np.array([1.0, 0.0])
    return start, slope
