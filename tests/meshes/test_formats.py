"""Every format of a mesh: closed for readers that look at positions alone, upright, front forward, in its unit."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import trimesh
from PIL import Image

from prd.meshes.export import FORMATS, parse_length
from prd.meshes.mesh import Mesh
from prd.meshes.read import read_mesh

METADATA = {"prompt": 'a "red" <cube> & größe', "seed": 7, "model": "toybox", "licence": "apache-2.0"}
SCENE = np.array([[0.1, -0.2, -0.5], [0.5, 0.6, 0.7]])  # corners of the box below: depth X, width Y, height Z
LINEAR_RED = 0.0331  # of sRGB 0.2
needs_usd = pytest.mark.skipif(importlib.util.find_spec("pxr") is None, reason="usd-core is not installed")
SUFFIXES = [pytest.param(suffix, marks=[needs_usd] if suffix == ".usdz" else []) for suffix in FORMATS]


def box(textured: bool) -> Mesh:
    """A box whose six sides are charts of their own: its corners appear three times."""
    shape = trimesh.creation.box(extents=(0.4, 0.8, 1.2))
    shape.apply_translation((0.3, 0.2, 0.1))
    corners = np.asarray(shape.vertices[shape.faces.reshape(-1)], np.float32)
    faces = np.arange(len(corners)).reshape(-1, 3)
    colors = np.tile(np.array([0.2, 0.5, 1.0], np.float32), (len(corners), 1))
    outward = corners - np.array([0.3, 0.2, 0.1], np.float32)
    normals = outward / np.linalg.norm(outward, axis=1, keepdims=True)
    if not textured:
        return Mesh(corners, faces, normals, colors, metadata=METADATA)
    uv = np.tile(np.array([[0, 0], [0.5, 0], [0.5, 1], [0.5, 0.25], [1, 0.25], [1, 0.75]], np.float32), (6, 1))
    texture = np.arange(16 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    return Mesh(corners, faces, normals, colors, uv, texture, METADATA)


def glb_tree(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON of a .glb or .gltf, and its buffer."""
    data = path.read_bytes()
    if path.suffix == ".gltf":
        tree = json.loads(data)
        return tree, base64.b64decode(tree["buffers"][0]["uri"].partition(",")[2])
    length = int.from_bytes(data[12:16], "little")
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data))
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def obj_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The v lines of an OBJ file, and the faces as indices into them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    v = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], float)
    f = [[int(word.split("/")[0]) for word in line.split()[1:]] for line in lines if line.startswith("f ")]
    return v, np.array(f) - 1


def threemf_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        root = ElementTree.fromstring(archive.read("3D/3dmodel.model"))
    assert root.get("unit") == "millimeter"
    found: dict[str, list[list[float]]] = {"vertex": [], "triangle": []}
    for node in root.iter():
        kind = node.tag.partition("}")[2]
        if kind in found:
            names = ("x", "y", "z") if kind == "vertex" else ("v1", "v2", "v3")
            found[kind].append([float(node.attrib[name]) for name in names])
    return np.array(found["vertex"]), np.array(found["triangle"]).astype(int)


def usdz_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from pxr import Usd, UsdGeom

    stage = Usd.Stage.Open(str(path))
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    shape = UsdGeom.Mesh(stage.GetPrimAtPath("/object/mesh"))
    return np.array(shape.GetPointsAttr().Get()), np.array(shape.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3)


def trimesh_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    loaded: Any = trimesh.load(path, force="mesh", process=False)
    if path.suffix in (".glb", ".gltf", ".stl"):  # which have no indices of positions alone
        loaded.merge_vertices(merge_tex=True, merge_norm=True)
    return np.asarray(loaded.vertices), np.asarray(loaded.faces)


READERS: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray]]] = {
    ".obj": obj_arrays,
    ".3mf": threemf_arrays,
    ".usdz": usdz_arrays,
}


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The positions and faces of a file."""
    return READERS.get(path.suffix, trimesh_arrays)(path)


def in_axes(scene: np.ndarray, up: str) -> np.ndarray:
    """The scene's points in a file's axes: its front +X is +Z of +Y up, and -Y of +Z up; its +Y is +X of both."""
    x, y, z = scene.T
    return np.stack([y, z, x] if up == "y" else [y, -x, z], axis=1)


@pytest.mark.parametrize("textured", [True, False], ids=["texture", "vertex colours"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_closed_upright_and_faces_front(suffix: str, textured: bool, tmp_path: Path) -> None:
    for up in FORMATS[suffix].up:
        path = box(textured).export(tmp_path / f"box{suffix}", up=up)
        vertices, faces = arrays(path)
        assert (len(vertices), len(faces)) == (8, 12)
        shape = trimesh.Trimesh(vertices, faces, process=False)
        assert shape.is_watertight and shape.is_winding_consistent
        expected = in_axes(SCENE, up)
        expected = np.stack([expected.min(axis=0), expected.max(axis=0)])
        if FORMATS[suffix].unit == 1:
            expected = (expected - expected[0]) * 50  # millimetres, on the bed
        np.testing.assert_allclose(shape.bounds, expected, atol=1e-4)
        assert shape.volume == pytest.approx(np.prod(expected[1] - expected[0]), rel=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_mesh_is_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    first = box(True).export(tmp_path / f"a{suffix}").read_bytes()
    assert box(True).export(tmp_path / f"a{suffix}").read_bytes() == first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_height_is_that_of_the_file(suffix: str, tmp_path: Path) -> None:
    unit = FORMATS[suffix].unit
    if unit is None:
        with pytest.raises(ValueError, match=r"height='6cm': \.(obj|ply) says no unit of length; write one of \.glb"):
            box(True).export(tmp_path / f"box{suffix}", height="6cm")
        return
    vertices, _ = arrays(box(True).export(tmp_path / f"box{suffix}", height="6cm"))
    axis = "xyz".index(FORMATS[suffix].up[0])
    assert np.ptp(vertices[:, axis]) * unit == pytest.approx(60, rel=1e-5)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".stl", ".glb", ".gltf"])
def test_files_are_read_back_into_the_scene(suffix: str, tmp_path: Path) -> None:
    expected = None
    for up in FORMATS[suffix].up:
        found = read_mesh(box(True).export(tmp_path / f"box{suffix}", up=up))[0].numpy()
        assert np.ptp(found, axis=0) == pytest.approx(np.array([0.4, 0.8, 1.2]) * 1.5, rel=1e-5)
        expected = found if expected is None else expected
        np.testing.assert_allclose(np.unique(found.round(4), axis=0), np.unique(expected.round(4), axis=0))


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
def test_gltf_has_a_plain_material_short_indices_and_targets(suffix: str, tmp_path: Path) -> None:
    for textured in (True, False):
        tree, data = glb_tree(box(textured).export(tmp_path / f"box{suffix}"))
        (material,), (shape,) = tree["materials"], tree["meshes"]
        surface = material["pbrMetallicRoughness"]
        assert (surface["metallicFactor"], surface["roughnessFactor"]) == (0, 1)
        assert ("baseColorTexture" in surface) == textured and "baseColorFactor" not in surface
        (primitive,) = shape["primitives"]
        assert primitive["material"] == 0 and ("COLOR_0" in primitive["attributes"]) != textured
        indices = tree["accessors"][primitive["indices"]]
        assert indices["componentType"] == 5123
        targets = [tree["bufferViews"][tree["accessors"][i]["bufferView"]]["target"] for i in range(4)]
        assert targets == [34962, 34962, 34962, 34963]
        assert all(view["byteOffset"] % 4 == 0 for view in tree["bufferViews"])
        assert tree["buffers"][0]["byteLength"] == len(data)
        if not textured:
            color = tree["accessors"][primitive["attributes"]["COLOR_0"]]
            assert (color["componentType"], color["normalized"], color["type"]) == (5123, True, "VEC4")
            start = tree["bufferViews"][color["bufferView"]]["byteOffset"]
            red, _, blue, alpha = np.frombuffer(data, "<u2", 4, start) / 65535
            assert red == pytest.approx(LINEAR_RED, abs=1e-4) and blue == alpha == 1


def test_indices_grow_with_the_vertices(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(7)
    vertices = np.asarray(ball.vertices, np.float32)
    for count, kind in ((0xFFFF, 5123), (0x10000, 5125)):
        mesh = Mesh(vertices[:count], np.array([[0, 1, count - 1]]), vertices[:count], np.abs(vertices[:count]))
        tree, _ = glb_tree(mesh.export(tmp_path / "ball.glb"))
        assert tree["accessors"][tree["meshes"][0]["primitives"][0]["indices"]]["componentType"] == kind


def test_every_format_that_can_says_what_made_it(tmp_path: Path) -> None:
    for suffix in (".glb", ".gltf"):
        asset = glb_tree(box(True).export(tmp_path / f"box{suffix}"))[0]["asset"]
        assert {**asset["extras"], "generator": None} == {**METADATA, "generator": None}
        assert re.fullmatch(r"prd \S+", asset["extras"]["generator"]) and asset["version"] == "2.0"
    with zipfile.ZipFile(box(True).export(tmp_path / "box.3mf")) as archive:
        root = ElementTree.fromstring(archive.read("3D/3dmodel.model"))
    said = {node.get("name"): node.text for node in root.iter() if node.tag.endswith("metadata")}
    assert said["Title"] == METADATA["prompt"] and said["LicenseTerms"] == "apache-2.0"
    bare = glb_tree(replace(box(True), metadata={}).export(tmp_path / "bare.glb"))[0]["asset"]["extras"]
    assert list(bare) == ["generator"]


def test_webp_holds_the_same_picture(tmp_path: Path) -> None:
    mesh = box(True)
    tree, data = glb_tree(mesh.export(tmp_path / "box.glb", picture="webp"))
    assert tree["extensionsUsed"] == tree["extensionsRequired"] == ["EXT_texture_webp"]
    view = tree["bufferViews"][tree["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(data[view["byteOffset"] :][: view["byteLength"]]))
    assert picture.format == "WEBP"
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), mesh.texture)


def test_levels_of_detail_are_named_meshes_of_one_file(tmp_path: Path) -> None:
    mesh = replace(box(True), lods=(box(False), box(True)))
    tree, _ = glb_tree(mesh.export(tmp_path / "box.glb"))
    assert [shape["name"] for shape in tree["meshes"]] == ["lod0", "lod1", "lod2"]
    assert tree["scenes"] == [{"nodes": [0]}]
    assert tree["nodes"][0]["extensions"]["MSFT_lod"]["ids"] == [1, 2]
    assert len(tree["nodes"][0]["extras"]["MSFT_screencoverage"]) == 3
    with pytest.raises(ValueError, match=r"lods=3: \.stl holds one mesh; write a \.glb or \.gltf, or take lods=1"):
        mesh.export(tmp_path / "box.stl")
    assert [path.name for path in tmp_path.iterdir()] == ["box.glb"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.glb", {"up": "z"}, r"up='z': a \.glb is \+Y up; leave it out"),
        ("a.3mf", {"up": "y"}, r"up='y': a \.3mf is \+Z up; leave it out"),
        ("a.ply", {"up": "x"}, "up='x': must be one of 'y', 'z'"),
        ("a.stl", {"height": "60"}, "height='60': must be 0.01mm to 1000m, a number and mm, cm, m or in, as 60mm"),
        ("a.stl", {"height": 60}, "height=60: must be"),
        ("a.stl", {"height": "0mm"}, "height='0mm': must be"),
        ("a.stl", {"height": "-6cm"}, "height='-6cm': must be"),
        ("a.stl", {"height": "1e99m"}, "height='1e99m': must be"),
        ("a.stl", {"height": "9" * 400 + "m"}, "must be 0.01mm to 1000m"),
        ("a.glb", {"picture": "jpeg"}, "picture='jpeg': must be one of 'png', 'webp'"),
        ("a.obj", {"picture": "webp"}, r"picture='webp': \.obj takes none but png"),
        ("a.glb", {"compress": "zip"}, "compress='zip': must be one of 'draco'"),
        (
            "a.stl",
            {"compress": "draco"},
            r"compress='draco': a \.stl is not compressed; leave it out, or write a \.glb",
        ),
    ],
)
def test_what_a_format_does_not_have_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        box(True).export(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_usdz_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pxr" else find(name))
    with pytest.raises(ValueError, match=r"\.usdz needs usd-core, which is not installed; pip install 'prd-3d\[usd\]'"):
        box(True).export(tmp_path / "a.usdz")


def test_draco_without_its_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "DracoPy" else find(name))
    with pytest.raises(ValueError, match=r"needs DracoPy, which is not installed; pip install 'prd-3d\[draco\]'"):
        box(True).export(tmp_path / "a.glb", compress="draco")


@pytest.mark.parametrize("textured", [True, False], ids=["texture", "vertex colours"])
@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
def test_draco_holds_the_same_mesh(suffix: str, textured: bool, tmp_path: Path) -> None:
    draco = pytest.importorskip("DracoPy", reason="DracoPy is not installed")
    mesh = box(textured)
    tree, data = glb_tree(mesh.export(tmp_path / f"box{suffix}", compress="draco"))
    name = "KHR_draco_mesh_compression"
    assert tree["extensionsUsed"] == tree["extensionsRequired"] == [name]
    (primitive,) = tree["meshes"][0]["primitives"]
    packed = primitive["extensions"][name]
    view = tree["bufferViews"][packed["bufferView"]]
    found = draco.decode(data[view["byteOffset"] :][: view["byteLength"]])
    by_id = {attribute["unique_id"]: np.asarray(attribute["data"]) for attribute in found.attributes}
    assert packed["attributes"].keys() == primitive["attributes"].keys()
    for attribute, number in packed["attributes"].items():
        accessor = tree["accessors"][primitive["attributes"][attribute]]
        assert accessor["count"] == len(by_id[number]) and "bufferView" not in accessor
    indices = tree["accessors"][primitive["indices"]]
    assert indices["count"] == found.faces.size == mesh.faces.size
    shape = trimesh.Trimesh(by_id[packed["attributes"]["POSITION"]], found.faces)
    shape.merge_vertices(merge_tex=True, merge_norm=True)
    assert shape.is_watertight and shape.volume == pytest.approx(0.4 * 0.8 * 1.2, rel=1e-3)
    if not textured:
        assert np.abs(by_id[packed["attributes"]["COLOR_0"]][0] / 65535 - [LINEAR_RED, 0.214, 1, 1]).max() < 1e-3


@pytest.mark.parametrize(("text", "millimetres"), [("60mm", 60), ("6 cm", 60), (".5in", 12.7), ("0.06m", 60)])
def test_lengths(text: str, millimetres: float) -> None:
    assert parse_length("height", text) == pytest.approx(millimetres)
