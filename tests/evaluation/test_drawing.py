"""Pictures of mesh files: the same shape in every format, with its colours, from the sides that a protocol names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from trimesh import creation

from prd.evaluation.drawing import cameras_of, draw
from prd.evaluation.protocols import PRD_PAPER, T3BENCH_QUALITY, Pictures
from prd.meshes.files import FileMesh, read_file_mesh
from prd.meshes.mesh import Mesh, extract_mesh
from prd.toybox.world import ExactField

SMALL = Pictures(size=64)


@pytest.fixture(scope="module")
def arrow() -> Mesh:
    (mesh,) = extract_mesh(ExactField(["a yellow arrow"]), isosurface_resolution=48, texture_size=256)
    assert mesh is not None
    return mesh


def drawn(mesh: FileMesh, pictures: Pictures = SMALL) -> np.ndarray:
    return np.stack(list(draw(mesh, pictures))).astype(float) / 255


@pytest.mark.parametrize("name", ["textured.glb", "textured.obj", "coloured.glb", "coloured.obj", "coloured.ply"])
def test_every_format_gives_the_same_pictures(arrow: Mesh, name: str, tmp_path: Path) -> None:
    plain = replace(arrow, uv=None, texture=None)
    path = (arrow if name.startswith("textured") else plain).export(tmp_path / name)
    held = FileMesh(
        arrow.vertices.astype(float),
        arrow.faces,
        arrow.vertex_colors,
        np.full((len(arrow.vertices), 2), np.nan, np.float32),
        np.full(len(arrow.faces), -1),
        (),
    )
    expected, found = drawn(held), drawn(read_file_mesh(path))
    assert np.abs(expected - found).mean() < 0.01 and np.abs(expected - 1).mean() > 0.05
    assert np.abs(expected[0] - expected[1]).mean() > 0.02  # another side is another picture


def test_the_front_is_seen_from_azimuth_0_and_left_from_90(tmp_path: Path) -> None:
    colors = {(1, 0, 0): (255, 0, 0), (0, 1, 0): (0, 255, 0), (-1, 0, 0): (0, 0, 255), (0, -1, 0): (255, 255, 0)}
    box = creation.box()
    faces = np.full((12, 4), 128, np.uint8)
    for normal, color in colors.items():
        faces[(box.face_normals @ normal) > 0.9, :3] = color
    box.visual = trimesh.visual.ColorVisuals(box, face_colors=faces)
    box.export(tmp_path / "box.ply")
    middle = drawn(read_file_mesh(tmp_path / "box.ply"), replace(SMALL, elevation=0.0))[:, 32, 32]
    np.testing.assert_allclose(middle * 255, list(colors.values()), atol=1)


def test_the_upward_axis_can_be_said(tmp_path: Path) -> None:
    creation.box((1, 1, 3)).export(tmp_path / "tall.ply")
    tall, lying = (drawn(read_file_mesh(tmp_path / "tall.ply", up=up)) for up in ("z", "y"))
    rows, columns = ((1 - picture[1].mean(axis=-1)).any(axis=axis).sum() for picture in (tall,) for axis in (1, 0))
    assert rows > 2 * columns and np.abs(tall - lying).mean() > 0.02


def test_cameras_of_the_sphere_are_t3benchs() -> None:
    cameras = cameras_of(T3BENCH_QUALITY.pictures or SMALL)
    assert cameras.views == 810 and float((cameras.distance - 2.2).abs().max()) < 1e-9
    paper = cameras_of(PRD_PAPER.pictures or SMALL)
    np.testing.assert_allclose(np.rad2deg(paper.azimuth[0].numpy()) % 360, [0, 90, 180, 270], atol=1e-6)
