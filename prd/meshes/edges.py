"""Edges of a triangle mesh: which faces lie beside each other, whether the surface is closed, and its Euler number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MOST_KEYS = 2**62


@dataclass(frozen=True)
class Topology:
    """is_closed: every edge belongs to exactly two faces, of opposite direction; euler: V - E + F of what faces use."""

    is_closed: bool
    euler: int


def topology_of(faces: NDArray[np.int64]) -> Topology:
    """Return whether a surface of faces [F, 3] is closed, and its Euler number: 2 for a sphere, 0 for a torus."""
    begin, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    low, high = np.minimum(begin, end), np.maximum(begin, end)
    count = int(faces.max(initial=-1)) + 1
    keys = np.sort((low * count + high) * 2 + (begin > end))  # of one edge: first as it runs upwards, then downwards
    used = np.zeros(count, bool)
    used[begin] = True
    edges = np.count_nonzero(np.diff(keys >> 1, prepend=-1))
    is_closed = (
        len(keys) > 0 and len(keys) % 2 == 0 and edges == len(keys) // 2 and bool((keys[::2] + 1 == keys[1::2]).all())
    )
    return Topology(is_closed, int(used.sum()) - int(edges) + len(faces))


def edge_keys(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number [3 F] of each edge 01, 12, 20 of faces [F, 3] in turn, the same one for both of its faces."""
    begin, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    return np.asarray(np.minimum(begin, end) * (int(faces.max(initial=-1)) + 1) + np.maximum(begin, end))


def _twins(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places [E, 2], into the edges 01, 12, 20 of faces [F, 3] in turn, of edges that two faces have."""
    keys = edge_keys(faces)
    order = np.argsort(keys, kind="stable")
    step = np.diff(keys[order], prepend=-1, append=-1) != 0  # between one edge and the next
    first = np.flatnonzero(step[:-2] & ~step[1:-1] & step[2:]) if len(order) > 1 else np.zeros(0, np.int64)
    return np.stack([order[first], order[first + 1]], axis=1)


def edges_between(faces: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of faces [E, 2] that alone share an edge, and the two vertices [E, 2] of each edge."""
    twins = _twins(faces)
    edges = np.stack([faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)], axis=1)
    return twins // 3, edges[twins[:, 0]]


def neighbours_of(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the face [F, 3] on the other side of the edges 01, 12 and 20 of each face, -1 where there is none."""
    a, b = _twins(faces).T
    out = np.full(faces.size, -1)
    out[a], out[b] = b // 3, a // 3
    return out.reshape(-1, 3)


def border_of(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the edges [E, 2] that only one of faces [F, 3] has, as it runs them."""
    _, index, counts = np.unique(edge_keys(faces), return_index=True, return_counts=True)
    edges = np.stack([faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)], axis=1)
    return edges[index[counts == 1]]


def pieces(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the number [count] of the piece of each of `count` things of which pairs [E, 2] hang together."""
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    return np.asarray(connected_components(graph.tocsr(), directed=False)[1], np.int64)


def row_keys(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number [N] of each row of integers [N, C], equal and ordered as the rows are."""
    if not len(rows):
        return np.zeros(0, np.int64)
    low = rows.min(axis=0)
    spans = [int(span) + 1 for span in rows.max(axis=0) - low]
    if np.prod([float(span) for span in spans]) > MOST_KEYS:
        return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    key = np.zeros(len(rows), np.int64)
    for column, span in zip((rows - low).T, spans, strict=True):
        key = key * span + column
    return key
