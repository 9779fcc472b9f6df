"""Files of meshes: colours come back, files that were not written here stay, names that every reader takes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from prd.meshes.export import SUFFIXES, options_for
from prd.meshes.mesh import Mesh
from prd.meshes.options import MeshOptions

LEVELS = np.arange(256)
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def coloured(levels: np.ndarray) -> Mesh:
    """A ball whose vertices have grey levels in turn."""
    ball = trimesh.creation.icosphere(3)
    vertices = np.asarray(ball.vertices, np.float32)
    colors = np.repeat(np.resize(levels, len(vertices))[:, None], 3, axis=1).astype(np.float32)
    return Mesh(vertices, np.asarray(ball.faces, np.int64), vertices, colors)


@pytest.fixture(scope="module")
def textured() -> Mesh:
    mesh = coloured(LEVELS / 255)
    uv = ((mesh.vertices[:, :2] + 1) / 2).astype(np.float32)
    return replace(mesh, uv=uv, texture=np.full((32, 32, 3), 200, np.uint8))


def glb_attribute(path: Path, name: str) -> np.ndarray:
    """An attribute of the only mesh of a .glb, read by its JSON alone."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    tree: dict[str, Any] = json.loads(data[20 : 20 + length])
    buffer = data[20 + length + 8 :]
    (shape,) = tree["meshes"]
    (primitive,) = shape["primitives"]
    accessor = tree["accessors"][primitive["attributes"][name]]
    view = tree["bufferViews"][accessor["bufferView"]]
    kind, most = {5121: ("<u1", 255), 5123: ("<u2", 65535), 5126: ("<f4", 1)}[accessor["componentType"]]
    assert accessor.get("normalized", False) or most == 1
    width = {"VEC3": 3, "VEC4": 4}[accessor["type"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    values = np.frombuffer(buffer, kind, accessor["count"] * width, start).reshape(-1, width)
    return values[:, :3].astype(np.float64) / most


def srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)


def test_every_grey_level_comes_back_from_a_glb(tmp_path: Path) -> None:
    mesh = coloured(np.concatenate([LEVELS / 255, np.random.default_rng(0).uniform(0, 0.1, 300)]))
    found = srgb(glb_attribute(mesh.export(tmp_path / "ball.glb"), "COLOR_0"))
    np.testing.assert_allclose(found, mesh.vertex_colors, atol=0.05 / 255)
    scene: Any = trimesh.load(tmp_path / "ball.glb", process=False)  # which leaves them unnormalised
    (loaded,) = scene.geometry.values()
    linear = loaded.visual.vertex_attributes["color"][:, :3] / 65535
    np.testing.assert_array_equal(linear, glb_attribute(tmp_path / "ball.glb", "COLOR_0"))


@pytest.mark.parametrize("suffix", [".ply", ".obj"])
def test_every_grey_level_comes_back_from_the_other_formats(suffix: str, tmp_path: Path) -> None:
    mesh = coloured(LEVELS / 255)
    loaded: Any = trimesh.load(mesh.export(tmp_path / f"ball{suffix}"), force="mesh", process=False)
    np.testing.assert_allclose(np.unique(loaded.visual.vertex_colors[:, 0]), LEVELS)


def reads_back(path: Path) -> bool:
    """Whether an OBJ file leads to its own picture."""
    loaded: Any = trimesh.load(path, force="mesh", process=False)
    return np.asarray(loaded.visual.material.image.convert("RGB")).mean() == 200


def put(path: Path, what: str) -> None:
    """Something of the user's in the place of a side file."""
    if what == "picture":
        Image.new("RGB", (8, 8)).save(path, format="png")
    elif what == "text":
        path.write_text("# prd: +Y up\nnewmtl mine\n", encoding="utf-8")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("what", ["picture", "text", "folder", "link to nothing"])
@pytest.mark.parametrize("suffix", [".png", ".mtl"])
def test_a_file_beside_an_obj_that_was_not_written_for_it_stays(
    suffix: str, what: str, textured: Mesh, tmp_path: Path
) -> None:
    mine = tmp_path / f"photo{suffix}"
    put(mine, what)
    before = (mine.is_symlink(), mine.is_dir(), mine.read_bytes() if mine.is_file() else None)
    for _ in range(2):  # the second time over its own
        assert reads_back(textured.export(tmp_path / "photo.obj"))
        assert (mine.is_symlink(), mine.is_dir(), mine.read_bytes() if mine.is_file() else None) == before
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, "photo.obj", "photo_2.mtl", "photo_2.png"}


def test_its_own_files_are_written_over_and_those_of_another_obj_are_not(textured: Mesh, tmp_path: Path) -> None:
    brighter = replace(textured, texture=np.full((32, 32, 3), 250, np.uint8))
    textured.export(tmp_path / "a b.obj")
    brighter.export(tmp_path / "a_b.obj")  # the same name, once the space is gone
    brighter.export(tmp_path / "a_b.obj")
    assert reads_back(tmp_path / "a b.obj") and not reads_back(tmp_path / "a_b.obj")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a b.obj", "a_b.mtl", "a_b.png", "a_b.obj", "a_b_2.mtl", "a_b_2.png"}
    textured.export(tmp_path / "a_b.obj")
    assert reads_back(tmp_path / "a_b.obj") and {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    "name",
    ["a red cube", "#1", "größe", "红色立方体", "-o", "two\nlines", "a" * 250, "nul ", "x.y", "q'\"<>|?*", ".hidden"],
)
@pytest.mark.parametrize("suffix", [".obj", ".OBJ"])
def test_names_beside_an_obj_are_those_that_every_reader_takes(
    name: str, suffix: str, textured: Mesh, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}{suffix}"
    textured.export(path)
    beside = sorted(file.name for file in tmp_path.iterdir() if file != path)
    assert [Path(file).suffix for file in beside] == [".mtl", ".png"]
    assert all(PLAIN.fullmatch(file) and len(file) < 100 for file in beside)
    assert f"mtllib {beside[0]}\n" in path.read_text(encoding="utf-8") and f"map_Kd {beside[1]}" in (
        tmp_path / beside[0]
    ).read_text(encoding="utf-8")


def test_a_plain_name_is_kept(textured: Mesh, tmp_path: Path) -> None:
    textured.export(tmp_path / "My-Ball.v2.obj")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"My-Ball.v2.obj", "My-Ball.v2.mtl", "My-Ball.v2.png"}
    textured.export(tmp_path / "BALL.GLB")
    textured.export(tmp_path / "BALL.PLY")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a.glb", "the folder .*absent is not there; make it first"),
        ("folder.obj", "is a folder; name a file"),
        ("a.fbx", "must end in .glb, .obj, .ply, .gltf, .stl, .3mf, .usdz"),
        ("a" * 300 + ".ply", "is longer than a name of a file may be"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(name: str, message: str, textured: Mesh, tmp_path: Path) -> None:
    (tmp_path / "folder.obj").mkdir()
    with pytest.raises(ValueError, match=f"^path=.*{message}"):
        textured.export(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.obj"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_texture_is_asked_for_where_a_file_holds_one(suffix: str) -> None:
    asked = MeshOptions(texture_size=64, normal_map=True, target_faces=200)
    bare = replace(asked, texture_size=None, normal_map=False)
    holds = suffix in (".glb", ".gltf", ".obj", ".usdz")
    assert options_for(asked, suffix) == options_for(asked, suffix.upper()) == (asked if holds else bare)
    assert options_for(asked, suffix, ".glb") == asked and options_for(bare, suffix) == bare
