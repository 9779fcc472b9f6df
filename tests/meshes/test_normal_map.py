"""Normal maps bring back what simplifying took, in the frame that glTF's readers use; materials in every format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from prd.fields.protocol import AutogradGradient
from prd.meshes.mesh import Mesh, build_mesh
from prd.meshes.normals import in_tangent_space, tangents
from prd.meshes.options import MeshOptions

FLAT = (128, 128, 255)


class Plain(AutogradGradient):
    """A field of one colour; its surface is given."""

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - 0.6

    def rgb(self, points: Tensor) -> Tensor:
        return torch.full_like(points, 0.5)


def built(shape: trimesh.Trimesh, **options: Any) -> Mesh:
    surface = torch.tensor(shape.vertices, dtype=torch.float32), torch.tensor(np.array(shape.faces))
    return build_mesh(Plain(), surface, texture_size=256, normal_map=True, **options)


@pytest.fixture(scope="module")
def ball() -> Mesh:
    """A sphere of 20,480 triangles with 300 left."""
    return built(trimesh.creation.icosphere(5, 0.6), target_faces=300)


def shown(mesh: Mesh, per_face: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [N, 3], the normals there without the map, and with it, as a viewer of glTF makes them."""
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), (len(mesh.faces), per_face))

    def between(values: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.einsum("fpk,fkx->fpx", weights, values[mesh.faces]).reshape(-1, values.shape[1])
        return out

    assert mesh.uv is not None and mesh.normal_map is not None
    along = between(tangents(mesh.vertices, mesh.faces, mesh.vertex_normals, mesh.uv))
    normal = between(mesh.vertex_normals)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    map_ = trimesh.visual.color.uv_to_color(between(mesh.uv), Image.fromarray(mesh.normal_map))[:, :3]
    local = map_ / 255 * 2 - 1
    mapped = local[:, :1] * along + local[:, 1:2] * np.cross(normal, along) + local[:, 2:] * normal
    return between(mesh.vertices), normal, mapped / np.linalg.norm(mapped, axis=1, keepdims=True)


def test_a_map_gives_the_normals_of_the_sphere_that_was_simplified(ball: Mesh) -> None:
    points, plain, mapped = shown(ball)
    exact = points / np.linalg.norm(points, axis=1, keepdims=True)
    degrees = [np.degrees(np.arccos((found * exact).sum(axis=1).clip(-1, 1))) for found in (plain, mapped)]
    assert degrees[1].mean() < 0.6 * degrees[0].mean() and degrees[1].mean() < 1.0


def test_a_flat_side_is_flat_in_the_map() -> None:
    box = trimesh.creation.box(extents=(1.0, 0.8, 0.6))
    for _ in range(4):
        box = box.subdivide()
    mesh = built(box, target_faces=None)
    assert mesh.normal_map is not None
    values, counts = np.unique(mesh.normal_map.reshape(-1, 3), axis=0, return_counts=True)
    assert tuple(values[counts.argmax()]) == FLAT and counts.max() > 0.6 * counts.sum()


def test_tangents_run_along_u_across_the_normal(ball: Mesh) -> None:
    assert ball.uv is not None
    found = tangents(ball.vertices, ball.faces, ball.vertex_normals, ball.uv)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose((found * ball.vertex_normals).sum(axis=1), 0, atol=1e-5)
    corners, uv = ball.vertices[ball.faces].astype(float), ball.uv[ball.faces].astype(float)
    edges = np.stack([corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]], axis=1)
    steps = np.stack([uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]], axis=1)
    right = np.linalg.solve(steps, edges)[:, 0]  # dP/du
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    assert np.quantile((found[ball.faces].mean(axis=1) * right).sum(axis=1), 0.05) > 0.9


def test_directions_come_back_from_any_frame() -> None:
    draw = np.random.default_rng(0)
    normal, along, fine = (draw.normal(size=(200, 3)).astype(np.float32) for _ in range(3))
    fine = np.abs(fine) * np.sign(normal)
    fine /= np.linalg.norm(fine, axis=1, keepdims=True)
    local = in_tangent_space(fine.astype(np.float64), normal, along) * 2 - 1
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (normal, along)]
    back = local[:, :1] * unit[1] + local[:, 1:2] * np.cross(*unit) + local[:, 2:] * unit[0]
    clear = np.linalg.norm(np.cross(*unit), axis=1) > 0.2
    np.testing.assert_allclose((back / np.linalg.norm(back, axis=1, keepdims=True))[clear], fine[clear], atol=2e-3)


def glb_tree(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    tree: dict[str, Any] = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    return tree


def test_map_and_material_are_in_every_format_that_has_them(ball: Mesh, tmp_path: Path) -> None:
    mesh = replace(ball, metallic=0.25, roughness=0.5)
    tree = glb_tree(mesh.export(tmp_path / "ball.glb"))
    (material,) = tree["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0.25
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == 0.5
    assert material["normalTexture"]["index"] != material["pbrMetallicRoughness"]["baseColorTexture"]["index"]
    assert tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["TANGENT"]]["type"] == "VEC4"
    mesh.export(tmp_path / "ball.obj")
    lines = (tmp_path / "ball.mtl").read_text(encoding="utf-8").splitlines()
    assert {"Pm 0.250000", "Pr 0.500000", "norm ball_normal.png", "map_Bump ball_normal.png"} <= set(lines)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "ball_normal.png").convert("RGB")), mesh.normal_map)
    bare = replace(mesh, uv=None, texture=None, normal_map=None)
    surface = glb_tree(bare.export(tmp_path / "bare.glb"))["materials"][0]["pbrMetallicRoughness"]
    assert (surface["metallicFactor"], surface["roughnessFactor"]) == (0.25, 0.5)


def test_a_usdz_has_map_and_material(ball: Mesh, tmp_path: Path) -> None:
    pytest.importorskip("pxr", reason="usd-core is not installed")
    from pxr import Usd, UsdShade

    path = replace(ball, metallic=0.25, roughness=0.5).export(tmp_path / "ball.usdz")
    stage = Usd.Stage.Open(str(path))
    preview = UsdShade.Shader(stage.GetPrimAtPath("/object/surface/preview"))
    assert (preview.GetInput("metallic").Get(), preview.GetInput("roughness").Get()) == (0.25, 0.5)
    bumps = UsdShade.Shader(stage.GetPrimAtPath("/object/surface/bumps"))
    assert bumps.GetInput("sourceColorSpace").Get() == "raw" and preview.GetInput("normal").HasConnectedSource()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metallic": 1.5}, r"metallic=1.5: must be in 0\.\.1; 0 is no metal"),
        ({"roughness": -0.1}, r"roughness=-0.1: must be in 0\.\.1; 1 is matt"),
        ({"roughness": float("nan")}, "roughness=nan: must be in"),
        ({"metallic": True}, "metallic=True: must be in"),
        ({"metallic": "1"}, "metallic='1': must be in"),
        ({"normal_map": 1}, "normal_map=1: must be True or False"),
        ({"normal_map": True, "texture_size": None}, "normal_map=True: needs a texture to lie beside; leave it out"),
    ],
)
def test_what_a_material_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MeshOptions(**options)
