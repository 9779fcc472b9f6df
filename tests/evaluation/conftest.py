"""Fixtures of evaluations: meshes that trimesh wrote, and a CLIP with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from trimesh import creation

from tests.evaluation.made import CAPTIONS, coloured, write_captions
from tests.evaluation.tiny_clip import save_tiny_clip


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    """A folder of meshes that trimesh wrote."""
    folder = tmp_path / "meshes"
    folder.mkdir()
    made = (creation.box(), creation.torus(1, 0.3), creation.icosphere(2), creation.cone(1, 2))
    for name, mesh in zip(CAPTIONS, made, strict=True):
        coloured(mesh).export(folder / name)
    write_captions(folder, CAPTIONS)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))
