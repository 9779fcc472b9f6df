"""Marching tetrahedra with deformation (the surface of DMTet, Shen et al. 2021, which AToM trains with).

The tetrahedral grid is generated, not loaded: every cell of the cubic grid is cut into the six tetrahedra that lead
from its corner (0, 0, 0) to (1, 1, 1) along its edges, one for each order of the axes (Kuhn's subdivision). All cells
are cut alike, hence neighbours agree on the diagonals of the faces they share. The nodes are those of the cubic grid,
so that the signed distance, the deformation and everything in `marching` and `isosurface` serve both surfaces.

A tetrahedron has no ambiguous case, so the result is always a closed manifold where the border is outside; it has
about three times the vertices and faces of marching cubes on the same grid.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

from prd.isosurface._cube_cases import CORNERS, Corner, Triangle
from prd.isosurface.marching_cubes import Marching

Pair = tuple[int, int]  # an edge, by its two corners' numbers in CORNERS, ascending


def _tetrahedra() -> list[tuple[int, int, int, int]]:
    """The six tetrahedra of a cell by their corners' numbers, each so that det(b - a, c - a, d - a) > 0."""
    found = []
    for x, y, z in permutations((4, 2, 1)):  # the steps along the axes, as differences of corner numbers
        even = (x, y, z) in ((4, 2, 1), (2, 1, 4), (1, 4, 2))
        a, b, c, d = 0, x, x + y, x + y + z
        found.append((a, b, c, d) if even else (a, c, b, d))
    return found


def _cut(corners: tuple[int, int, int, int], inside: set[int]) -> list[tuple[Pair, Pair, Pair]]:
    """The triangles (of cut edges) between a tetrahedron's inside and outside corners, outward.

    An even exchange of corners keeps the orientation; so the corner that stands alone, or the two that are inside, can
    be brought to the front, and one case of each kind is enough.
    """
    a, b, c, d = corners
    even = [(a, b, c, d), (b, a, d, c), (c, d, a, b), (d, c, b, a)]
    even += [(p, s, q, r) for p, q, r, s in even] + [(p, r, s, q) for p, q, r, s in even]

    def edge(p: int, q: int) -> Pair:
        return min(p, q), max(p, q)

    lone = inside if len(inside) == 1 else set(corners) - inside
    if len(lone) == 1:
        p, q, r, s = next(order for order in even if order[0] in lone)
        triangle = edge(p, q), edge(p, r), edge(p, s)
        return [triangle if len(inside) == 1 else (triangle[0], triangle[2], triangle[1])]
    if len(inside) == 2:
        p, q, r, s = next(order for order in even if {order[0], order[1]} == inside)
        first, second, third, fourth = edge(p, r), edge(p, s), edge(q, s), edge(q, r)
        return [(first, second, third), (first, third, fourth)]
    return []


_PAIRS: list[Pair] = sorted(
    {(min(p, q), max(p, q)) for corners in _tetrahedra() for p in corners for q in corners if p != q}
)


def _edge(pair: Pair) -> tuple[Corner, Corner]:
    """Direction and base corner of an edge: a corner's number never falls along a step, hence the base is first."""
    (x0, y0, z0), (x1, y1, z1) = (CORNERS[corner] for corner in pair)
    return (x1 - x0, y1 - y0, z1 - z0), (x0, y0, z0)


@lru_cache(maxsize=1)
def cell_cases() -> list[list[Triangle]]:
    """For each of a cell's 256 cases the triangles of its six tetrahedra, as triples of indices into its edges."""
    cases = []
    for case in range(256):
        triangles = []
        for corners in _tetrahedra():
            for first, second, third in _cut(corners, {corner for corner in corners if case >> corner & 1}):
                triangles.append((_PAIRS.index(first), _PAIRS.index(second), _PAIRS.index(third)))
        cases.append(triangles)
    return cases


# Called as `marching_cubes`: sdf [X, Y, Z], deformation [X, Y, Z, 3] or None, level -> vertices [V, 3] in cells, faces.
# A deformation of up to half a cell can turn a tetrahedron over; the surface stays closed, but may fold there.
marching_tetrahedra = Marching(edges=tuple(_edge(pair) for pair in _PAIRS), cases=cell_cases)
