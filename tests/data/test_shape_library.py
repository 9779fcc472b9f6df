"""Shape libraries: the toy box's, a folder of meshes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from prd.cameras import orbit_cameras
from prd.data.shape_library import LibraryConfig, LibraryError, MeshLibrary, Shapes, WorldLibrary, open_library
from prd.generators.latte3d import Latte3dModel
from prd.meshes.read import UnreadableMesh, read_mesh, sample_points
from prd.toybox.benchmark import ToyBox
from prd.toybox.world import ExactField
from tests.generators.tiny_single_pass import LATTE3D


def embed(texts):
    """Captions as counts of their letters."""
    return torch.tensor([[float(text.count(letter)) for letter in "abcdefghijklmnop"] for text in texts])


def write(folder: Path, *rows: dict) -> Path:
    folder.mkdir(exist_ok=True)
    trimesh.creation.box((2.0, 1.0, 1.0)).export(folder / "box.ply")
    trimesh.creation.icosphere(subdivisions=2).export(folder / "ball.glb")
    default = [{"file": "box.ply", "captions": ["a box", "a chest"]}, {"file": "ball.glb", "captions": ["a ball"]}]
    (folder / "library.jsonl").write_text("\n".join(json.dumps(row) for row in rows or default), encoding="utf-8")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("caption", ["a green mug", "a red torus on a blue cylinder", "a red torus on a green cube"])
def test_the_toy_shapes_are_the_exact_ones(caption: str) -> None:
    vertices, faces = WorldLibrary(ToyBox()).mesh(caption)
    cloud = sample_points((vertices, faces), 300, torch.Generator().manual_seed(0))
    assert ExactField([caption]).sdf(cloud[None]).abs().max() < 0.04
    with pytest.raises(ValueError, match="caption='a chair': the toy box knows"):
        WorldLibrary(ToyBox()).mesh("a chair")


def test_points_are_even_over_the_surface() -> None:
    box = trimesh.creation.box((2.0, 1.0, 1.0))  # the long sides have 8 of its 10 units of area
    mesh = (torch.tensor(np.asarray(box.vertices), dtype=torch.float32), torch.tensor(np.asarray(box.faces)))
    points = sample_points(mesh, 4000, torch.Generator().manual_seed(1))
    ends = (points[:, 0].abs() > 0.999).float().mean()
    assert float(ends) == pytest.approx(0.2, abs=0.03)
    again = sample_points(mesh, 4000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again, points, rtol=0, atol=1e-6)


def test_a_prompt_has_its_captions_shape_or_the_nearest(tmp_path: Path) -> None:
    library = MeshLibrary(write(tmp_path / "shapes"), embed)
    box, ball = library.mesh("a box")[0], library.mesh("a ball")[0]
    assert torch.equal(library.mesh("a chest")[0], box) and len(ball) > len(box)
    assert library.nearest("a bll") == "a ball" and library.nearest("chests of a") == "a chest"
    assert (box.abs().amax(dim=0) - torch.tensor([0.9, 0.45, 0.45])).abs().max() < 1e-5  # scaled into the cube


def test_glb_files_are_turned_upright(tmp_path: Path) -> None:
    from prd.meshes.mesh import extract_mesh

    (mesh,) = extract_mesh(ExactField(["a red arrow"]), isosurface_resolution=40, texture_size=None)
    mesh.export(tmp_path / "arrow.glb")
    vertices, _ = read_mesh(tmp_path / "arrow.glb")
    size = 2 * 0.9 / float(np.ptp(mesh.vertices, axis=0).max())
    centre = (mesh.vertices.max(axis=0) + mesh.vertices.min(axis=0)) / 2
    expected = (mesh.vertices - centre) * size
    for axis in range(3):
        assert float(vertices[:, axis].max()) == pytest.approx(expected[:, axis].max(), abs=1e-3)
        assert float(vertices[:, axis].mean()) == pytest.approx(expected[:, axis].mean(), abs=1e-2)


def test_masks_and_normals_are_those_of_the_exact_field() -> None:
    from tests.rendering.made import volume_renderer

    cameras = orbit_cameras(torch.full((1, 2), 20.0), torch.tensor([[30.0, 200.0]]), 2.4, 50.0)
    mesh = WorldLibrary(ToyBox()).mesh("a red wedge")
    views = Shapes([mesh], torch.zeros(1, 1, 3)).views(cameras, 32, 32)
    with torch.no_grad():
        exact = volume_renderer(num_samples=128, inv_std=400.0)(
            ExactField(["a red wedge"]), cameras, height=32, width=32
        )
    assert (views.opacity - exact.opacity).abs().mean() < 0.02
    assert (views.normal - exact.normal).abs().mean() < 0.03
    assert (views.disparity - exact.disparity).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "box.ply"}], r"line 1: must be \{\"file\": ..., \"captions\": \[...\]\}"),
        ([{"file": "box.ply", "captions": []}], r"line 1: captions=\[\]: must be texts"),
        ([{"file": "no.ply", "captions": ["a"]}], "line 1: .*no.ply is not there"),
    ],
)
def test_a_wrong_index_names_its_line(tmp_path: Path, rows, message: str) -> None:
    with pytest.raises(LibraryError, match=message):
        MeshLibrary(write(tmp_path / "shapes", *rows), embed)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="holds no library.jsonl"):
        MeshLibrary(tmp_path, embed)
    (tmp_path / "library.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(LibraryError, match="lists no shape"):
        MeshLibrary(tmp_path, embed)
    (tmp_path / "a.ply").write_text("not a mesh", encoding="utf-8")
    with pytest.raises(UnreadableMesh, match=r"a\.ply: cannot be read as a mesh|a\.ply: holds no triangles"):
        read_mesh(tmp_path / "a.ply")
    trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False).export(tmp_path / "line.ply")
    with pytest.raises(UnreadableMesh, match=r"line\.ply: holds no triangles with an area"):
        read_mesh(tmp_path / "line.ply")
    config = LibraryConfig(source="toybox")
    with pytest.raises(LibraryError, match="library.source='toybox': this model takes no shapes"):
        open_library(config, None, object())
    assert isinstance(open_library(config, None, Latte3dModel(LATTE3D)), WorldLibrary)
    assert open_library(replace(config, source=None), None, object()) is None
