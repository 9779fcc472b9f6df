"""A field's surface becomes a closed, coloured, upright file that other software reads back."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from prd.fields.protocol import AutogradGradient
from prd.isosurface.extract import EmptySurfaceError
from prd.meshes.export import srgb_to_linear
from prd.meshes.mesh import Mesh, build_mesh, extract_mesh
from prd.meshes.options import MeshKeywords, MeshOptions, mesh_options
from prd.meshes.simplify import clean, decimate, weld

RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.8)


class Halves(AutogradGradient):
    """A sphere of radius 0.6: red where `axis` is positive, blue elsewhere."""

    def __init__(self, *axes: int) -> None:
        self.axes = axes  # one a sample

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - 0.6

    def rgb(self, points: Tensor) -> Tensor:
        positive = torch.stack([points[b, :, a] > 0 for b, a in enumerate(self.axes)])[..., None]
        return torch.where(positive, points.new_tensor(RED), points.new_tensor(BLUE))


class Stack(AutogradGradient):
    """A red sphere on a blue box that reaches further forward (+X) than back; it stands at z = -0.7."""

    def parts(self, points: Tensor) -> tuple[Tensor, Tensor]:
        outside = (points - points.new_tensor([0.1, 0.0, -0.4])).abs() - points.new_tensor([0.5, 0.35, 0.3])
        box = outside.clamp(min=0).norm(dim=-1, keepdim=True) + outside.amax(-1, keepdim=True).clamp(max=0)
        return (points - points.new_tensor([0.0, 0.0, 0.2])).norm(dim=-1, keepdim=True) - 0.35, box

    def sdf(self, points: Tensor) -> Tensor:
        return torch.minimum(*self.parts(points))

    def rgb(self, points: Tensor) -> Tensor:
        ball, box = self.parts(points)
        return torch.where(ball < box, points.new_tensor(RED), points.new_tensor(BLUE))


def surface(mesh: trimesh.Trimesh) -> tuple[Tensor, Tensor]:
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(np.array(mesh.faces))


def sphere(subdivisions: int = 4, radius: float = 0.6, at: tuple[float, float, float] = (0, 0, 0)) -> trimesh.Trimesh:
    out = trimesh.creation.icosphere(subdivisions, radius)
    out.apply_translation(at)
    return out


def sample(mesh: trimesh.Trimesh, per_face: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random points [N, 3] of a loaded, textured mesh and their colours [N, 3] in [0, 1], read through its uv."""
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), size=(len(mesh.faces), per_face))
    points = np.einsum("fpk,fkx->fpx", weights, mesh.vertices[mesh.faces]).reshape(-1, 3)
    uv = np.einsum("fpk,fkc->fpc", weights, mesh.visual.uv[mesh.faces]).reshape(-1, 2)
    material = mesh.visual.material
    picture = material.baseColorTexture if hasattr(material, "baseColorTexture") else material.image
    return points, trimesh.visual.color.uv_to_color(uv, picture)[:, :3] / 255


@pytest.fixture(scope="module")
def textured() -> Mesh:
    """Front half (+X) red, back half blue, so that a turned export is seen."""
    return build_mesh(Halves(0), surface(sphere()), target_faces=2000, texture_size=256)


def test_a_mesh_prints_as_one_line(textured: Mesh) -> None:
    sizes = f"vertices={len(textured.vertices)}, faces={len(textured.faces)}"
    assert repr(textured) == f"Mesh({sizes}, texture=256x256)"
    assert repr(replace(textured, uv=None, texture=None)) == f"Mesh({sizes}, texture=None)"


def test_textured_mesh_is_closed_in_spite_of_its_cuts(textured: Mesh) -> None:
    assert len(textured.faces) == pytest.approx(2000, rel=0.05)
    assert len(textured.vertices) > len(textured.faces) // 2 + 2  # Euler: a cut surface has more
    assert textured.is_watertight and textured.euler_number == 2
    assert textured.volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.02)
    outward = (textured.vertices * textured.vertex_normals).sum(1) / 0.6
    assert outward.min() > 0.97
    assert textured.texture is not None and textured.texture.shape == (256, 256, 3)


@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_y_up_files_open_upright_front_forward_in_colour(textured: Mesh, tmp_path: Path, suffix: str) -> None:
    loaded = trimesh.load(textured.export(tmp_path / f"ball{suffix}"), force="mesh", process=False)
    closed = trimesh.Trimesh(loaded.vertices, loaded.faces, process=False)
    closed.merge_vertices()
    assert closed.is_watertight and closed.volume > 0 and closed.body_count == 1
    points, colors = sample(loaded)
    clear = np.abs(points[:, 2]) > 0.03  # the scene's front +X is the file's +Z; two texels are 0.02
    np.testing.assert_allclose(colors[clear], np.where(points[clear, 2:] > 0, RED, BLUE), atol=0.51 / 255)


def test_a_stack_of_two_colours_from_field_to_file(tmp_path: Path) -> None:
    (mesh,) = extract_mesh(Stack(), isosurface_resolution=64, target_faces=4000, texture_size=512)
    loaded = trimesh.load(mesh.export(tmp_path / "stack.glb"), force="mesh", process=False)
    closed = trimesh.Trimesh(loaded.vertices, loaded.faces, process=False)
    closed.merge_vertices()
    assert closed.is_watertight and closed.body_count == 1 and closed.euler_number == 2
    # x of the file is the scene's y, its y (up) the scene's z, its z (front) the scene's x
    np.testing.assert_allclose(closed.bounds, [[-0.35, -0.7, -0.4], [0.35, 0.55, 0.6]], atol=0.02)
    assert closed.volume == pytest.approx(1.0 * 0.7 * 0.6 + 4 / 3 * np.pi * 0.35**3, rel=0.04)  # they overlap a little
    points, colors = sample(loaded)
    ball, box = Stack().parts(torch.tensor(points[:, [2, 0, 1]]))
    clear = (ball - box).abs()[:, 0].numpy() > 0.03
    np.testing.assert_allclose(colors[clear], np.where((ball < box).numpy(), RED, BLUE)[clear], atol=0.51 / 255)
    assert (colors[points[:, 1] > 0][:, 0] > 0.8).all()  # red is up


def test_a_box_on_the_nodes_of_the_grid_closes() -> None:
    class Box(Halves):
        def sdf(self, points: Tensor) -> Tensor:
            return (points.abs() - 0.5).amax(-1, keepdim=True)  # zero on whole layers of nodes

    (mesh,) = extract_mesh(Box(0), isosurface_resolution=65, target_faces=None, texture_size=None)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(1, rel=0.01)  # marching cubes bevels the edges


def test_a_field_without_surface_is_an_error() -> None:
    class Nothing(Halves):
        def sdf(self, points: Tensor) -> Tensor:
            return points.norm(dim=-1, keepdim=True) + 0.1

    with pytest.raises(EmptySurfaceError):
        extract_mesh(Nothing(0), isosurface_resolution=16)
    assert extract_mesh(Nothing(0), isosurface_resolution=16, on_empty="flag") == [None]


def test_axes_of_each_format(tmp_path: Path) -> None:
    box = trimesh.creation.box(extents=(0.4, 0.8, 1.2))  # depth along X, width along Y, height along Z
    box.apply_translation((0.3, 0.2, 0.1))
    mesh = build_mesh(Halves(0), surface(box), texture_size=None)
    scene = np.array([[0.1, -0.2, -0.5], [0.5, 0.6, 0.7]])
    for suffix, axes in ((".glb", [1, 2, 0]), (".obj", [1, 2, 0]), (".ply", [1, 2, 0])):
        loaded = trimesh.load(mesh.export(tmp_path / f"box{suffix}"), force="mesh")
        np.testing.assert_allclose(loaded.bounds, scene[:, axes], atol=1e-5)
        assert loaded.volume == pytest.approx(0.4 * 0.8 * 1.2, rel=1e-4)  # positive: the winding survives


def test_glb_material_is_plain_and_vertex_colours_do_not_tint_it(textured: Mesh, tmp_path: Path) -> None:
    loaded = trimesh.load(textured.export(tmp_path / "ball.glb"), force="mesh", process=False)
    material = loaded.visual.material
    assert (material.metallicFactor, material.roughnessFactor) == (0.0, 1.0)
    assert material.baseColorFactor is None or tuple(material.baseColorFactor) == (255, 255, 255, 255)
    np.testing.assert_array_equal(np.asarray(material.baseColorTexture.convert("RGB")), textured.texture)
    assert b'"COLOR_0"' not in (tmp_path / "ball.glb").read_bytes()
    (shape,) = trimesh.load(tmp_path / "ball.glb", process=False).geometry.values()  # as written, not recomputed
    np.testing.assert_allclose(shape.vertex_normals, textured.vertex_normals[:, [1, 2, 0]], atol=1e-5)


def test_vertex_colours_are_linear_in_glb_and_srgb_elsewhere(tmp_path: Path) -> None:
    mesh = build_mesh(Halves(0), surface(sphere(2)), texture_size=None)
    assert mesh.texture is None
    mesh = replace(mesh, vertex_colors=np.where(mesh.vertices[:, :1] > 0, RED, BLUE).astype(np.float32))
    srgb = np.unique(np.round(np.array([RED, BLUE]) * 255).astype(int), axis=0)
    for suffix in (".obj", ".ply"):
        loaded = trimesh.load(mesh.export(tmp_path / f"ball{suffix}"), force="mesh")
        np.testing.assert_array_equal(np.unique(loaded.visual.vertex_colors[:, :3], axis=0), srgb)
    (loaded,) = trimesh.load(mesh.export(tmp_path / "ball.glb")).geometry.values()
    found = np.unique(loaded.visual.vertex_attributes["color"][:, :3], axis=0)
    np.testing.assert_allclose(found / 65535, np.unique(srgb_to_linear(np.array([RED, BLUE])), axis=0), atol=1e-5)
    assert srgb_to_linear(np.array([0.5])) == pytest.approx(0.21404, abs=1e-5)


def test_ply_of_a_textured_mesh_is_welded(textured: Mesh, tmp_path: Path) -> None:
    loaded = trimesh.load(textured.export(tmp_path / "ball.ply"), process=False)
    assert loaded.is_watertight and len(loaded.vertices) < len(textured.vertices)


def test_obj_brings_its_picture(textured: Mesh, tmp_path: Path) -> None:
    textured.export(tmp_path / "ball.obj")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.mtl", "ball.obj", "ball.png"]  # nothing left aside
    assert "map_Kd ball.png" in (tmp_path / "ball.mtl").read_text(encoding="utf-8")
    assert "Kd 1.0" in (tmp_path / "ball.mtl").read_text(encoding="utf-8")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "ball.png").convert("RGB")), textured.texture)


def test_samples_of_a_batch_keep_their_own_colours() -> None:
    options = MeshOptions(isosurface_resolution=33, target_faces=None, texture_size=None)
    for mesh, axis in zip(extract_mesh(Halves(0, 2), options, batch=2), (0, 2), strict=True):
        assert mesh is not None
        clear = np.abs(mesh.vertices[:, axis]) > 1e-3
        red = mesh.vertex_colors[clear, 0] > 0.5
        np.testing.assert_array_equal(red, mesh.vertices[clear, axis] > 0)


def test_coarse_to_fine_gives_the_mesh_of_a_thick_shape() -> None:
    options = MeshOptions(isosurface_resolution=41, target_faces=None, texture_size=None)
    (whole,), (near,) = extract_mesh(Stack(), options), extract_mesh(Stack(), options, coarse_factor=4)
    assert whole is not None and near is not None
    np.testing.assert_array_equal(whole.faces, near.faces)
    np.testing.assert_allclose(whole.vertices, near.vertices, atol=1e-5)


def test_floating_pieces_cavities_and_inward_winding_are_cleaned() -> None:
    cavity = sphere(3, 0.2)
    cavity.invert()
    near, dust = sphere(2, 0.15, (0.9, 0, 0)), sphere(1, 0.03, (0, 0.9, 0))
    scene = trimesh.util.concatenate([dust, sphere(4), cavity, near])
    vertices, faces = np.asarray(scene.vertices, np.float32), np.asarray(scene.faces)
    outer = clean(vertices, faces[:, ::-1], "largest")  # turned inside out: comes back outward
    assert len(outer[1]) == len(sphere(4).faces)
    assert trimesh.Trimesh(*outer).volume == pytest.approx(sphere(4).volume, rel=1e-3)
    everything = trimesh.Trimesh(*clean(vertices, faces, "all"))
    assert everything.body_count == 2  # all but the dust, and the cavity, which nobody sees
    assert everything.volume == pytest.approx(sphere(4).volume + near.volume, rel=1e-3)


def test_weld_closes_a_soup_and_drops_what_collapses() -> None:
    ball = sphere(2)
    soup = np.asarray(ball.vertices[ball.faces.ravel()], np.float32)
    faces = np.arange(len(soup)).reshape(-1, 3)
    soup = np.concatenate([soup, soup[:1] + 1e-8, soup[:1] - 1e-8])
    sliver = [[0, len(soup) - 1, len(soup) - 2]]
    back_to_back = [[1, 5, 8], [5, 1, 8]]
    vertices, welded, first = weld(soup, np.concatenate([faces, sliver, back_to_back]))
    assert len(vertices) == len(ball.vertices) and len(welded) == len(ball.faces)
    assert trimesh.Trimesh(vertices, welded, process=False).is_watertight
    np.testing.assert_allclose(soup[first], vertices, atol=1e-6)


def test_decimation_keeps_the_hole_of_a_torus() -> None:
    torus = trimesh.creation.torus(0.6, 0.15, major_sections=96, minor_sections=32)
    vertices, faces = np.asarray(torus.vertices, np.float32), np.asarray(torus.faces)
    for target in (800, 8):  # the second is impossible: it must stop short, still a torus
        out = trimesh.Trimesh(*decimate(vertices, faces, target), process=False)
        assert out.is_watertight and out.euler_number == 0 and len(out.faces) < len(faces) // 2
    assert len(trimesh.Trimesh(*decimate(vertices, faces, 800), process=False).faces) == pytest.approx(800, rel=0.05)


def test_bad_arguments_are_named(textured: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.fbx.*\.glb, \.obj, \.ply"):
        textured.export(tmp_path / "ball.fbx")
    with pytest.raises(ValueError, match="nowhere is not there; make it first"):
        textured.export(tmp_path / "nowhere" / "ball.glb")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="faces"):
        Mesh(textured.vertices[:3], textured.faces[:1] * 0 + 7, textured.vertices[:3], textured.vertices[:3])


def test_colours_that_are_not_numbers_are_refused() -> None:
    class Broken(Halves):
        def rgb(self, points: Tensor) -> Tensor:
            return super().rgb(points) * float("nan")

    with pytest.raises(ValueError, match=r"field\.rgb"):
        build_mesh(Broken(0), surface(sphere(1)))


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("isosurface_resolution", 1, "in 2..2048"),
        ("isosurface_resolution", 24.0, "an integer"),
        ("target_faces", 3, "of at least 4, or None"),
        ("target_faces", True, "an integer"),
        ("texture_size", 15, "in 16..8192, or None"),
        ("texture_size", 8193, "in 16..8192, or None"),
        ("keep", "biggest", "'all', 'largest'"),
        ("on_empty", "skip", "'raise', 'flag'"),
        ("coarse_factor", 160, "in 2..159, or None"),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_computed(name: str, value: object, allowed: str) -> None:
    for make in (MeshOptions, partial(extract_mesh, None), partial(build_mesh, None, None)):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: must be ")) as error:
            make(**{name: value})
        assert allowed in str(error.value)
    with pytest.raises(TypeError, match="options=32: must be MeshOptions; give one by its name"):
        extract_mesh(Halves(0), 32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="resolution=: is no option of a mesh; there are isosurface_resolution, "):
        extract_mesh(Halves(0), resolution=32)  # type: ignore[call-arg]


def test_keywords_and_options_are_the_same_names_and_types() -> None:
    assert get_type_hints(MeshKeywords) == get_type_hints(MeshOptions)
    options = MeshOptions(keep="largest")
    assert mesh_options(options, {"texture_size": None}) == MeshOptions(keep="largest", texture_size=None)
    assert mesh_options(None, {}) == MeshOptions()
