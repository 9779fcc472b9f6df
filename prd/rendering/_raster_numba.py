"""The CPU backend of `rasterize`: a z-buffer compiled by numba.

Homogeneous rasterisation (Olano and Greer 1997): the edge functions of a triangle come from the adjugate of its
(x, y, w) matrix, so vertices behind the camera need no clipping; only the bounding box does. Edge functions are taken
in float64 from products that change sign exactly when an edge is walked the other way, so two triangles that share an
edge leave no gap between them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prd.utils.jit import jit
from prd.utils.threads import share

WORK_PER_THREAD = 1 << 16  # faces and pixels, about 0.5 ms: less is not worth starting a thread for


@jit
def _bounds(tri: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    """Screen bounds (low, high: x, y in pixels) of a triangle's part before the near plane z = -w.

    tri [3, 4] holds x w, y w (pixels), z, w. Returns 0: nothing before it; 1: bounded; 2: unbounded.
    """
    low[:] = np.inf
    high[:] = -np.inf
    for i in range(3):
        di = tri[i, 2] + tri[i, 3]
        if di >= 0.0:
            if tri[i, 3] <= 0.0:
                return 2
            for k in range(2):
                value = tri[i, k] / tri[i, 3]
                low[k] = min(low[k], value)
                high[k] = max(high[k], value)
        j = (i + 1) % 3
        dj = tri[j, 2] + tri[j, 3]
        if (di >= 0.0) != (dj >= 0.0):
            t = di / (di - dj)
            w = tri[i, 3] + t * (tri[j, 3] - tri[i, 3])
            if w <= 0.0:
                return 2
            for k in range(2):
                value = (tri[i, k] + t * (tri[j, k] - tri[i, k])) / w
                low[k] = min(low[k], value)
                high[k] = max(high[k], value)
    return 1 if high[0] >= low[0] else 0


@jit
def _project(clip: np.ndarray, width: int, height: int, out: np.ndarray) -> None:
    """Vertices clip [N, 4] to out [N, 6]: x w, y w, z, w, then x, y (NaN if not before the near plane), in pixels."""
    for i in range(clip.shape[0]):
        z, w = np.float64(clip[i, 2]), np.float64(clip[i, 3])
        out[i, 0] = (np.float64(clip[i, 0]) * 0.5 + 0.5 * w) * width
        out[i, 1] = (0.5 * w - np.float64(clip[i, 1]) * 0.5) * height
        out[i, 2] = z
        out[i, 3] = w
        before = w > 0.0 and z + w >= 0.0
        out[i, 4] = out[i, 0] / w if before else np.nan
        out[i, 5] = out[i, 1] / w if before else np.nan


@jit
def _box(
    vertices: np.ndarray,
    corners: tuple[int, int, int],
    frame: tuple[float, float, float, float],
    tri: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[int, int, int, int]:
    """Pixels that a triangle may cover: first and last column, first and last row; a first beyond its last: none.

    vertices of `_project`; frame: the outermost pixel centres (left, right, top, bottom); tri, low, high: scratch space
    """
    i0, i1, i2 = corners
    left, right, top, bottom = frame
    ya, yb, yc = vertices[i0, 5], vertices[i1, 5], vertices[i2, 5]
    xa, xb, xc = vertices[i0, 4], vertices[i1, 4], vertices[i2, 4]
    x_low, x_high, y_low, y_high = min(xa, xb, xc), max(xa, xb, xc), min(ya, yb, yc), max(ya, yb, yc)
    if np.isnan(xa + xb + xc):
        for k in range(4):
            tri[0, k], tri[1, k], tri[2, k] = vertices[i0, k], vertices[i1, k], vertices[i2, k]
        kind = _bounds(tri, low, high)
        if kind == 0:
            return 1, 0, 1, 0
        x_low, x_high, y_low, y_high = low[0], high[0], low[1], high[1]
        if kind == 2:
            x_low, x_high, y_low, y_high = -np.inf, np.inf, -np.inf, np.inf
    if y_high < top or y_low > bottom or x_high < left or x_low > right:
        return 1, 0, 1, 0
    x_min, x_max = int(np.ceil(max(x_low, left) - 0.5)), int(np.floor(min(x_high, right) - 0.5))
    y_min, y_max = int(np.ceil(max(y_low, top) - 0.5)), int(np.floor(min(y_high, bottom) - 0.5))
    return x_min, x_max, y_min, y_max


@jit
def _draw(
    vertices: np.ndarray,
    faces: np.ndarray,
    limits: tuple[int, int],
    rows: tuple[int, int],
    face_index: np.ndarray,
    barycentric: np.ndarray,
    depth: np.ndarray,
) -> None:
    """Draw faces[limits[0]:limits[1]] with the vertices of `_project` into `rows` of one image [H, W].

    depth holds +inf where nothing was drawn; the nearest face wins, of equals the first.
    """
    width = face_index.shape[1]
    tri = np.empty((3, 4))
    low = np.empty(2)
    high = np.empty(2)
    frame = 0.5, width - 0.5, rows[0] + 0.5, rows[1] - 0.5  # the outermost pixel centres
    for f in range(limits[0], limits[1]):
        i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
        x_min, x_max, y_min, y_max = _box(vertices, (i0, i1, i2), frame, tri, low, high)
        if x_min > x_max or y_min > y_max:
            continue
        x0, y0, z0, w0 = vertices[i0, 0], vertices[i0, 1], vertices[i0, 2], vertices[i0, 3]
        x1, y1, z1, w1 = vertices[i1, 0], vertices[i1, 1], vertices[i1, 2], vertices[i1, 3]
        x2, y2, z2, w2 = vertices[i2, 0], vertices[i2, 1], vertices[i2, 2], vertices[i2, 3]
        a0, b0, c0 = y1 * w2 - y2 * w1, x2 * w1 - x1 * w2, x1 * y2 - x2 * y1
        a1, b1, c1 = y2 * w0 - y0 * w2, x0 * w2 - x2 * w0, x2 * y0 - x0 * y2
        a2, b2, c2 = y0 * w1 - y1 * w0, x1 * w0 - x0 * w1, x0 * y1 - x1 * y0
        det = x0 * a0 + y0 * b0 + w0 * c0
        if det == 0.0:
            continue
        za, zb, zc = (
            (a0 * z0 + a1 * z1 + a2 * z2) / det,
            (b0 * z0 + b1 * z1 + b2 * z2) / det,
            (c0 * z0 + c1 * z1 + c2 * z2) / det,
        )
        if det < 0.0:  # edge functions are positive inside for either winding
            a0, b0, c0, a1, b1, c1, a2, b2, c2 = -a0, -b0, -c0, -a1, -b1, -c1, -a2, -b2, -c2
        for row in range(y_min, y_max + 1):
            py = row + 0.5
            r0, r1, r2, rz = b0 * py + c0, b1 * py + c1, b2 * py + c2, zb * py + zc
            for column in range(x_min, x_max + 1):
                px = column + 0.5
                e0, e1, e2 = a0 * px + r0, a1 * px + r1, a2 * px + r2
                if e0 < 0.0 or e1 < 0.0 or e2 < 0.0:
                    continue
                z = np.float32(za * px + rz)
                total = e0 + e1 + e2
                if z < depth[row, column] and z >= -1.0 and z <= 1.0 and total > 0.0:
                    depth[row, column] = z
                    face_index[row, column] = f
                    barycentric[row, column, 0] = e0 / total
                    barycentric[row, column, 1] = e1 / total
                    barycentric[row, column, 2] = e2 / total


def rasterize_numba(
    clip: Tensor, faces: Tensor, ranges: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """face_index [M*V, H, W] int64 (-1 empty), barycentric [..., 3] and depth z/w (inf where empty), on CPU.

    clip [V, N, 4], faces [F, 3], ranges [M, 2] (first and last face, exclusive, of each mesh). Shares the work between
    torch.get_num_threads() threads, as images or, where those are fewer, as bands of rows.
    """
    views, meshes = clip.shape[0], ranges.shape[0]
    images = meshes * views
    points, corners = clip.detach().contiguous().numpy(), faces.contiguous().numpy()
    vertices = np.empty((views, clip.shape[1], 6))
    face_index = torch.full((images, height, width), -1, dtype=torch.int64, device="cpu")
    barycentric = torch.zeros(images, height, width, 3, dtype=torch.float32, device="cpu")
    depth = torch.full((images, height, width), torch.inf, dtype=torch.float32, device="cpu")
    buffers = (face_index.numpy(), barycentric.numpy(), depth.numpy())
    limits = [(first, last) for first, last in ranges.tolist()]
    work = views * sum(last - first for first, last in limits) + face_index.numel()
    threads = min(torch.get_num_threads(), max(1, work // WORK_PER_THREAD))
    bands = 1 if threads == 1 or images >= 4 * threads else min(height, -(-4 * threads // max(images, 1)))

    def project(view: int) -> None:
        _project(points[view], width, height, vertices[view])

    def draw(number: int) -> None:
        image, band = divmod(number, bands)
        rows = (band * height // bands, (band + 1) * height // bands)
        _draw(vertices[image % views], corners, limits[image // views], rows, *(buffer[image] for buffer in buffers))

    share(project, views, threads)
    share(draw, images * bands, threads)
    return face_index, barycentric, depth
