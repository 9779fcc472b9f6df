"""Edges of triangle meshes: as trimesh counts them, and faster."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from prd.meshes.edges import Topology, border_of, edges_between, neighbours_of, pieces, row_keys, topology_of

BALL = trimesh.creation.icosphere(2)
SHAPES = {
    "ball": BALL,
    "torus": trimesh.creation.torus(1, 0.3),
    "two": trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.icosphere(1)]),
    "open": trimesh.Trimesh(BALL.vertices, BALL.faces[BALL.triangles_center[:, 2] > 0]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_topology_is_trimeshs(name: str) -> None:
    shape = SHAPES[name]
    faces = np.asarray(shape.faces, np.int64)
    closed = bool(shape.is_watertight and shape.is_winding_consistent)
    assert topology_of(faces) == Topology(closed, shape.euler_number)
    pairs, _ = edges_between(faces)
    wanted = np.sort(shape.face_adjacency, axis=1)
    np.testing.assert_array_equal(np.unique(np.sort(pairs, axis=1), axis=0), np.unique(wanted, axis=0))
    assert len(np.unique(pieces(pairs, len(faces)))) == shape.body_count
    beside = neighbours_of(faces)
    assert (beside >= 0).sum() == 2 * len(pairs) and (beside < 0).sum() == len(border_of(faces))


def test_a_turned_face_and_a_third_face_open_a_surface() -> None:
    faces = np.asarray(SHAPES["ball"].faces, np.int64)
    turned = faces.copy()
    turned[0] = turned[0, ::-1]
    third = np.concatenate([faces, [[*faces[0, :2], int(faces.max()) + 1]]])
    assert not topology_of(turned).is_closed and not topology_of(third).is_closed
    shared = {tuple(sorted(edge)) for edge in edges_between(third)[1].tolist()}
    assert tuple(sorted(faces[0, :2].tolist())) not in shared  # three faces have it


@pytest.mark.parametrize("span", [10, 2**40])
def test_row_keys_are_equal_and_ordered_as_rows(span: int) -> None:
    rows = np.random.default_rng(0).integers(-span, span, (200, 3))
    rows[100:] = rows[:100] + np.random.default_rng(1).integers(0, 2, (100, 3))
    for wanted, found in zip(
        np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:],
        np.unique(row_keys(rows), return_index=True, return_inverse=True)[1:],
        strict=True,
    ):
        np.testing.assert_array_equal(wanted.reshape(-1), found.reshape(-1))
