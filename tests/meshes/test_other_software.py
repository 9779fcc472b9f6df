"""What other software says of our files: the Khronos validator of glTF, and pymeshlab. Skipped where they are absent.

`tests/other_software.py` says where gltf-validator is looked for; `pip install pymeshlab`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prd.meshes.mesh import Mesh, extract_mesh
from prd.toybox.world import ExactField
from tests.other_software import gltf_issues

pytestmark = pytest.mark.slow

METADATA = {"prompt": "a mug", "seed": 0, "model": "toybox", "licence": "apache-2.0"}


@pytest.fixture(scope="module")
def mug() -> Mesh:
    (mesh,) = extract_mesh(ExactField(["a red mug"]), isosurface_resolution=64, target_faces=3000, lods=3)
    assert mesh is not None
    return replace(mesh, metadata=METADATA)


def bare(mesh: Mesh) -> Mesh:
    return replace(mesh, uv=None, texture=None)


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
@pytest.mark.parametrize("kind", ["texture", "webp", "vertex colours", "levels"])
def test_the_khronos_validator_has_nothing_to_say(kind: str, suffix: str, mug: Mesh, tmp_path: Path) -> None:
    mesh = mug if kind == "levels" else replace(mug, lods=())
    mesh = bare(mesh) if kind == "vertex colours" else mesh
    path = mesh.export(tmp_path / f"mug{suffix}", picture="webp" if kind == "webp" else "png")
    issues = gltf_issues(path)
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl", ".3mf", ".glb"])
@pytest.mark.parametrize("textured", [True, False], ids=["texture", "vertex colours"])
def test_pymeshlab_finds_no_open_edge(textured: bool, suffix: str, mug: Mesh, tmp_path: Path) -> None:
    pymeshlab = pytest.importorskip("pymeshlab", reason="needs pymeshlab")
    mesh = replace(mug if textured else bare(mug), lods=())
    meshes = pymeshlab.MeshSet()
    meshes.load_new_mesh(str(mesh.export(tmp_path / f"mug{suffix}")))
    if suffix in (".stl", ".glb"):  # whose triangles or charts have vertices of their own
        meshes.meshing_remove_duplicate_vertices()
    found = meshes.get_topological_measures()
    assert (found["boundary_edges"], found["non_two_manifold_edges"], found["genus"]) == (0, 0, 1)
