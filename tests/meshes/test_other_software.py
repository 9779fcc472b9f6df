"""What other software says of our files: glTF's validator, pymeshlab, PrusaSlicer, Blender. Skipped where absent.

`tests/other_software.py` says where gltf-validator is looked for. pymeshlab and bpy (Blender) are found in this
environment, or in those whose Python PRD_PYMESHLAB_PYTHON and PRD_BPY_PYTHON name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prd.fields.protocol import AutogradGradient
from prd.meshes.mesh import Mesh, extract_mesh
from prd.toybox.world import SHAPES, ExactField
from tests.other_software import gltf_issues

pytestmark = pytest.mark.slow

METADATA = {"prompt": "a mug", "seed": 0, "model": "toybox", "licence": "apache-2.0"}
GENUS = {"torus": 1, "mug": 1}  # of the toy box's shapes; 0 of the others
FRONT, TOP, REST = (0.9, 0.1, 0.2), (0.1, 0.8, 0.3), (0.3, 0.3, 0.3)
LOW, HIGH = (-0.35, -0.3, -0.7), (0.45, 0.1, 0.5)  # of the box below in Blender, +Z up, front -Y
needs_draco = pytest.mark.skipif(importlib.util.find_spec("DracoPy") is None, reason="needs DracoPy")


class Box(AutogradGradient):
    """A box of three colours: its front (+X), its top and the rest."""

    def inside(self, points: Tensor) -> Tensor:
        return points - points.new_tensor([0.1, 0.05, -0.1])

    def sdf(self, points: Tensor) -> Tensor:
        outside = self.inside(points).abs() - points.new_tensor([0.2, 0.4, 0.6])
        return outside.clamp(min=0).norm(dim=-1, keepdim=True) + outside.amax(-1, keepdim=True).clamp(max=0)

    def rgb(self, points: Tensor) -> Tensor:
        place = self.inside(points) / points.new_tensor([0.2, 0.4, 0.6])
        most = 0.999 * place.abs().amax(-1, keepdim=True)
        front = torch.where(place[..., :1] > most, points.new_tensor(FRONT), points.new_tensor(REST))
        return torch.where(place[..., 2:] > most, points.new_tensor(TOP), front)


@pytest.fixture(scope="module")
def mug() -> Mesh:
    (mesh,) = extract_mesh(
        ExactField(["a red mug"]), isosurface_resolution=64, target_faces=3000, lods=3, normal_map=True
    )
    assert mesh is not None
    return replace(mesh, metadata=METADATA)


def bare(mesh: Mesh) -> Mesh:
    return replace(mesh, uv=None, texture=None, normal_map=None)


def said(module: str, variable: str, script: str, paths: list[Path]) -> list[dict[str, Any]]:
    """Return what a script prints of files, run by the Python that has a module."""
    python = sys.executable if importlib.util.find_spec(module) else os.environ.get(variable)
    if python is None:
        pytest.skip(f"needs {module}; see the head of this file")
    command = [python, str(Path(__file__).with_name(script)), *map(str, paths)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout
    (line,) = [line for line in printed.splitlines() if line.startswith("SEEN")]
    found: list[dict[str, Any]] = json.loads(line.removeprefix("SEEN"))
    return found


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
@pytest.mark.parametrize("compress", [None, pytest.param("draco", marks=needs_draco)])
@pytest.mark.parametrize("kind", ["texture", "webp", "vertex colours", "levels"])
def test_the_khronos_validator_has_nothing_to_say(
    kind: str, compress: Any, suffix: str, mug: Mesh, tmp_path: Path
) -> None:
    """It reads no more of compressed geometry than the accessors."""
    mesh = mug if kind == "levels" else replace(mug, lods=())
    mesh = bare(mesh) if kind == "vertex colours" else mesh
    picture: Any = "webp" if kind == "webp" else "png"
    issues = gltf_issues(mesh.export(tmp_path / f"mug{suffix}", picture=picture, compress=compress))
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, int]:
    """Every shape of the toy box in every format, with a texture and without, and its genus."""
    folder, files = tmp_path_factory.mktemp("toys"), {}
    for shape in SHAPES:
        (mesh,) = extract_mesh(ExactField([f"a red {shape}"]), isosurface_resolution=48, target_faces=1500)
        assert mesh is not None
        for suffix in (".obj", ".ply", ".stl", ".3mf", ".glb", ".gltf"):
            for kind, made in (("texture", mesh), ("colours", bare(mesh))):
                files[made.export(folder / f"{shape}_{kind}{suffix}")] = GENUS.get(shape, 0)
    return files


def test_pymeshlab_finds_no_open_edge(toys: dict[Path, int]) -> None:
    found = said("pymeshlab", "PRD_PYMESHLAB_PYTHON", "in_pymeshlab.py", list(toys))
    for (path, genus), topology in zip(toys.items(), found, strict=True):
        expected = {"boundary_edges": 0, "non_two_manifold_edges": 0, "genus": genus}
        assert topology == expected, path.name


def test_a_slicer_finds_no_open_edge(toys: dict[Path, int]) -> None:
    slicer = shutil.which("prusa-slicer")
    if slicer is None:
        pytest.skip("needs prusa-slicer")
    printed = [path for path in toys if path.suffix in (".obj", ".stl", ".3mf")]
    for path in printed:
        told = subprocess.run([slicer, "--info", str(path)], capture_output=True, text=True, check=True).stdout
        assert "manifold = yes" in told and "open_edges" not in told, (path.name, told)


@pytest.fixture(scope="module")
def boxes() -> dict[str, Mesh]:
    """A box with every map, and with a colour per vertex."""
    (full,) = extract_mesh(
        Box(), isosurface_resolution=64, target_faces=2000, texture_size=256, normal_map=True, metallic=0.25
    )
    (plain,) = extract_mesh(Box(), isosurface_resolution=64, target_faces=2000, texture_size=None)
    assert full is not None and plain is not None
    return {"texture": full, "colours": plain}


def test_blender_shows_every_format_upright_and_in_colour(boxes: dict[str, Mesh], tmp_path: Path) -> None:
    suffixes = [".glb", ".gltf", ".obj", ".ply", ".stl", *([".usdz"] if importlib.util.find_spec("pxr") else [])]
    cases: list[tuple[str, Path]] = []
    for kind, mesh in boxes.items():
        for suffix in suffixes:
            up: Any = "z" if suffix == ".ply" else None  # which Blender takes for granted
            cases.append((kind, mesh.export(tmp_path / f"{kind}{suffix}", up=up)))
        if importlib.util.find_spec("DracoPy"):
            cases.append((kind, mesh.export(tmp_path / f"{kind}_draco.glb", compress="draco")))
    found = said("bpy", "PRD_BPY_PYTHON", "in_blender.py", [path for _, path in cases])
    for (kind, path), seen in zip(cases, found, strict=True):
        low, high = np.array(LOW), np.array(HIGH)
        if path.suffix == ".stl":  # millimetres, on the bed, no colours
            low, high = np.zeros(3), (high - low) * 50
        np.testing.assert_allclose([seen["low"], seen["high"]], [low, high], atol=0.01 * high.max(), err_msg=path.name)
        assert seen["open_edges"] == 0, path.name
        if path.suffix != ".stl":
            colors = np.array([FRONT, TOP]) * 255
            np.testing.assert_allclose([seen["front"], seen["top"]], colors, atol=1.5, err_msg=path.name)
        maps = kind == "texture" and path.suffix in (".glb", ".gltf", ".obj", ".usdz")
        assert seen["normal_map"] == maps, path.name
        if maps:
            assert (seen["metallic"], seen["roughness"]) == pytest.approx((0.25, 1.0), abs=1e-4), path.name
