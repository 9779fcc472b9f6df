"""Folders to evaluate, and the command on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from prd.cli import main

CAPTIONS = {"box.glb": "a box, plain.", "torus.obj": "a torus", "ball.ply": 'a "ball"', "cone.stl": "a cone of ice"}


def coloured(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    colors = np.full((len(mesh.vertices), 4), 255, np.uint8)
    colors[:, :3] = np.round(255 * (mesh.vertices - mesh.bounds[0]) / np.ptp(mesh.bounds, axis=0))
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)
    return mesh


def write_captions(folder: Path, rows: dict[str, str]) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "caption"), *rows.items()])


def run(source: Path, protocol: str, out: Path, *words: str, status: int = 0) -> dict[str, Any]:
    assert main(["evaluate", str(source), "--protocol", protocol, "-o", str(out), *words]) == status
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what is said of a command that is refused: one line."""
    capfd.readouterr()
    assert main(["evaluate", *words]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1, said
    return said
