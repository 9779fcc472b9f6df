"""The 256 cases of marching cubes, derived instead of copied.

Corner (x, y, z) of a cell has index 4 x + 2 y + z; bit k of a case is set where corner k is inside. On each face of the
cell, every run of inside corners is cut off by one segment between the two edges where the run ends. On an ambiguous
face (inside corners on one diagonal) this separates the two, a rule that reads nothing but the face's own signs: both
cells that share the face draw the same segments, so no case can leave a hole. The segments of a cell join into closed
loops, and each loop is triangulated without a diagonal that lies in a face of the cell where that is possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

Corner = tuple[int, int, int]
Triangle = tuple[int, int, int]

CORNERS: list[Corner] = [(x, y, z) for x, y, z in product((0, 1), repeat=3)]
# An edge is (axis, base corner): it leads from the base corner one step along the axis.
EDGES: list[tuple[int, Corner]] = [(axis, c) for axis in range(3) for c in CORNERS if c[axis] == 0]
_EDGE_OF_PAIR = {
    frozenset((CORNERS.index(c), CORNERS.index(c) + (4, 2, 1)[axis])): i for i, (axis, c) in enumerate(EDGES)
}


def _faces() -> list[list[int]]:
    """The four corners of each face of the cube, counter-clockwise seen from outside."""
    faces = []
    for axis, side in product(range(3), (0, 1)):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        ring = []
        for a, b in ((0, 0), (1, 0), (1, 1), (0, 1)):
            corner = [0, 0, 0]
            corner[axis], corner[u], corner[v] = side, a, b
            ring.append(CORNERS.index((corner[0], corner[1], corner[2])))
        faces.append(ring if side else ring[::-1])
    return faces


_FACES = _faces()
_FACES_OF_EDGE = [
    {f for f, ring in enumerate(_FACES) if any(_EDGE_OF_PAIR[frozenset((ring[k], ring[k - 1]))] == e for k in range(4))}
    for e in range(12)
]


def _segments(case: int, ring: list[int]) -> Iterator[tuple[int, int]]:
    """Directed segments (edge, edge) of one face: from where a run of inside corners begins to where it ends."""
    inside = [bool(case >> corner & 1) for corner in ring]
    for k in range(4):
        if inside[k] and not inside[k - 1]:
            end = k
            while inside[(end + 1) % 4]:
                end += 1
            begin = frozenset((ring[k - 1], ring[k]))
            yield _EDGE_OF_PAIR[begin], _EDGE_OF_PAIR[frozenset((ring[end % 4], ring[(end + 1) % 4]))]


def _loops(case: int) -> Iterator[list[int]]:
    """Closed loops of cut edges. A cut edge begins a run on one of its two faces and ends one on the other."""
    following = dict(segment for ring in _FACES for segment in _segments(case, ring))
    while following:
        loop = [min(following)]
        while (edge := following.pop(loop[-1])) != loop[0]:
            loop.append(edge)
        yield loop


def _diagonal_cost(a: int, b: int) -> float:
    """Prefer diagonals inside the cell (one in a face can coincide with the neighbour's), then short ones."""
    middle = [[c + 0.5 * (i == axis) for i, c in enumerate(corner)] for axis, corner in (EDGES[a], EDGES[b])]
    length = sum((p - q) ** 2 for p, q in zip(*middle, strict=True))
    return length + 100.0 * bool(_FACES_OF_EDGE[a] & _FACES_OF_EDGE[b])


def _triangulate(loop: list[int]) -> tuple[float, list[Triangle]]:
    """The cheapest triangulation of a polygon: the one on its last side, and the best of the two remainders."""
    if len(loop) < 3:
        return 0.0, []
    options = []
    for k in range(1, len(loop) - 1):
        left_cost, left = _triangulate(loop[: k + 1])
        right_cost, right = _triangulate(loop[k:])
        sides = [(loop[0], loop[k])] * (k > 1) + [(loop[k], loop[-1])] * (k < len(loop) - 2)
        cost = left_cost + right_cost + sum(_diagonal_cost(a, b) for a, b in sides)
        options.append((cost, [*left, (loop[0], loop[k], loop[-1]), *right]))
    return min(options)


@lru_cache(maxsize=1)
def cube_cases() -> list[list[Triangle]]:
    """For each of the 256 cases its triangles, as triples of indices into EDGES, normals towards the outside."""
    return [[t for loop in _loops(case) for t in _triangulate(loop)[1]] for case in range(256)]
