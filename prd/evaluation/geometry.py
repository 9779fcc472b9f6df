"""The protocol `geometry`: what can be told of a mesh without a model.

Vertices at one place (to 2^-20 of the longest side of the box) are one vertex, so that texture cuts open nothing; faces
that this collapses to a line or a point are counted as degenerate and left out of what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prd.meshes._bvh_numba import Tree, build_tree, first_hits, intersecting_pairs
from prd.meshes.files import FileMesh

SNAP = 2.0**-20  # of the longest side of the box
THIN = 0.01  # of the longest side: what is thinner is a thin part
RAYS = 4000  # faces whose thickness is measured, at most
GOOD = ("watertight", "manifold", "orientable", "without_self_intersections")  # shares of the summary


@dataclass(frozen=True)
class Edges:
    """Edges of faces [F, 3], by their halves: half h goes from corner h % 3 of face h // 3 to the next corner.

    neighbours [P, 2]: halves of one edge, each with the next one of it; paired [P]: of an edge of two halves alone;
    against [P]: the two run in opposite directions, as those of faces that face the same way do.
    """

    neighbours: NDArray[np.int64]
    paired: NDArray[np.bool_]
    against: NDArray[np.bool_]
    count: int
    boundary: int  # edges of one face
    nonmanifold: int  # edges of more than two faces


def measure_geometry(mesh: FileMesh) -> dict[str, Any]:
    """Return the figures of a mesh, plain values by name; `docs/evaluation.md` defines each.

    genus and box_fill are None where the mesh is not watertight or not orientable, what needs texture coordinates where
    it has none.
    """
    vertices, faces, kept = _welded(mesh)
    face_count = len(mesh.faces)
    row: dict[str, Any] = {"faces": face_count, "vertices": len(mesh.vertices)}
    area = _areas(vertices, faces)
    row["degenerate_faces"] = face_count - len(faces) + int((_heights(vertices, faces, area) <= SNAP).sum())
    if not len(faces) or not area.sum() > 0:
        raise ValueError("has no area: all of its faces are degenerate")
    edges = _edges(faces, len(vertices))
    component = _labels(len(faces), edges.neighbours // 3)
    umbrellas, at_vertex = _umbrellas(faces, edges)
    nonmanifold_vertices = len(at_vertex) - len(np.unique(at_vertex))
    watertight = edges.boundary == 0 and edges.nonmanifold == 0
    flipped, orientable, sign = _orientation(vertices, faces, edges)
    components = int(component.max()) + 1
    euler = umbrellas - edges.count + len(faces)
    row |= {
        "watertight": watertight,
        "manifold": edges.nonmanifold == 0 and nonmanifold_vertices == 0,
        "orientable": orientable,
        "components": components,
        "genus": components - euler // 2 if watertight and orientable else None,
        "box_fill": _box_fill(vertices, faces, sign) if watertight and orientable else None,
        "boundary_edges": edges.boundary,
        "nonmanifold_edges": edges.nonmanifold,
        "nonmanifold_vertices": nonmanifold_vertices,
        "flipped_faces": flipped,
        "normal_consistency": _normal_consistency(vertices, faces, edges),
    }
    tree = build_tree(vertices, faces)
    row["self_intersections"] = intersecting_pairs(tree)
    row["thin_parts"] = _thin_share(tree, vertices, faces, area, sign)
    return row | _texture_figures(mesh, faces, kept)


def _welded(mesh: FileMesh) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Vertices in the unit cube, those at one place merged, the faces that are left, and which of all they are."""
    used = np.unique(mesh.faces)
    low, high = mesh.vertices[used].min(axis=0), mesh.vertices[used].max(axis=0)
    scaled = (mesh.vertices - low) / max(float((high - low).max()), 1e-300)
    scaled = np.where(np.isfinite(scaled), scaled.clip(0, 1), 0.0)  # vertices that no face uses may be anything
    snapped = np.round(scaled / SNAP).astype(np.int64)  # 21 bits each
    key = snapped[:, 0] << 42 | snapped[:, 1] << 21 | snapped[:, 2]
    _, first, merged = np.unique(key, return_index=True, return_inverse=True)
    faces = merged[mesh.faces]
    a, b, c = faces.T
    kept = np.nonzero((a != b) & (b != c) & (c != a))[0]
    return scaled[first], faces[kept], kept


def _areas(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def _heights(vertices: NDArray[np.float64], faces: NDArray[np.int64], area: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least height of each face: twice its area over its longest side."""
    sides = [np.linalg.norm(vertices[faces[:, k]] - vertices[faces[:, k - 1]], axis=1) for k in range(3)]
    return 2 * area / np.maximum(np.max(sides, axis=0), 1e-300) if len(faces) else area


def _edges(faces: NDArray[np.int64], vertices: int) -> Edges:
    ends = np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1).reshape(-1, 2)  # [3 F, 2]
    key = ends.min(axis=1) * vertices + ends.max(axis=1)
    order = np.argsort(key, kind="stable")
    _, counts = np.unique(key, return_counts=True)
    count_of = np.repeat(counts, counts)  # of the edge of each half, in `order`
    same = key[order[1:]] == key[order[:-1]]
    neighbours = np.stack([order[:-1][same], order[1:][same]], axis=1)
    against = ends[neighbours[:, 0], 0] != ends[neighbours[:, 1], 0]
    paired = count_of[:-1][same] == 2
    return Edges(neighbours, paired, against, len(counts), int((counts == 1).sum()), int((counts > 2).sum()))


def _labels(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Component [count] of each of `count` nodes that pairs [P, 2] join."""
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _umbrellas(faces: NDArray[np.int64], edges: Edges) -> tuple[int, NDArray[np.int64]]:
    """The number of fans of faces around vertices, and the vertex of each; a manifold vertex has one."""
    g, h = edges.neighbours.T
    after_g, after_h = (half - half % 3 + (half % 3 + 1) % 3 for half in (g, h))
    begin, end = np.where(edges.against, after_h, h), np.where(edges.against, h, after_h)
    fan = _labels(faces.size, np.concatenate([np.stack([g, begin], 1), np.stack([after_g, end], 1)]))
    _, first = np.unique(fan, return_index=True)
    return len(first), faces.reshape(-1)[first]


def _orientation(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], edges: Edges
) -> tuple[int, bool, NDArray[np.int64]]:
    """Faces that are turned the wrong way, whether a consistent way exists, and [F] 1 or -1: turned right or wrong.

    Each piece of faces that are joined by edges of two faces is turned so that it encloses a positive volume if it is
    closed and lies in no other piece, else as most of its faces are.
    """
    count, pairs, against = len(faces), edges.neighbours[edges.paired] // 3, edges.against[edges.paired]
    first, second = pairs.T
    alike, unlike = np.where(against, second, second + count), np.where(against, second + count, second)
    joined = np.concatenate([np.stack([first, alike], 1), np.stack([first + count, unlike], 1)])
    cover = _labels(2 * count, joined)  # face f as it is, and f + count turned
    as_is, turned = cover[:count], cover[count:]
    orientable = bool((as_is != turned).all())
    piece = np.unique(np.minimum(as_is, turned), return_inverse=True)[1].reshape(-1)
    sign = np.where(as_is <= turned, 1, -1)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    volume = np.bincount(piece, sign * (a * np.cross(b, c)).sum(1))
    majority = np.where(np.bincount(piece, sign) >= 0, 1, -1)
    halves_paired = np.bincount(piece[pairs.reshape(-1)], minlength=len(volume))
    closed = halves_paired == 3 * np.bincount(piece)
    outward = np.where(closed & ~_inside(vertices, faces, piece) & (volume != 0), np.sign(volume), majority)
    right = sign * outward[piece]
    return int((right < 0).sum()), orientable, right.astype(np.int64)


def _inside(vertices: NDArray[np.float64], faces: NDArray[np.int64], piece: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the box of each piece lies strictly in that of a larger one (of the 200 largest)."""
    count = int(piece.max()) + 1
    low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
    np.minimum.at(low, piece, vertices[faces].min(axis=1))
    np.maximum.at(high, piece, vertices[faces].max(axis=1))
    inside = np.zeros(count, bool)
    for k in np.argsort(-np.prod(high - low, axis=1), kind="stable")[:200]:
        inside |= ((low > low[k]) & (high < high[k])).all(axis=1)
    return inside


def _normals(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)


def _box_fill(vertices: NDArray[np.float64], faces: NDArray[np.int64], sign: NDArray[np.int64]) -> float | None:
    """The volume that closed surfaces enclose over that of their box along the axes; None for a flat box."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    used = vertices[np.unique(faces)]
    box = float(np.prod(used.max(axis=0) - used.min(axis=0)))
    return round(float((sign * (a * np.cross(b, c)).sum(1)).sum()) / 6 / box, 4) if box > 0 else None


def _normal_consistency(vertices: NDArray[np.float64], faces: NDArray[np.int64], edges: Edges) -> float | None:
    """Mean cosine of the angle between the normals of faces that share an edge of two faces, turned alike."""
    if not edges.paired.any():
        return None
    normal, (f, g) = _normals(vertices, faces), (edges.neighbours[edges.paired] // 3).T
    cosine = (normal[f] * normal[g]).sum(axis=1) * np.where(edges.against[edges.paired], 1, -1)
    return round(float(cosine.mean()), 6)


def _thin_share(
    tree: Tree,
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    area: NDArray[np.float64],
    sign: NDArray[np.int64],
) -> float:
    """Share of the area behind which, along the inward normal, the mesh ends within THIN of its longest side."""
    picked = np.arange(len(faces)) if len(faces) <= RAYS else np.linspace(0, len(faces) - 1, RAYS).astype(np.int64)
    inward = -_normals(vertices, faces[picked]) * sign[picked, None]
    centre = vertices[faces[picked]].mean(axis=1)
    distance = first_hits(tree, centre + inward * 1e-7, inward, THIN)
    weight = area[picked]
    return round(float(weight[distance < THIN].sum() / max(weight.sum(), 1e-300)), 6)


def _texture_figures(mesh: FileMesh, faces: NDArray[np.int64], kept: NDArray[np.int64]) -> dict[str, Any]:
    """Area of all faces in the texture, of its unit square (overlaps count twice), and the number of charts."""
    corners = mesh.uv[mesh.faces[kept]]  # [F, 3, 2]
    has = np.isfinite(corners).all(axis=(1, 2))
    if not has.any():
        return {"uv_area": None, "uv_charts": None}
    corners, welded = corners[has].astype(np.float64), faces[has]
    (u1, v1), (u2, v2) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    place = np.concatenate([welded.reshape(-1, 1), np.round(corners.reshape(-1, 2) / SNAP).astype(np.int64)], axis=1)
    corner = np.unique(place, axis=0, return_inverse=True)[1].reshape(-1, 3)
    charts = _labels(len(corner), _edges(corner, corner.size).neighbours // 3).max() + 1
    return {"uv_area": round(float(np.abs(u1 * v2 - u2 * v1).sum() / 2), 6), "uv_charts": int(charts)}
