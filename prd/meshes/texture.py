"""Textures: unwrap a surface, find the surface point of every texel, fill the gutter.

UV coordinates have their origin at the lower left (v up), as in OBJ; row 0 of a texture is its top (v = 1).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from prd.meshes.charts import charts_of, cut_into_charts
from prd.meshes.packing import pack
from prd.rendering.rasterize import interpolate_covered, rasterize

logger = logging.getLogger(__name__)

SIZES = (256, 512, 1024)  # texels per side to choose from
SAMPLES = 4096  # points of a surface whose colours say how much detail there is
FAITHFUL = 1.5 / 255  # of a colour
SHARP = 0.02  # of the points, on edges of colour that no texture holds
USED = 0.7  # of a texture, by charts
CELLS = 256  # per side of the grid on which charts are placed, at most
GAP = (
    1  # cells between charts, a texel of the smallest texture chosen: bilinear filtering stays in a chart's own gutter
)


@dataclass(frozen=True)
class TexelPoints:
    """The surface point of every texel that some surface reaches.

    index   [T]     row * size + column of the texel in a size x size texture
    points  [T, C]  scene units, and what else was interpolated
    size            side of the square texture, texels
    """

    index: NDArray[np.int64]
    points: NDArray[np.float32]
    size: int


def unwrap(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Cut a surface into charts and pack them into one square, none of them mirrored.

    vertices [V, 3], faces [F, 3]; size: side in texels of the texture to come, from which the gutter follows.

    Returns source [V'] (the vertex that each new vertex copies: vertices on a cut appear several times),
    faces [F, 3] into the new vertices (same triangles, same order), uv [V', 2] in [0, 1].
    Some tenths of a second at 10,000 triangles, growing about as their number does.
    """
    if not len(faces) or not np.isfinite(vertices).all() or (faces == np.roll(faces, 1, axis=1)).any():
        raise ValueError(
            f"faces={faces.shape}: cannot be unwrapped; give faces of three different, finite vertices each"
        )
    started = time.perf_counter()
    source, charted, uv = cut_into_charts(vertices, faces)
    uv = pack(uv, charted, min(size, CELLS), GAP)
    seconds, count = time.perf_counter() - started, charts_of(charted, len(uv))[0]
    logger.info(
        "unwrapped %d triangles in %.2f s: %d charts, %.2f s per chart; %.0f %% of the texture used",
        *(len(faces), seconds, count, seconds / count, 100 * used_area(charted, uv)),
    )
    return source, charted, uv


def used_area(faces: NDArray[np.int64], uv: NDArray[np.float32]) -> float:
    """Return the part of the texture that triangles cover; a mirrored one counts negatively."""
    (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T for k in (1, 2))
    return float((a * d - b * c).sum(dtype=np.float64) / 2)


def texture_size(
    vertices: NDArray[np.float32],
    faces: NDArray[np.int64],
    rgb: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> int:
    """Return the smallest of `SIZES` that holds the detail of a surface's colours.

    vertices [V, 3], faces [F, 3]; rgb: the colours [N, 3] at points [N, 3]. A texture holds it if a texel's colour is
    within `FAITHFUL` of the mean of its four corners' at all but `SHARP` of the points tried.
    """
    surface = trimesh.Trimesh(vertices, faces, process=False)
    points, on = trimesh.sample.sample_surface(surface, SAMPLES, seed=0)
    normal = surface.face_normals[on]
    along = np.cross(normal, np.roll(normal, 1, axis=1) + [[0.0, 0.1, 0.2]])
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = np.cross(normal, along)
    here = rgb(points.astype(np.float32))
    for size in SIZES:
        half = math.sqrt(float(surface.area) / USED) / size / 2
        corners = [points + half * (a * along + b * across) for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        error = np.abs(np.mean([rgb(corner.astype(np.float32)) for corner in corners], axis=0) - here).max(axis=1)
        if np.mean(error > FAITHFUL) <= SHARP:
            return size
    return SIZES[-1]


def texel_points(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], uv: NDArray[np.float32], size: int
) -> TexelPoints:
    """Find where on the surface the centre of each texel lies.

    vertices [V, C], their points and what else is interpolated, faces [F, 3], uv [V, 2]; size: side of the texture,
    texels. Triangles too small to cover a texel
    centre still mark the texels of their corners, so that no triangle takes its colour from another chart.
    """
    points = np.zeros((size * size, vertices.shape[1]), np.float32)
    covered = np.zeros(size * size, bool)
    column_row = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1) * size  # [V, 2]
    corner = np.clip(column_row.astype(np.int64), 0, size - 1)
    index = corner[:, 1] * size + corner[:, 0]
    points[index], covered[index] = vertices, True
    # the atlas seen from straight above: u to the right, v up
    clip = torch.zeros(1, len(uv), 4, dtype=torch.float32, device="cpu")
    clip[0, :, :2] = torch.from_numpy(uv) * 2 - 1
    clip[..., 3] = 1
    triangles = torch.from_numpy(faces)
    fragments = rasterize(clip, triangles, size, size)
    texels = fragments.covered()
    index = texels.numpy()
    points[index] = interpolate_covered(torch.from_numpy(vertices), triangles, fragments, texels).numpy()
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
