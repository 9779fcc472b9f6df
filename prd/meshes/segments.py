"""Segments of a surface that are nearly flat: charts grown from seeds that are moved to their middles (Lloyd).

As in Sander et al. 2003 (Multi-Chart Geometry Images, section 3.1), a step from a face to the one beside it costs its
length times `ALONG` + 1 - cos of the angle between the face and the chart. Seeds are added where charts bend too much.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from prd.meshes.edges import edges_between, neighbours_of, pieces

PATCHES = 1000  # of faces, about, on which seeds are looked for
ALONG = 0.1  # cost of a step that does not turn: charts are round where it is high, follow folds where it is low
SWEEPS = 3  # of moving seeds to the middles of their charts
TURNED = 0.4  # cosine of the angle from its chart, from which on a face bends too much
BENT = 0.1  # of a chart's area, which may
MOST = 96  # charts of a piece, beside its first
PASSES = 12  # of smoothing borders
TEETH = 0.01  # of the mean length of an edge: less is not worth a change
CRUMB = 0.1  # of its chart's area: parts below that hang apart go to the charts around them
TINY = 1e-12


class Nodes:
    """Faces, or patches of them, as the nodes of a graph.

    centre [N, 3], normal [N, 3] unit, area [N]; neighbours in compressed rows: row, column [E] and the length of a step

    along  cost of a step that does not turn
    """

    def __init__(
        self,
        centre: NDArray[np.float64],
        normal: NDArray[np.float64],
        area: NDArray[np.float64],
        pairs: NDArray[np.int64],
        along: float = ALONG,
    ) -> None:
        self.centre, self.normal, self.area, self.along = centre, normal, area, along
        self.count = len(area)
        key = np.sort(np.concatenate([pairs, pairs[:, ::-1]]) @ np.array([self.count, 1]))
        key = key[np.diff(key, prepend=-1) != 0]
        self.row, self.column = key // self.count, key % self.count
        self.first = np.searchsorted(self.row, np.arange(self.count + 1)).astype(np.int32)
        self.length = np.linalg.norm(centre[self.row] - centre[self.column], axis=1) + TINY

    def graph(self, cost: NDArray[np.float64]) -> csr_array:
        """Return the graph whose steps cost [E] these."""
        return csr_array((cost, self.column.astype(np.int32), self.first), shape=(self.count, self.count))

    def costs(self, seeds: NDArray[np.int64], normals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the costs [K, N] of the cheapest ways from seeds [K] to all nodes, for charts with normals [K, 3]."""
        facing = self.along + 1 - normals @ self.normal.T  # [K, N]
        ways = [
            dijkstra(self.graph(self.length * turn[self.column]), indices=s)
            for s, turn in zip(seeds, facing, strict=True)
        ]
        return np.stack(ways)

    def means(self, label: NDArray[np.int64], count: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums [count, 3] over the area of values [N, 3] of each label [N]."""
        return np.stack([np.bincount(label, self.area * axis, count) for axis in values.T], axis=1)

    def middles(self, label: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the node [count] in the middle of each label [N], and the mean normals [count, 3]."""
        area = np.maximum(np.bincount(label, self.area, count), TINY)
        normals = _unit(self.means(label, count, self.normal))
        away = self.centre - (self.means(label, count, self.centre) / area[:, None])[label]
        far = np.linalg.norm(away, axis=1) * (self.along + 1 - (self.normal * normals[label]).sum(axis=1))
        order = np.lexsort((far, label))
        return order[np.searchsorted(label[order], np.arange(count))], normals


def nodes_of(vertices: NDArray[np.float64], faces: NDArray[np.int64], along: float = ALONG) -> Nodes:
    """Return the faces [F, 3] of vertices [V, 3] as nodes; along: cost of a step that does not turn."""
    corners = vertices[faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(across, axis=1) / 2
    return Nodes(corners.mean(axis=1), _unit(across), np.maximum(area, TINY), edges_between(faces)[0], along)


def segmented(vertices: NDArray[np.float64], faces: NDArray[np.int64], along: float = ALONG) -> NDArray[np.int64]:
    """Return the chart [F] of each face: connected, nearly flat, few; each piece of the surface has its own.

    vertices [V, 3], faces [F, 3]; along: cost of a step that does not turn.
    """
    piece = pieces(edges_between(faces)[0], len(faces))
    order = np.argsort(piece, kind="stable")
    corners = vertices[faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    label, count = np.zeros(len(faces), np.int64), 0
    for part in np.split(order, np.flatnonzero(np.diff(piece[order])) + 1):
        if _is_flat(across[part]):
            label[part] = count
        else:
            used, local = np.unique(faces[part], return_inverse=True)
            label[part] = count + _segmented(vertices[used], local.reshape(-1, 3), along)
        count = int(label[part].max()) + 1
    return label


def _is_flat(across: NDArray[np.float64]) -> bool:
    """Return True if a chart of faces with these normals [F, 3], twice their area long, bends little."""
    area = np.linalg.norm(across, axis=1)
    bent = across @ _unit(across.sum(axis=0, keepdims=True))[0] < TURNED * area
    return bool(area[bent].sum() <= BENT * area.sum())


def _segmented(vertices: NDArray[np.float64], faces: NDArray[np.int64], along: float) -> NDArray[np.int64]:
    """Return the chart [F] of each face of a surface in one piece."""
    nodes = nodes_of(vertices, faces, along)
    patch, patches = _patches(nodes)
    seeds, normals = _grown(patches, np.zeros(1, np.int64))
    where = np.unique(patch, return_index=True)[1]  # a face of each patch
    label = whole(nodes, nodes.costs(where[seeds], normals).argmin(axis=0))
    return whole(nodes, smoothed(vertices, faces, label))


def halved(nodes: Nodes) -> NDArray[np.int64]:
    """Return 0 or 1 for each of at least two faces of one chart: two parts of it, away from each other."""
    steps = nodes.graph(nodes.length)
    first = int(dijkstra(steps, indices=0).argmax())
    seeds = np.array([first, int(dijkstra(steps, indices=first).argmax())])
    normals = nodes.normal[seeds]
    for _ in range(SWEEPS):
        label = nodes.costs(seeds, normals).argmin(axis=0)
        label[seeds] = 0, 1
        middles, normals = nodes.middles(label, 2)
        seeds = middles
    return label


def _patches(nodes: Nodes) -> tuple[NDArray[np.int64], Nodes]:
    """Return the patch [F] of each face, and patches as nodes: the faces that are nearest to faces drawn at random."""
    if nodes.count <= 2 * PATCHES:
        return np.arange(nodes.count), nodes
    drawn = np.random.default_rng(0).choice(nodes.count, PATCHES, replace=False, p=nodes.area / nodes.area.sum())
    seeds = np.sort(drawn)
    turn = nodes.along + 1 - (nodes.normal[nodes.row] * nodes.normal[nodes.column]).sum(axis=1)
    near = dijkstra(nodes.graph(nodes.length * turn), indices=seeds, min_only=True, return_predecessors=True)[2]
    patch, count = np.searchsorted(seeds, near), len(seeds)
    area = np.bincount(patch, nodes.area, count).astype(np.float64)
    pairs = np.stack([patch[nodes.row], patch[nodes.column]], axis=1)
    centre, normal = (nodes.means(patch, count, values) for values in (nodes.centre, nodes.normal))
    return patch, Nodes(centre / area[:, None], _unit(normal), area, pairs[pairs[:, 0] != pairs[:, 1]], nodes.along)


def _grown(nodes: Nodes, seeds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return seeds [K] and normals [K, 3] of charts that bend little, from the first seeds [K] on."""
    normals, most = nodes.normal[seeds], len(seeds) + MOST
    for _ in range(MOST + 1):  # faces without a normal always bend: then the number of seeds may stay
        for _ in range(SWEEPS):
            costs = nodes.costs(seeds, normals)
            label = costs.argmin(axis=0)
            reached, label = np.unique(label, return_inverse=True)  # a seed in a chart of another's is none
            costs = costs[reached]
            seeds, normals = nodes.middles(label, len(reached))
        bent = (nodes.normal * normals[label]).sum(axis=1) < TURNED
        part, area = (np.bincount(label, nodes.area * which, len(seeds)) for which in (bent, True))
        if not (part > BENT * area).any() or len(seeds) >= most:
            return seeds, normals
        cost = np.where(bent & (part > BENT * area)[label], costs[label, np.arange(nodes.count)], -1.0)
        order = np.lexsort((-cost, label))
        worst = order[np.searchsorted(label[order], np.arange(len(seeds)))]  # of each chart
        worst = worst[np.argsort(-cost[worst], kind="stable")][: max(1, len(seeds) // 4)]
        worst = worst[cost[worst] >= 0]
        seeds, normals = np.concatenate([seeds, worst]), np.concatenate([normals, nodes.normal[worst]])
    return seeds, normals


def whole(nodes: Nodes, label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return labels [F], numbered from 0, each in one piece: crumbs of charts go to those around them."""
    label = label.copy()
    for _ in range(PASSES):
        inside = label[nodes.row] == label[nodes.column]
        part = pieces(np.stack([nodes.row[inside], nodes.column[inside]], axis=1), nodes.count)
        area, of = np.bincount(part, nodes.area), np.bincount(label, nodes.area)[label]
        crumb = area[part] < CRUMB * of
        step = crumb[nodes.row] & ~crumb[nodes.column]
        if not step.any():
            break
        label[nodes.row[step]] = label[nodes.column[step]]
    return part


def smoothed(vertices: NDArray[np.float64], faces: NDArray[np.int64], label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the charts [F] of faces after their borders have lost their teeth.

    Where it shortens a border to lead it past the other side of the faces that a chart has around a vertex, these go to
    the chart on the other side.
    """
    label, draw, beside = label.copy(), np.random.default_rng(0), neighbours_of(faces)
    lengths = np.linalg.norm(vertices[np.roll(faces, -1, axis=1)] - vertices[faces], axis=2)  # [F, 3] of 01, 12, 20
    corner, face = faces.reshape(-1), np.repeat(np.arange(len(faces)), 3)
    for _ in range(PASSES):
        low, high, between = (np.full(len(vertices), value) for value in (len(faces), -1, 1))
        np.minimum.at(low, corner, label[face])
        np.maximum.at(high, corner, label[face])
        np.minimum.at(between, corner, (label[face] == low[corner]) | (label[face] == high[corner]))
        other = low[faces] + high[faces] - label[:, None]  # [F, 3]: the other chart at each corner
        near = np.where(beside >= 0, label[beside], -1)
        is_border = near == other
        leaves = np.where(is_border, lengths, 0.0)  # of edges 01, 12, 20 as the first corner of each sees them
        back = np.where(np.roll(near, 1, axis=1) == other, np.roll(lengths, 1, axis=1), 0.0)
        far, far_length = np.roll(near, -1, axis=1), np.roll(lengths, -1, axis=1)
        comes = np.where(far == label[:, None], far_length, 0.0) - np.where(far == other, far_length, 0.0)
        fan = 2 * corner + (label[face] == high[corner])
        gain = np.bincount(fan, (leaves + back - comes).reshape(-1), 2 * len(vertices))
        gain[~np.repeat((between == 1) & (low < high), 2)] = 0
        score = np.maximum(gain[::2], gain[1::2]) * draw.uniform(1, 1 + 1e-6, len(vertices))  # none equals another
        rival = np.zeros(len(vertices))
        for other_corner in (np.roll(faces, 1, axis=1), np.roll(faces, -1, axis=1)):
            np.maximum.at(rival, corner, score[other_corner.reshape(-1)])
        chosen = (score > rival) & (score > TEETH * lengths.mean())
        moved = chosen[corner] & (gain[fan] >= gain[fan ^ 1])
        if not moved.any():
            break
        label[face[moved]] = other.reshape(-1)[moved]
    return label


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY))
