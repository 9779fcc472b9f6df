"""A tree of boxes over triangles, compiled by numba: pairs of triangles that intersect, and the first hit of a ray.

Triangles lie along a Morton curve, LEAF of them in a leaf of a complete binary tree: node i has the children 2 i and
2 i + 1, the root is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prd.utils.jit import jit
from prd.utils.threads import share

LEAF = 4
DEPTH = 64  # nodes that wait while the tree is walked: two for each of its levels
EPS = 1e-9  # of the unit cube: nearer than this, a point lies on a plane
PER_JOB = 1 << 12  # triangles or rays


@dataclass(frozen=True)
class Tree:
    """Triangles in a tree of boxes.

    points [F, 3, 3] float64 and ids [F, 3] int64: corners and the vertices they are, along the curve; order [F]: which
    triangle of those given each one is; low, high [2 P, 3]: the boxes, P leaves.
    """

    points: NDArray[np.float64]
    ids: NDArray[np.int64]
    order: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def build_tree(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> Tree:
    """Return the tree of faces [F, 3] of vertices [V, 3] in the unit cube, F at least 1."""
    centre = vertices[faces].mean(axis=1)
    cell = (centre.clip(0, 1) * 1023).astype(np.int64)
    code = np.zeros(len(faces), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= ((cell[:, axis] >> bit) & 1) << (3 * bit + axis)
    order = np.argsort(code, kind="stable")
    points, ids = vertices[faces[order]], faces[order]
    leaves = 1 << max(0, int(np.ceil(np.log2(max(1, -(-len(faces) // LEAF))))))
    low, high = np.full((2 * leaves, 3), np.inf), np.full((2 * leaves, 3), -np.inf)
    for box, empty, smallest in ((low, np.inf, np.min), (high, -np.inf, np.max)):
        padded = np.full((leaves * LEAF, 3), empty)
        padded[: len(faces)] = smallest(points, axis=1)
        box[leaves:] = smallest(padded.reshape(leaves, LEAF, 3), axis=1)
    while leaves > 1:
        leaves //= 2
        low[leaves : 2 * leaves] = low[2 * leaves : 4 * leaves].reshape(leaves, 2, 3).min(axis=1)
        high[leaves : 2 * leaves] = high[2 * leaves : 4 * leaves].reshape(leaves, 2, 3).max(axis=1)
    return Tree(points, ids, order, low, high)


def intersecting_pairs(tree: Tree) -> int:
    """Return the number of pairs of triangles that pierce each other or overlap in one plane.

    Triangles that share an edge or a corner meet there and are no pair for that; two of the same three corners are one.
    """
    count = len(tree.points)
    jobs = -(-count // PER_JOB)
    found = np.zeros(jobs, np.int64)

    def search(job: int) -> None:
        first = job * PER_JOB
        found[job] = _pairs(tree.points, tree.ids, tree.low, tree.high, first, min(first + PER_JOB, count))

    share(search, jobs, torch.get_num_threads())
    return int(found.sum())


def first_hits(
    tree: Tree, origins: NDArray[np.float64], directions: NDArray[np.float64], most: float
) -> NDArray[np.float64]:
    """Return the distances [N] from origins [N, 3] along unit directions to the first triangle nearer than `most`.

    inf where there is none.
    """
    out = np.full(len(origins), np.inf)
    jobs = -(-len(origins) // PER_JOB)

    def cast(job: int) -> None:
        part = slice(job * PER_JOB, (job + 1) * PER_JOB)
        _cast(tree.points, tree.low, tree.high, origins[part], directions[part], most, out[part])

    share(cast, jobs, torch.get_num_threads())
    return out


@jit
def _plane(t: np.ndarray, p: np.ndarray, n: np.ndarray) -> float:
    """Signed distance of a point from the plane of a triangle with unit normal n."""
    return n[0] * (p[0] - t[0, 0]) + n[1] * (p[1] - t[0, 1]) + n[2] * (p[2] - t[0, 2])


@jit
def _normal(t: np.ndarray, n: np.ndarray) -> bool:
    """Unit normal of a triangle into n; False for one without area."""
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    n[0], n[1], n[2] = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2])
    if length < 1e-18:
        return False
    n /= length
    return True


@jit
def _axes(n: np.ndarray) -> tuple[int, int]:
    """The two axes across which a plane of normal n is seen largest."""
    k = 0
    for i in range(1, 3):
        if abs(n[i]) > abs(n[k]):
            k = i
    return (k + 1) % 3, (k + 2) % 3


@jit
def _pierces(p: np.ndarray, q: np.ndarray, t: np.ndarray, n: np.ndarray, margin: float) -> bool:
    """Whether the segment pq passes through a triangle; margin: how far within its border, negative: beyond it."""
    d, e = _plane(t, p, n), _plane(t, q, n)
    if not ((d > EPS and e < -EPS) or (d < -EPS and e > EPS)):
        return False
    s = d / (d - e)
    a, b = _axes(n)
    x, y = p[a] + s * (q[a] - p[a]), p[b] + s * (q[b] - p[b])
    low, high = np.inf, -np.inf
    for i in range(3):
        j = (i + 1) % 3
        ux, uy = t[j, a] - t[i, a], t[j, b] - t[i, b]
        length = np.sqrt(ux * ux + uy * uy)
        side = (ux * (y - t[i, b]) - uy * (x - t[i, a])) / max(length, 1e-300)
        low, high = min(low, side), max(high, side)
    return low > margin or high < -margin


@jit
def _overlap(s: np.ndarray, t: np.ndarray, n: np.ndarray) -> bool:
    """Whether two triangles of one plane have an area in common: no side of either separates them."""
    a, b = _axes(n)
    for k in range(6):
        r = s if k < 3 else t
        i, j = k % 3, (k + 1) % 3
        x, y = -(r[j, b] - r[i, b]), r[j, a] - r[i, a]
        length = max(np.sqrt(x * x + y * y), 1e-300)
        lows, highs, lowt, hight = np.inf, -np.inf, np.inf, -np.inf
        for c in range(3):
            u = (x * s[c, a] + y * s[c, b]) / length
            v = (x * t[c, a] + y * t[c, b]) / length
            lows, highs, lowt, hight = min(lows, u), max(highs, u), min(lowt, v), max(hight, v)
        if highs <= lowt + EPS or hight <= lows + EPS:
            return False
    return True


@jit
def _meet(s: np.ndarray, t: np.ndarray, i: np.ndarray, j: np.ndarray, m: np.ndarray, n: np.ndarray) -> bool:
    """Whether two triangles s and t with vertices i and j intersect; m, n [3] are written."""
    if not _normal(s, m) or not _normal(t, n):
        return False
    shared, own, other = 0, -1, -1
    for a in range(3):
        for b in range(3):
            if i[a] == j[b]:
                shared, own, other = shared + 1, a, b
    if shared == 3:
        return True
    flat = True
    for a in range(3):
        flat = flat and abs(_plane(s, t[a], m)) <= EPS and abs(_plane(t, s[a], n)) <= EPS
    if flat:
        return _overlap(s, t, m)
    if shared == 2:
        return False
    if shared == 1:
        return _pierces(s[(own + 1) % 3], s[(own + 2) % 3], t, n, EPS) or _pierces(
            t[(other + 1) % 3], t[(other + 2) % 3], s, m, EPS
        )
    for a in range(3):
        b = (a + 1) % 3
        if _pierces(s[a], s[b], t, n, -EPS) or _pierces(t[a], t[b], s, m, -EPS):
            return True
    return False


@jit
def _pairs(points: np.ndarray, ids: np.ndarray, low: np.ndarray, high: np.ndarray, first: int, last: int) -> int:
    """The pairs of which the earlier triangle along the curve is one of first to last (exclusive)."""
    leaves, found = low.shape[0] // 2, 0
    stack = np.empty(DEPTH, np.int64)
    below, above, m, n = np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    for f in range(first, last):
        for k in range(3):
            below[k] = min(points[f, 0, k], points[f, 1, k], points[f, 2, k])
            above[k] = max(points[f, 0, k], points[f, 1, k], points[f, 2, k])
        stack[0], size = 1, 1
        while size > 0:
            size -= 1
            node = stack[size]
            apart = False
            for k in range(3):
                apart = apart or low[node, k] > above[k] or high[node, k] < below[k]
            if apart:
                continue
            if node < leaves:
                stack[size], stack[size + 1] = 2 * node, 2 * node + 1
                size += 2
                continue
            start = (node - leaves) * LEAF
            for g in range(max(start, f + 1), min(start + LEAF, points.shape[0])):
                apart = False
                for k in range(3):
                    apart = (
                        apart
                        or min(points[g, 0, k], points[g, 1, k], points[g, 2, k]) > above[k]
                        or max(points[g, 0, k], points[g, 1, k], points[g, 2, k]) < below[k]
                    )
                if not apart and _meet(points[f], points[g], ids[f], ids[g], m, n):
                    found += 1
    return found


@jit
def _hit(t: np.ndarray, o: np.ndarray, d: np.ndarray) -> float:
    """Distance along a ray to a triangle (Moeller and Trumbore 1997), inf if it misses it or is nearer than EPS."""
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    px, py, pz = d[1] * vz - d[2] * vy, d[2] * vx - d[0] * vz, d[0] * vy - d[1] * vx
    det = ux * px + uy * py + uz * pz
    if abs(det) < 1e-18:
        return np.inf
    sx, sy, sz = o[0] - t[0, 0], o[1] - t[0, 1], o[2] - t[0, 2]
    u = (sx * px + sy * py + sz * pz) / det
    qx, qy, qz = sy * uz - sz * uy, sz * ux - sx * uz, sx * uy - sy * ux
    v = (d[0] * qx + d[1] * qy + d[2] * qz) / det
    distance = (vx * qx + vy * qy + vz * qz) / det
    inside = u >= 0.0 and v >= 0.0 and u + v <= 1.0
    return distance if inside and distance > EPS else np.inf


@jit
def _cast(
    points: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    origins: np.ndarray,
    directions: np.ndarray,
    most: float,
    out: np.ndarray,
) -> None:
    """Distances out [N] of rays to the first triangle nearer than `most`, else inf."""
    leaves = low.shape[0] // 2
    stack = np.empty(DEPTH, np.int64)
    for r in range(origins.shape[0]):
        best = most
        stack[0], size = 1, 1
        while size > 0:
            size -= 1
            node = stack[size]
            near, far = 0.0, best
            for k in range(3):
                if abs(directions[r, k]) < 1e-300:
                    if origins[r, k] < low[node, k] or origins[r, k] > high[node, k]:
                        far = -1.0
                    continue
                a = (low[node, k] - origins[r, k]) / directions[r, k]
                b = (high[node, k] - origins[r, k]) / directions[r, k]
                near, far = max(near, min(a, b)), min(far, max(a, b))
            if near > far * (1 + 1e-12):
                continue
            if node < leaves:
                stack[size], stack[size + 1] = 2 * node, 2 * node + 1
                size += 2
                continue
            start = (node - leaves) * LEAF
            for g in range(start, min(start + LEAF, points.shape[0])):
                best = min(best, _hit(points[g], origins[r], directions[r]))
        out[r] = best if best < most else np.inf
