"""Clean and simplify raw surfaces: weld, drop loose pieces, turn outward, collapse edges."""

from __future__ import annotations

import math
from typing import Literal

import fast_simplification
import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from prd.meshes.edges import edges_between, pieces, row_keys, topology_of
from prd.meshes.handles import close_handles

WELD = 2.0**-20  # scene units: vertices closer than this are one; readers merge at 1e-8 and must find nothing to merge
NEAR = 0.002  # scene units
CLOSE = 0.95  # part of the triangles that a step of the bisection must leave out: less is near enough
DUST = 1e-2  # of the largest piece's volume: smaller pieces are never kept

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]  # vertices [V, 3] scene units, faces [F, 3] outward


def clean(vertices: NDArray[np.float32], faces: NDArray[np.int64], keep: Literal["largest", "all"]) -> Arrays:
    """Weld, drop floating pieces, and turn the winding outward.

    vertices [V, 3], faces [F, 3] of consistent winding; keep as in `MeshOptions`. Raises ValueError if no piece
    encloses a volume.
    """
    vertices, faces, _ = weld(vertices, faces)
    label = pieces(edges_between(faces)[0], len(faces))  # [F]
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    volume = np.bincount(label, (a * np.cross(b, c)).sum(1) / 6)  # signed, per piece
    largest = int(np.abs(volume).argmax())
    if volume[largest] == 0:
        raise ValueError(f"faces={faces.shape}: the surface encloses no volume")
    outward = volume * np.sign(volume[largest])  # negative: a cavity, which nobody sees
    wanted = outward > DUST * outward[largest] if keep == "all" else np.arange(len(volume)) == largest
    faces = faces[wanted[label]]
    return compact(vertices, faces[:, ::-1] if volume[largest] < 0 else faces)


def weld(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> tuple[*Arrays, NDArray[np.int64]]:
    """Merge vertices at one position (to 1e-6 scene units) and drop what collapses: slivers and pairs of equal faces.

    Returns vertices [V', 3], faces [F', 3] and first [V'], a vertex of the input at each position.
    """
    positions, first, merged = merge_positions(vertices)
    faces = merged[faces]
    return positions, faces[is_proper(faces)], first


def merge_positions(
    vertices: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Return positions [V', 3], each once, first [V'] (a vertex at each) and merged [V] (each vertex's position)."""
    snapped = np.round(vertices.astype(np.float64) / WELD).astype(np.int64)
    _, first, merged = np.unique(row_keys(snapped), return_index=True, return_inverse=True)
    return (snapped[first] * WELD).astype(np.float32), first, merged.reshape(-1)


def is_proper(faces: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [F] False for slivers, with one vertex twice, and for the faces of pairs on the same three vertices."""
    a, b, c = faces.T
    proper = (a != b) & (b != c) & (c != a)
    keys = row_keys(np.sort(faces[proper], axis=1))
    _, same, count = np.unique(keys, return_inverse=True, return_counts=True)
    proper[proper] = count[same.reshape(-1)] == 1  # two faces back to back enclose nothing: both go, edges stay paired
    return proper


def decimate(
    vertices: NDArray[np.float32],
    faces: NDArray[np.int64],
    target_faces: int,
    topology: Literal["keep", "free"] = "keep",
) -> Arrays:
    """Simplify by quadric edge collapse to at most `target_faces` triangles, or as few as can be had.

    A closed surface stays closed and, with topology="keep", keeps its topology: where the collapse would pinch a thin
    part, the smallest number for which it does not is found by bisection. With "free", thin parts may be pinched off;
    where even this does not reach the number all handles are closed, and at last the surface may come open.
    """
    if len(faces) <= target_faces:
        return vertices, faces
    whole = topology_of(faces)
    if not whole.is_closed:
        return _collapsed(vertices, faces, target_faces)
    euler = whole.euler if topology == "keep" else None
    best = _bisected((vertices, faces), target_faces, euler)
    if topology == "keep" or len(best[1]) <= target_faces:
        return best
    best = _bisected(close_handles(*best, math.inf)[:2], target_faces, None)
    return best if len(best[1]) <= target_faces else _collapsed(*best, target_faces)


def _bisected(surface: Arrays, target_faces: int, euler: int | None) -> Arrays:
    """Return the surface with the fewest triangles, not below the target, that is closed and has this Euler number."""
    best, part = surface, 0.0  # part of the triangles to keep in a step: first the target at once
    while part < CLOSE and len(best[1]) > target_faces:
        asked = max(target_faces, int(part * len(best[1])))
        result = _collapsed(*best, asked)
        after = topology_of(result[1])
        if after.is_closed and euler in (None, after.euler) and len(result[1]) <= CLOSE * len(best[1]):
            best = result
        else:  # halfway, by the logarithm, between what does not do and what is there
            part = math.sqrt(max(asked / len(best[1]), part))
    return best


def _collapsed(vertices: NDArray[np.float32], faces: NDArray[np.int64], target_faces: int) -> Arrays:
    """Return a surface after edge collapses, whatever becomes of its topology."""
    points, triangles = vertices, faces
    for aggressiveness in (7, 10):  # the second where the first stops above the target
        if len(triangles) > target_faces:
            points, triangles = fast_simplification.simplify(
                points, triangles.astype(np.int32), target_count=target_faces, agg=aggressiveness
            )
    welded, kept, _ = weld(points, triangles.astype(np.int64))
    return compact(welded, kept)


def merge_near(vertices: NDArray[np.float32], faces: NDArray[np.int64], near: float = NEAR) -> Arrays:
    """Merge vertices nearer than `near`, scene units, which only make needles; not where topology or volume change."""
    pairs = cKDTree(vertices).query_pairs(near, output_type="ndarray")
    if not len(pairs):
        return vertices, faces
    count = len(vertices)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    _, label = connected_components(graph.tocsr(), directed=False)
    middle = np.stack([np.bincount(label, axis) for axis in vertices.T], axis=1) / np.bincount(label)[:, None]
    welded, kept, _ = weld(middle.astype(np.float32), label[faces].astype(np.int64))
    result = compact(welded, kept)
    same = topology_of(result[1]) == topology_of(faces)
    before, after = (_volume(*surface) for surface in ((vertices, faces), result))
    return result if same and abs(after - before) < DUST * abs(before) else (vertices, faces)


def _volume(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> float:
    """Return the volume that a closed surface encloses, cubic scene units."""
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def vertex_normals(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return unit vertex normals [V, 3], weighted by the angle of each face at the vertex."""
    return trimesh.Trimesh(vertices, faces, process=False).vertex_normals.astype(np.float32)


def compact(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> Arrays:
    """Drop the vertices that no face uses."""
    used, inverse = np.unique(faces, return_inverse=True)
    return vertices[used], inverse.reshape(faces.shape)
