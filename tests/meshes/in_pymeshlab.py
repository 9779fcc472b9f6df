"""Open mesh files in pymeshlab and print their topology as a JSON list: `python in_pymeshlab.py FILE...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pymeshlab  # type: ignore[import-not-found,unused-ignore]

SEPARATE = (".stl", ".glb", ".gltf")  # whose triangles or charts have vertices of their own


def topology(path: str) -> dict[str, Any]:
    """Open and branching edges, and the genus, of a file."""
    meshes = pymeshlab.MeshSet()
    meshes.load_new_mesh(path)
    if Path(path).suffix in SEPARATE:
        meshes.meshing_remove_duplicate_vertices()
    found = meshes.get_topological_measures()
    return {name: found[name] for name in ("boundary_edges", "non_two_manifold_edges", "genus")}


if __name__ == "__main__":
    print("SEEN" + json.dumps([topology(path) for path in sys.argv[1:]]))
