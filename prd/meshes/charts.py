"""Charts of an unwrapped surface: small ones are joined to their neighbours and flattened anew.

A chart is flattened by least squares conformal maps (Levy et al. 2002): of each triangle with corners u [3] in the
texture, as complex numbers, sum_k W_k u_k is as near to 0 as it gets, W_k being the opposite edge on the surface.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.linalg import splu
from scipy.spatial import ConvexHull, QhullError

from prd.meshes.edges import border_of, edges_between, pieces
from prd.meshes.segments import halved, nodes_of, segmented, smoothed, whole

ALONGS = (0.1, 0.03)  # of `segmented`, the second where charts of the first do not fill their boxes well
BOXED = 0.7  # of the boxes around the charts, that these fill well
MANY = 32  # charts, above which a surface is rough, and no other way makes few of them
SMALL = 0.03  # of the area: charts below are joined to a neighbour where the two can be flattened together
ANGLES = 32  # of a quarter turn, among which the smallest box is found
GROWTH = 1.15  # at most, of the boxes around charts that are joined
CONVEX = 0.8  # of the area of the convex outline, at least, of charts that are not small
MIRRORED = 1e-6  # of the area, at most, that needles may lie turned over
STRETCH = 2.5  # at most, between the areas that 1 % of the texture and 99 % of it give to an equal area of the surface
PAIRS = 1 << 20  # of edges of a border, that are compared at a time
DENSE = 64  # vertices, up to which a chart is flattened faster without sparse matrices
THIN = 1e-12  # scene units, and square ones: no edge and no triangle counts for less


def charts_of(faces: NDArray[np.int64], count: int) -> tuple[int, NDArray[np.int64]]:
    """Return the number of charts and, for each of `count` vertices of an unwrapped surface, its chart [V]."""
    label = pieces(faces[:, [0, 1, 1, 2]].reshape(-1, 2), count)
    return int(label.max()) + 1, label


def cut_into_charts(
    vertices: NDArray[Any], faces: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Cut a surface into charts that neither overlap nor stretch themselves, nor turn over.

    vertices [V, 3], faces [F, 3]. Returns source [V'] (the vertex that each new vertex copies: those on a cut appear
    once per chart), faces [F, 3] into the new vertices (same triangles, same order) and uv [V', 2] at the scale of the
    surface, each chart somewhere.
    """
    charts = _well_boxed(vertices.astype(np.float64), faces)
    label = np.zeros(len(faces), np.int64)
    for number, chart in enumerate(charts.found):
        label[chart.faces] = number
    key, charted = np.unique(label[:, None] * len(vertices) + faces, return_inverse=True)
    source, charted = key % len(vertices), charted.reshape(-1, 3)
    uv = np.zeros((len(source), 2), np.float32)
    for chart in charts.found:  # each one's vertices are sorted, as the keys are
        uv[np.unique(charted[chart.faces])] = chart.uv
    return source, charted, uv


def _well_boxed(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> _Charts:
    """Return charts that fill the boxes around them well.

    Several ways to cut are tried in turn until one does; if none does, the one whose charts fill theirs best is taken.
    """
    best = None
    for along in ALONGS:
        charts = _Charts(vertices, faces, along)
        if best is None or charts.boxed > best.boxed:
            best = charts
        if best.boxed >= BOXED or len(best.found) > MANY:
            break
    assert best is not None
    return best


@dataclass(frozen=True)
class _Chart:
    """Faces [f] of a surface and their vertices' places in the plane, uv [v, 2], the vertices in ascending order."""

    faces: NDArray[np.int64]
    uv: NDArray[np.float64]
    area: float

    @cached_property
    def box(self) -> float:
        """Area of the smallest box around the chart."""
        return float(np.ptp(upright(self.uv), axis=0).prod())


class _Charts:
    """The charts of a surface: its nearly flat segments, parted where they cannot lie flat, the small ones joined."""

    def __init__(self, vertices: NDArray[np.float64], faces: NDArray[np.int64], along: float) -> None:
        self.vertices, self.triangles, self.along = vertices, faces, along
        self.areas = _areas(vertices[faces])
        self.least = SMALL * float(self.areas.sum())
        self.found: list[_Chart] = []
        label = segmented(vertices, faces, along)
        order = np.argsort(label, kind="stable")
        waiting = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        while waiting:
            part = waiting.pop()
            chart = self.flat(part)
            if chart is not None and (len(part) == 1 or chart.area < self.least or _is_convex(chart)):
                self.found.append(chart)
            else:
                waiting += self.parted(part)
        self.join_small()

    @property
    def boxed(self) -> float:
        """Part of the smallest boxes around the charts that these fill."""
        return float(self.areas.sum()) / max(sum(chart.box for chart in self.found), THIN)

    def flat(self, part: NDArray[np.int64]) -> _Chart | None:
        """Return the chart of faces [f]; None where they do not lie flat."""
        used, local = np.unique(self.triangles[part], return_inverse=True)
        points = self.vertices[used]
        uv = flattened(points, local.reshape(-1, 3))
        if uv is None and len(part) == 1:  # a needle without area: as it is, on a line
            uv = np.stack([np.linalg.norm(points - points[0], axis=1), np.zeros(3)], axis=1)
        return None if uv is None else _Chart(part, uv, float(self.areas[part].sum()))

    def parted(self, part: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return at least two faces [f] in two or more parts."""
        used, local = np.unique(self.triangles[part], return_inverse=True)
        points, faces = self.vertices[used], local.reshape(-1, 3)
        nodes = nodes_of(points, faces, self.along)
        label = whole(nodes, smoothed(points, faces, halved(nodes)))
        if label.max() == 0:
            label = (np.arange(len(part)) >= len(part) // 2).astype(np.int64)
        return [part[label == k] for k in range(int(label.max()) + 1)]

    def join_small(self) -> None:
        """Join charts below `SMALL`, the smallest first, to the neighbours with which they have the longest border."""
        kept: dict[int, _Chart] = dict(enumerate(self.found))
        borders = self.borders()
        for number in sorted(kept, key=lambda n: kept[n].area):
            if kept[number].area >= self.least:
                continue
            for other in sorted(borders[number], key=lambda n: (-borders[number][n], n)):
                both = self.flat(np.concatenate([kept[other].faces, kept[number].faces]))
                if both is not None and both.box <= GROWTH * (kept[other].box + kept[number].box):
                    kept[other] = both
                    del kept[number]
                    for beyond, length in borders.pop(number).items():
                        del borders[beyond][number]
                        if beyond != other:
                            borders[other][beyond] = borders[beyond][other] = borders[other].get(beyond, 0.0) + length
                    break
        self.found = list(kept.values())

    def borders(self) -> dict[int, dict[int, float]]:
        """Return how long a border each chart has with each one beside it."""
        chart_of = np.zeros(len(self.triangles), np.int64)
        for number, chart in enumerate(self.found):
            chart_of[chart.faces] = number
        pairs, edges = edges_between(self.triangles)
        sides, count = chart_of[pairs], len(self.found)
        apart = sides[:, 0] != sides[:, 1]
        sides, edges = np.sort(sides[apart], axis=1), edges[apart]
        keys, place = np.unique(sides @ np.array([count, 1]), return_inverse=True)
        lengths = np.bincount(place, np.linalg.norm(np.subtract(*self.vertices[edges.T]), axis=1), len(keys))
        found: dict[int, dict[int, float]] = {number: {} for number in range(count)}
        for key, length in zip(keys.tolist(), lengths.tolist(), strict=True):
            a, b = divmod(key, count)
            found[a][b] = found[b][a] = length
        return found


def _is_convex(chart: _Chart) -> bool:
    """Return True if a chart fills the convex outline around it well, as one without holes and bays does."""
    try:
        return bool(chart.area >= CONVEX * ConvexHull(chart.uv).volume)
    except QhullError:  # on a line
        return True


def upright(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points [V, 2] turned so that the box around them is the smallest."""
    angles = np.arange(ANGLES) * (math.pi / 2 / ANGLES)
    cos, sin = np.cos(angles), np.sin(angles)
    rotations = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)  # [A, 2, 2]
    turned = points @ rotations  # [A, V, 2]
    return np.asarray(turned[int(np.ptp(turned, axis=1).prod(axis=1).argmin())])


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
    first = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmax())
    last = int(np.linalg.norm(points - points[first], axis=1).argmax())
    pins, free = [first, last], np.setdiff1d(np.arange(len(points)), [first, last])
    known = np.array([0.0, np.linalg.norm(points[last] - points[first])], complex)
    solved = _least_squares(weights, faces, free, pins, known)
    if solved is None:
        return None
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


def _least_squares(
    weights: NDArray[np.complex128], faces: NDArray[np.int64], free: NDArray[np.int64], pins: list[int], known: Any
) -> NDArray[np.complex128] | None:
    """Return the places of free vertices that make sum_k weights [F, 3] of all faces least; None if many do."""
    shape, entries = (len(faces), len(free) + len(pins)), weights.reshape(-1)
    rows = np.repeat(np.arange(len(faces)), 3)
    if shape[1] <= DENSE:
        dense = np.zeros(shape, complex)
        np.add.at(dense, (rows, faces.reshape(-1)), entries)
        matrix = dense[:, free]
        try:
            return np.linalg.solve(matrix.conj().T @ matrix, -(matrix.conj().T @ (dense[:, pins] @ known)))
        except np.linalg.LinAlgError:
            return None
    column, value = np.full(shape[1], -1), np.zeros(shape[1], complex)
    column[free], value[pins] = np.arange(len(free)), known
    columns = column[faces.reshape(-1)]
    is_free = columns >= 0
    places = (rows[is_free], columns[is_free])
    sparse = coo_array((entries[is_free], places), shape=(len(faces), len(free))).tocsr()
    adjoint = sparse.conj().T
    right = -(adjoint @ (weights * value[faces]).sum(axis=1))
    try:
        return splu((adjoint @ sparse).tocsc(), permc_spec="MMD_AT_PLUS_A").solve(right)
    except RuntimeError:  # exactly singular, as where parts hang together by a vertex
        return None


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
    border = border_of(faces)
    a, b = uv[border[:, 0]], uv[border[:, 1]]

    def side(p: NDArray[np.float64], q: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sign [N, M] of the side of lines p q [N, 2] on which points r [M, 2] lie."""
        (x, y), (z, w) = (q - p).T[:, :, None], (r[None] - p[:, None]).transpose(2, 0, 1)
        return np.sign(x * w - y * z)

    rows = max(1, PAIRS // max(1, len(border)))
    for p, q in ((a[k : k + rows], b[k : k + rows]) for k in range(0, len(border), rows)):
        apart = side(p, q, a) * side(p, q, b) < 0
        if (apart & (side(a, b, p) * side(a, b, q) < 0).T).any():
            return True
    return False


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas [F] of triangles [F, 3, 3]."""
    return np.asarray(
        np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    )


def _signed_areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas [F] of triangles [F, 3, 2], negative where they run clockwise."""
    (a, b), (c, d) = ((corners[:, k] - corners[:, 0]).T for k in (1, 2))
    return np.asarray((a * d - b * c) / 2)
