"""Clean and simplify raw surfaces: weld, drop loose pieces, turn outward, collapse edges."""

from __future__ import annotations

from typing import Literal

import fast_simplification
import numpy as np
import trimesh
from numpy.typing import NDArray

WELD = 2.0**-20  # scene units: vertices closer than this are one; readers merge at 1e-8 and must find nothing to merge
DUST = 1e-2  # of the largest piece's volume: smaller pieces are never kept

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]  # vertices [V, 3] scene units, faces [F, 3] outward


def clean(vertices: NDArray[np.float32], faces: NDArray[np.int64], keep: Literal["largest", "all"]) -> Arrays:
    """Weld, drop floating pieces, and turn the winding outward.

    vertices [V, 3], faces [F, 3] of consistent winding; keep as in `MeshOptions`. Raises ValueError if no piece
    encloses a volume.
    """
    vertices, faces, _ = weld(vertices, faces)
    adjacency = trimesh.Trimesh(vertices, faces, process=False).face_adjacency
    label = trimesh.graph.connected_component_labels(adjacency, node_count=len(faces))  # [F]
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
    _, first, merged = np.unique(snapped, axis=0, return_index=True, return_inverse=True)
    return (snapped[first] * WELD).astype(np.float32), first, merged.reshape(-1)


def is_proper(faces: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [F] False for slivers, with one vertex twice, and for the faces of pairs on the same three vertices."""
    a, b, c = faces.T
    proper = (a != b) & (b != c) & (c != a)
    _, same, count = np.unique(np.sort(faces[proper], axis=1), axis=0, return_inverse=True, return_counts=True)
    proper[proper] = count[same.reshape(-1)] == 1  # two faces back to back enclose nothing: both go, edges stay paired
    return proper


def decimate(vertices: NDArray[np.float32], faces: NDArray[np.int64], target_faces: int) -> Arrays:
    """Simplify by quadric edge collapse to about `target_faces` triangles.

    A closed surface stays closed and keeps its topology: where the collapse would pinch a thin part, the target is
    doubled until it does not, at last leaving the surface as it is.
    """
    before = trimesh.Trimesh(vertices, faces, process=False)
    while target_faces < len(faces):
        points, triangles = fast_simplification.simplify(vertices, faces.astype(np.int32), target_count=target_faces)
        welded, kept, _ = weld(points, triangles.astype(np.int64))
        result = compact(welded, kept)
        after = trimesh.Trimesh(*result, process=False)
        if not before.is_watertight or (after.is_watertight and after.euler_number == before.euler_number):
            return result
        target_faces *= 2
    return vertices, faces


def vertex_normals(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return unit vertex normals [V, 3], weighted by the angle of each face at the vertex."""
    return trimesh.Trimesh(vertices, faces, process=False).vertex_normals.astype(np.float32)


def compact(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> Arrays:
    """Drop the vertices that no face uses."""
    used, inverse = np.unique(faces, return_inverse=True)
    return vertices[used], inverse.reshape(faces.shape)
