"""Close small handles: cut a closed surface along short loops that do not separate it, and cap the two sides.

The loops are those of a tree-cotree decomposition (Eppstein 2003) whose trees are the greedy ones of Erickson and
Whittlesey (2005): shortest paths from a root, and of the rest the dual tree of the longest loops. What neither tree
holds gives two loops per handle. A loop around a bar cuts it; one around a tunnel walls it up.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, dijkstra, minimum_spanning_tree

from prd.meshes.edges import edges_between, pieces, topology_of

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]

ROUNDS = 3  # of looking for shorter loops
PASSES = 24  # at most, each of which closes handles that lie apart: more are a foam, which stays one
PART = 0.25  # of the way to its neighbours, by which a vertex of a cut moves to its side


def close_handles(vertices: NDArray[np.float32], faces: NDArray[np.int64], width: float) -> tuple[*Arrays, int]:
    """Close the handles and tunnels of a closed surface that are narrower than `width`, scene units.

    vertices [V, 3], faces [F, 3] of consistent winding, every edge in two faces. The width of a loop is its length over
    pi. Returns vertices and faces, and how many handles were closed. Pieces stay as many as they are.
    """
    closed = 0
    if topology_of(faces).euler == 2 * _pieces(faces):  # spheres
        return vertices, faces, closed
    for _ in range(PASSES):
        loops = _short_loops(vertices, faces, width * math.pi)
        if not loops:
            break
        pieces = _pieces(faces)
        apart = _apart(loops, faces)
        for chosen in (apart, apart[:1]):  # several together may separate the surface
            result = _cut(vertices, faces, chosen)
            if result is not None and _pieces(result[1]) == pieces:
                break
        else:
            return vertices, faces, closed
        vertices, faces = result
        closed += len(chosen)
    return vertices, faces, closed


def _short_loops(vertices: NDArray[np.float32], faces: NDArray[np.int64], longest: float) -> list[list[int]]:
    """Return loops of vertices that do not separate the surface, no longer than `longest`, the shortest first."""
    edges, left, right = _edges(faces)
    lengths = np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1).astype(np.float64) + 1e-12
    graph = coo_array((lengths, edges.T), shape=(len(vertices), len(vertices))).tocsr()
    roots = np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]
    found: list[list[int]] = []
    starts = roots
    for _ in range(ROUNDS):  # a loop through a root is tight there: each round starts at the loops of the one before
        loops = _loops(edges, left, right, lengths, dijkstra(graph, False, starts, True, min_only=True))
        if not loops:
            break
        found += loops
        starts = np.unique(np.concatenate([roots, [loop[0] for loop in loops]]))
    measured = [(_length(vertices[path]), path) for path in found]
    return [path for length, path in sorted(measured) if length <= longest]


def _loops(
    edges: NDArray[np.int64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    lengths: NDArray[np.float64],
    paths: tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]],
) -> list[list[int]]:
    """Return the loops that two trees leave over.

    edges [E, 2], left, right [E] the faces beside them; paths: of each vertex the distance [V] to the nearest root, the
    vertex before it [V] (negative at a root) and the root [V]
    """
    distance, parent, _ = paths
    a, b = edges.T
    rest = np.flatnonzero((parent[a] != b) & (parent[b] != a))
    loop = (distance[a] + distance[b] + lengths)[rest]  # by way of the root
    count = int(max(left.max(), right.max())) + 1
    low, high = np.minimum(left, right)[rest], np.maximum(left, right)[rest]
    places = (low.astype(np.int32), high.astype(np.int32))  # scipy 1.17.0 takes no others here
    tree = minimum_spanning_tree(coo_array((-loop, places), shape=(count, count)).tocsr()).tocoo()  # the longest
    in_tree = np.minimum(tree.row, tree.col).astype(np.int64) * count + np.maximum(tree.row, tree.col)
    in_tree.sort()
    keys = low * count + high
    left_over = rest[in_tree[np.searchsorted(in_tree, keys).clip(max=len(in_tree) - 1)] != keys]
    return [path for e in left_over if (path := _loop(int(a[e]), int(b[e]), parent))]


def _edges(faces: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the edges [E, 2] of a closed surface and the two faces [E] of each."""
    directed = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    order = np.lexsort(np.sort(directed, axis=1).T)
    pairs = order.reshape(-1, 2)
    return np.sort(directed[pairs[:, 0]], axis=1), pairs[:, 0] // 3, pairs[:, 1] // 3


def _loop(a: int, b: int, parent: NDArray[np.int32]) -> list[int]:
    """Return the vertices of the loop that the edge from a to b closes in a tree of paths; [] between two trees."""

    def to_root(vertex: int) -> list[int]:
        path = [vertex]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        return path

    from_a, from_b = to_root(a), to_root(b)
    if from_a[-1] != from_b[-1]:
        return []
    while len(from_a) > 1 and len(from_b) > 1 and from_a[-2] == from_b[-2]:
        from_a.pop(), from_b.pop()
    return from_a + from_b[-2::-1]


def _length(points: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum())


def _pieces(faces: NDArray[np.int64]) -> int:
    """Return the number of connected pieces of a closed surface."""
    return int(pieces(edges_between(faces)[0], len(faces)).max()) + 1


def _apart(loops: list[list[int]], faces: NDArray[np.int64]) -> list[list[int]]:
    """Return loops whose faces have no vertex in common, as many as come first."""
    taken, chosen = np.zeros(int(faces.max()) + 1, bool), []
    for loop in loops:
        near = np.unique(faces[np.isin(faces, loop).any(axis=1)])
        if not taken[near].any():
            taken[near] = True
            chosen.append(loop)
    return chosen


def _cut(vertices: NDArray[np.float32], faces: NDArray[np.int64], loops: list[list[int]]) -> Arrays | None:
    """Return the surface cut along loops and capped; None where it is pinched at a loop's vertex."""
    points, cut = vertices.astype(np.float64), faces.copy()
    for loop in loops:
        near = np.flatnonzero(np.isin(faces, loop).any(axis=1))
        around: dict[int, dict[int, int]] = defaultdict(dict)  # by vertex and the one after it: the face
        for face in near:
            for k in range(3):
                around[int(faces[face, k])][int(faces[face, (k + 1) % 3])] = int(face)
        twins = {vertex: len(points) + k for k, vertex in enumerate(loop)}
        moved = {}
        for k, vertex in enumerate(loop):
            sides = _sides(vertex, loop[(k + 1) % len(loop)], loop[k - 1], around[vertex], faces)
            if sides is None:
                return None
            for target, side in zip((vertex, twins[vertex]), sides, strict=True):
                ring = np.setdiff1d(faces[side], loop)
                middle = points[ring].mean(axis=0) if len(ring) else points[vertex]
                moved[target] = points[vertex] + PART * (middle - points[vertex])
            turned = cut[sides[1]]
            cut[sides[1]] = np.where(turned == vertex, twins[vertex], turned)
        points = np.concatenate([points, np.zeros((len(loop), 3))])
        points[list(moved)] = list(moved.values())
        for edge, back in ((loop, True), ([twins[vertex] for vertex in loop], False)):
            middle = points[edge].mean(axis=0)
            ahead = np.roll(edge, -1)
            cap = np.stack([ahead if back else edge, edge if back else ahead, np.full(len(edge), len(points))], axis=1)
            points, cut = np.concatenate([points, middle[None]]), np.concatenate([cut, cap])
    return points.astype(np.float32), cut


def _sides(
    vertex: int, ahead: int, behind: int, around: dict[int, int], faces: NDArray[np.int64]
) -> tuple[list[int], list[int]] | None:
    """Return the faces at a vertex to the left and to the right of a path through it; None where it is pinched."""

    def sector(start: int, end: int) -> list[int]:
        side: list[int] = []
        while start != end and len(side) < len(around):
            side.append(around[start])
            start = int(sum(faces[side[-1]])) - vertex - start  # the third vertex
        return side

    left, right = sector(ahead, behind), sector(behind, ahead)
    return (left, right) if len(left) + len(right) == len(around) else None
