"""Charts of an unwrapped surface: small ones are joined to their neighbours and flattened anew.

A chart is flattened by least squares conformal maps (Levy et al. 2002): of each triangle with corners u [3] in the
texture, as complex numbers, sum_k W_k u_k is as near to 0 as it gets, W_k being the opposite edge on the surface.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve

SMALL = 0.03  # of the area: charts below are joined to a neighbour where the two can be flattened together
ANGLES = 32  # of a quarter turn, among which the smallest box is found
GROWTH = 1.15  # at most, of the boxes around charts that are joined
PASSES = 8  # of smoothing borders
MIRRORED = 1e-6  # of the area, at most, that needles may lie turned over
STRETCH = 2.5  # at most, between the areas that 1 % of the texture and 99 % of it give to an equal area of the surface
THIN = 1e-12  # square scene units: no triangle counts for less


def charts_of(faces: NDArray[np.int64], count: int) -> tuple[int, NDArray[np.int64]]:
    """Return the number of charts and, for each of `count` vertices of an unwrapped surface, its chart [V]."""
    pairs = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    found, label = connected_components(graph.tocsr(), directed=False)
    return int(found), label.astype(np.int64)


def join_small(
    points: NDArray[Any], source: NDArray[np.int64], faces: NDArray[np.int64], uv: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Join the charts below `SMALL` to the neighbours with which they have the longest border, where that works.

    points [V, 3] of the unwrapped vertices; source [V]: the vertex that each copies; faces [F, 3]; uv [V, 2] at one
    scale. Returns faces and uv, at the scale of the surface: some vertices are no longer in use.
    """
    count, label = charts_of(faces, len(uv))
    points, exact = points.astype(np.float64), uv.astype(np.float64)
    exact *= np.sqrt(_areas(points[faces]).sum() / _signed_areas(exact[faces]).sum())
    joined = _Joined(points, source, faces.copy(), exact, label[faces[:, 0]])
    joined.smooth()
    areas = joined.areas(count)
    order = [int(chart) for chart in np.argsort(areas) if areas[chart] < SMALL * areas.sum()]
    wanted: dict[int, list[int]] = {}
    for chart in order:  # all at once into each of the large ones, which is fast
        if near := [other for other in joined.neighbours(chart) if other not in order]:
            wanted.setdefault(near[0], []).append(chart)
    for large, small in wanted.items():
        joined.join(large, small)
    for chart in order:  # what is left one by one, the smallest first
        for other in joined.neighbours(chart):
            if joined.join(other, [chart]):
                break
    joined.smooth()
    return joined.faces, joined.uv.astype(np.float32)


def upright(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points [V, 2] turned so that the box around them is the smallest."""
    angles = np.arange(ANGLES) * (math.pi / 2 / ANGLES)
    cos, sin = np.cos(angles), np.sin(angles)
    rotations = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)  # [A, 2, 2]
    turned = points @ rotations  # [A, V, 2]
    return np.asarray(turned[int(np.ptp(turned, axis=1).prod(axis=1).argmin())])


class _Joined:
    """Charts under way: chart_of [F] tells the chart of each face."""

    def __init__(
        self,
        points: NDArray[np.float64],
        source: NDArray[np.int64],
        faces: NDArray[np.int64],
        uv: NDArray[np.float64],
        chart_of: NDArray[np.int64],
    ) -> None:
        self.points, self.faces, self.uv, self.chart_of = points, faces, uv, chart_of
        corners = source[faces]
        first, second = corners.reshape(-1), np.roll(corners, -1, axis=1).reshape(-1)
        count = int(source.max()) + 1
        there, back = first * count + second, second * count + first  # each edge, and how its neighbour runs it
        order = np.argsort(there)
        at = np.searchsorted(there, back, sorter=order).clip(max=len(order) - 1)
        twin = order[at]
        self.twin = np.where(there[twin] == back, twin, -1)  # [F * 3]: the same edge in the face beside; -1: none

    def areas(self, count: int) -> NDArray[np.float64]:
        """Return the area [count] of each chart on the surface."""
        return np.asarray(np.bincount(self.chart_of, _areas(self.points[self.faces]), count), np.float64)

    def borders(self, chart: int) -> NDArray[np.int64]:
        """Return the edges [N, 2] between a chart's faces, in the first column, and those of others."""
        edges = np.flatnonzero((np.repeat(self.chart_of, 3) == chart) & (self.twin >= 0))
        edges = edges[self.chart_of[self.twin[edges] // 3] != chart]
        return np.stack([edges, self.twin[edges]], axis=1)

    def smooth(self) -> None:
        """Move triangles with two sides in another chart into it, where they fit: borders lose their teeth."""
        for _ in range(PASSES):
            beside = np.where(self.twin >= 0, self.chart_of[self.twin // 3], -1).reshape(-1, 3)
            pairs = beside == np.roll(beside, 1, axis=1)
            other = np.where(pairs, beside, -1).max(axis=1)
            teeth = np.flatnonzero((other >= 0) & (other != self.chart_of))
            moved = [self._move(int(face), int(other[face])) for face in teeth]
            if not any(moved):
                break

    def _move(self, face: int, chart: int) -> bool:
        """Move a triangle into the chart on two of its sides; return False where it does not fit there."""
        corners: dict[int, int] = {}
        for k, twin in enumerate(self.twin[3 * face : 3 * face + 3]):
            if twin >= 0 and self.chart_of[twin // 3] == chart:
                for corner, there in ((k, (twin + 1) % 3), ((k + 1) % 3, twin % 3)):
                    if corners.setdefault(corner, found := int(self.faces[twin // 3, there])) != found:
                        return False
        if len(corners) < 3:
            return False
        moved = np.array([corners[k] for k in range(3)])
        area, flat = _areas(self.points[moved][None])[0], _signed_areas(self.uv[moved][None])[0]
        if not area / STRETCH <= flat <= area * STRETCH:
            return False
        self.faces[face], self.chart_of[face] = moved, chart
        return True

    def neighbours(self, chart: int) -> list[int]:
        """Return the charts beside one, that of the longest border first; none for one that was joined."""
        edges = self.borders(chart)
        begins, ends = (self.points[self.faces[edges[:, 0] // 3, (edges[:, 0] + k) % 3]] for k in (0, 1))
        lengths = np.bincount(self.chart_of[edges[:, 1] // 3], np.linalg.norm(ends - begins, axis=1))
        return [int(other) for other in np.argsort(-lengths) if lengths[other] > 0]

    def join(self, large: int, small: list[int]) -> bool:
        """Join charts to a large one and flatten them together; return False, all as it was, where that is no gain."""
        into: dict[int, int] = {}
        edges = self.borders(large)
        for here, there in edges[np.isin(self.chart_of[edges[:, 1] // 3], small)]:
            for k, j in ((0, 1), (1, 0)):  # the neighbour runs the edge the other way
                mine = self.faces[here // 3, (here + k) % 3]
                into.setdefault(int(self.faces[there // 3, (there + j) % 3]), int(mine))
        chosen = np.flatnonzero(np.isin(self.chart_of, [large, *small]))
        step = np.arange(len(self.uv))
        step[list(into)] = list(into.values())
        used, local = np.unique(step[self.faces[chosen]], return_inverse=True)
        flat = flattened(self.points[used], local.reshape(-1, 3))
        if flat is None:
            return False
        boxes = sum(_box(self.uv[np.unique(self.faces[self.chart_of == chart])]) for chart in [large, *small])
        if _box(flat) > GROWTH * boxes:
            return False
        self.faces[chosen], self.uv[used], self.chart_of[chosen] = used[local.reshape(-1, 3)], flat, large
        return True


def flattened(points: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return one chart's points [V, 3] in the plane [V, 2], its area kept; None if it overlaps or stretches itself."""
    corners = points[faces]
    area = _areas(corners)
    along = corners[:, 1] - corners[:, 0]
    length = np.maximum(np.linalg.norm(along, axis=1), THIN)
    to_third = corners[:, 2] - corners[:, 0]
    run = (to_third * along).sum(axis=1) / length
    third = run + 1j * (2 * area / length)
    weights = np.stack([third - length, -third, length.astype(complex)], axis=1)  # the edges opposite each corner
    weights /= np.sqrt(2 * np.maximum(area, THIN))[:, None]
    rows = np.repeat(np.arange(len(faces)), 3)
    system = coo_array((weights.reshape(-1), (rows, faces.reshape(-1))), shape=(len(faces), len(points))).tocsc()
    first = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmax())
    last = int(np.linalg.norm(points - points[first], axis=1).argmax())
    pins, free = [first, last], np.setdiff1d(np.arange(len(points)), [first, last])
    known = np.array([0.0, np.linalg.norm(points[last] - points[first])], complex)
    matrix = system[:, free]
    solved = spsolve((matrix.conj().T @ matrix).tocsc(), -(matrix.conj().T @ (system[:, pins] @ known)))
    flat = np.zeros(len(points), complex)
    flat[free], flat[pins] = solved, known
    uv = np.stack([flat.real, flat.imag], axis=1)
    if not np.isfinite(uv).all():
        return None
    signed = _signed_areas(uv[faces])
    if not signed.sum() > 0:
        return None
    uv *= np.sqrt(area.sum() / signed.sum())
    return uv if _lies_well(uv, faces, area) else None


def _lies_well(uv: NDArray[np.float64], faces: NDArray[np.int64], area: NDArray[np.float64]) -> bool:
    """Return True if a chart neither turns over, nor stretches, nor overlaps itself; area [F] on the surface."""
    signed = _signed_areas(uv[faces])
    if -signed.clip(max=0).sum() > MIRRORED * area.sum():
        return False
    order = np.argsort(signed / np.maximum(area, THIN))
    reached = np.cumsum(signed[order]) / signed.sum()
    low, high = (order[np.searchsorted(reached, part).clip(max=len(order) - 1)] for part in (0.01, 0.99))
    if signed[high] * area[low] > STRETCH * signed[low] * area[high]:
        return False
    return not _crosses_itself(uv, faces)


def _crosses_itself(uv: NDArray[np.float64], faces: NDArray[np.int64]) -> bool:
    """Return True if two edges of a chart's border cross: with no triangle turned over, it overlaps just then."""
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    _, index, counts = np.unique(np.sort(edges, axis=1), axis=0, return_index=True, return_counts=True)
    border = edges[index[counts == 1]]
    a, b = uv[border[:, 0]], uv[border[:, 1]]

    def side(p: NDArray[np.float64], q: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sign [N, M] of the side of lines p q [N, 2] on which points r [M, 2] lie."""
        (x, y), (z, w) = (q - p).T[:, :, None], (r[None] - p[:, None]).transpose(2, 0, 1)
        return np.sign(x * w - y * z)

    from_a, from_b = side(a, b, a), side(a, b, b)
    cross = (from_a * from_b < 0) & (from_a * from_b < 0).T
    return bool(cross.any())


def _box(points: NDArray[np.float64]) -> float:
    """Return the area of the smallest box around points [V, 2]."""
    return float(np.ptp(upright(points), axis=0).prod())


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas [F] of triangles [F, 3, 3]."""
    return np.asarray(
        np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    )


def _signed_areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas [F] of triangles [F, 3, 2], negative where they run clockwise."""
    (a, b), (c, d) = ((corners[:, k] - corners[:, 0]).T for k in (1, 2))
    return np.asarray((a * d - b * c) / 2)
