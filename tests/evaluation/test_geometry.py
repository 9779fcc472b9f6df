"""Figures of meshes that are known: planted defects are counted, right meshes have none, whatever wrote the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from trimesh import creation

from prd.evaluation.geometry import measure_geometry
from prd.meshes.files import read_file_mesh

RIGHT = {
    "watertight": True,
    "manifold": True,
    "orientable": True,
    "components": 1,
    "boundary_edges": 0,
    "nonmanifold_edges": 0,
    "nonmanifold_vertices": 0,
    "flipped_faces": 0,
    "degenerate_faces": 0,
    "self_intersections": 0,
    "thin_parts": 0.0,
}


def moved(mesh: trimesh.Trimesh, *by: float) -> trimesh.Trimesh:
    return mesh.copy().apply_translation(by)


def concatenate(meshes: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    joined = trimesh.util.concatenate(meshes)
    assert isinstance(joined, trimesh.Trimesh)
    return joined


def raw(vertices: Any, faces: Any) -> trimesh.Trimesh:
    return trimesh.Trimesh(vertices, faces, process=False, validate=False)


def flipped(count: int) -> trimesh.Trimesh:
    box = creation.box()
    return raw(box.vertices, np.concatenate([box.faces[:count, ::-1], box.faces[count:]]))


def double_torus() -> trimesh.Trimesh:
    """A plate of 5 x 3 unit cubes with two holes: the faces between cubes and air."""
    solid = np.zeros((7, 5, 3), bool)
    solid[1:6, 1:4, 1] = True
    solid[2, 2, 1] = solid[4, 2, 1] = False
    quads = []
    for cell in np.argwhere(solid):
        for axis in range(3):
            for side in (0, 1):
                step = np.eye(3, dtype=int)[axis] * (2 * side - 1)
                if not solid[tuple(cell + step)]:
                    u, v = np.eye(3, dtype=int)[(axis + 1) % 3], np.eye(3, dtype=int)[(axis + 2) % 3]
                    corner = cell + np.eye(3, dtype=int)[axis] * side
                    quad = [corner, corner + u, corner + u + v, corner + v]
                    quads.append(quad if side else quad[::-1])
    points, index = np.unique(np.array(quads).reshape(-1, 3), axis=0, return_inverse=True)
    a, b, c, d = index.reshape(-1, 4).T
    return raw(points.astype(float), np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]))


def moebius(n: int = 40) -> trimesh.Trimesh:
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    radius = [1 + side * np.cos(angle / 2) for side in (-0.3, 0.3)]
    points = [
        [r * np.cos(angle), r * np.sin(angle), s * np.sin(angle / 2)] for r, s in zip(radius, (-0.3, 0.3), strict=True)
    ]
    vertices = np.stack([np.stack(p, 1) for p in points], 1).reshape(-1, 3)
    faces = []
    for k in range(n):
        a, b = 2 * k, 2 * k + 1
        c, d = (a + 2, b + 2) if k < n - 1 else (1, 0)
        faces += [[a, b, c], [b, d, c]]
    return raw(vertices, faces)


BOX, BALL = creation.box(), creation.icosphere(2)
CASES: list[tuple[str, trimesh.Trimesh, dict[str, Any]]] = [
    ("box", BOX, {**RIGHT, "genus": 0}),
    ("ball", BALL, {**RIGHT, "genus": 0}),
    ("torus", creation.torus(1, 0.3), {**RIGHT, "genus": 1}),
    ("double torus", double_torus(), {**RIGHT, "genus": 2}),
    ("two balls apart", concatenate([BALL, moved(BALL, 3, 0, 0)]), {**RIGHT, "components": 2, "genus": 0}),
    ("ball in a ball", concatenate([BALL, creation.icosphere(2, 0.5)]), {**RIGHT, "components": 2, "genus": 0}),
    ("hole", raw(BOX.vertices, BOX.faces[1:]), {"watertight": False, "genus": None, "boundary_edges": 3}),
    ("one face turned", flipped(1), {"watertight": True, "genus": 0, "flipped_faces": 1}),
    ("three faces turned", flipped(3), {"flipped_faces": 3}),
    ("inside out", flipped(12), {"flipped_faces": 12}),
    ("moebius", moebius(), {"orientable": False, "watertight": False, "genus": None, "manifold": True}),
    ("degenerate", raw(BOX.vertices, [*BOX.faces, [0, 0, 1]]), {**RIGHT, "degenerate_faces": 1, "genus": 0}),
    ("faces twice", raw(BOX.vertices, [*BOX.faces, *BOX.faces[:2]]), {"manifold": False, "self_intersections": 2}),
    ("touch at an edge", concatenate([BOX, moved(BOX, 1, 1, 0)]), {"nonmanifold_edges": 1, "watertight": False}),
    ("touch at a corner", concatenate([BOX, moved(BOX, 1, 1, 1)]), {"nonmanifold_vertices": 1, "manifold": False}),
    ("plate", creation.box((1, 1, 0.005)), {"watertight": True, "self_intersections": 0}),
]


def figures(mesh: trimesh.Trimesh, path: Path) -> dict[str, Any]:
    mesh.export(path)
    return measure_geometry(read_file_mesh(path))


@pytest.mark.parametrize(("mesh", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_planted_defects_are_counted(
    mesh: trimesh.Trimesh, expected: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    row = figures(mesh, tmp_path / f"mesh{suffix}")
    assert {name: row[name] for name in expected} == expected
    assert row["faces"] == len(mesh.faces)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shift", [(0.7, 0.1, 0.05), (0.3, 0.2, 0.1), (1.2, 0, 0)])
def test_pieces_that_pierce_each_other_intersect(scale: float, shift: tuple[float, ...], tmp_path: Path) -> None:
    mesh = concatenate([BALL, moved(BALL, *shift)]).apply_scale(scale)
    row = figures(mesh, tmp_path / "mesh.ply")
    assert row["self_intersections"] > 20 and row["watertight"] and row["components"] == 2


def test_cubes_that_pierce_each_other_in_their_diagonals_intersect(tmp_path: Path) -> None:
    row = figures(concatenate([BOX, moved(BOX, 0.5, 0.5, 0.5)]), tmp_path / "mesh.ply")
    assert row["self_intersections"] >= 6


def test_pairs_are_those_that_every_pair_tried_gives(tmp_path: Path) -> None:
    """The tree leaves none out: a soup of triangles, cut in two halves in every order, has the same number."""
    rng = np.random.default_rng(0)
    corners = (rng.random((200, 1, 3)) + rng.normal(0, 0.08, (200, 3, 3))).reshape(-1, 3)
    faces = np.arange(600).reshape(-1, 3)
    counts = set()
    for _ in range(3):
        rng.shuffle(faces)
        counts.add(figures(raw(corners, faces), tmp_path / "soup.ply")["self_intersections"])
    brute = sum(
        measure_pair(corners[faces[i]], corners[faces[j]], tmp_path) for i in range(40) for j in range(i + 1, 40)
    )
    part = figures(raw(corners, faces[:40]), tmp_path / "part.ply")["self_intersections"]
    assert len(counts) == 1 and counts.pop() > 20 and part == brute


def measure_pair(one: np.ndarray, other: np.ndarray, folder: Path) -> int:
    return figures(raw(np.concatenate([one, other]), [[0, 1, 2], [3, 4, 5]]), folder / "pair.ply")["self_intersections"]


def test_box_fill_is_the_enclosed_volume_over_that_of_the_box(tmp_path: Path) -> None:
    hollow = concatenate([BOX, raw(creation.box((0.5, 0.5, 0.5)).vertices, BOX.faces[:, ::-1])])
    meshes = {
        "box": (moved(creation.box((1, 2, 3)), 5, 0, 0), 1.0),
        "ball": (BALL, BALL.volume / np.prod(BALL.extents)),
        "cavity": (hollow, 1 - 0.125),
        "one face turned": (flipped(1), 1.0),
        "hole": (raw(BOX.vertices, BOX.faces[1:]), None),
    }
    for name, (mesh, fill) in meshes.items():
        assert figures(mesh, tmp_path / f"{name}.ply")["box_fill"] == (fill and pytest.approx(fill, abs=1e-3)), name


def test_thin_parts_are_told_from_thick_ones(tmp_path: Path) -> None:
    assert figures(creation.box((1, 1, 0.005)), tmp_path / "thin.ply")["thin_parts"] > 0.98
    assert figures(creation.box((1, 1, 0.05)), tmp_path / "thick.ply")["thin_parts"] == 0


def test_texture_cuts_open_nothing_and_are_counted_as_charts(tmp_path: Path) -> None:
    import xatlas

    source, faces, uv = xatlas.parametrize(BALL.vertices.astype(np.float32), BALL.faces.astype(np.uint32))
    mesh = trimesh.Trimesh(BALL.vertices[source], faces, process=False, visual=trimesh.visual.TextureVisuals(uv=uv))
    row = figures(mesh, tmp_path / "ball.obj")
    assert row["watertight"] and row["genus"] == 0 and row["components"] == 1
    assert 0.2 < row["uv_area"] <= 1 and row["uv_charts"] > 1
    assert figures(BALL, tmp_path / "plain.ply")["uv_area"] is None
