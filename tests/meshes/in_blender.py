"""Open mesh files in Blender and say how they came in; run by a Python that has bpy: `python in_blender.py FILE...`.

Prints a JSON list, for each file: low and high corners, colours of the sides whose normal is -Y (Blender's front) and
+Z (the top), open edges once vertices at one position are one, metallic and roughness, whether there is a normal map.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bpy
import numpy as np

SIDES = {"front": (0.0, -1.0, 0.0), "top": (0.0, 0.0, 1.0)}


def imported(path: str) -> Any:
    """The only mesh of a file, in an empty scene, by Blender's importers as they are set at first."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    operators = {
        ".glb": bpy.ops.import_scene.gltf,
        ".gltf": bpy.ops.import_scene.gltf,
        ".obj": bpy.ops.wm.obj_import,
        ".ply": bpy.ops.wm.ply_import,
        ".stl": bpy.ops.wm.stl_import,
        ".usdz": bpy.ops.wm.usd_import,
    }
    operators[Path(path).suffix](filepath=path)
    bpy.context.view_layer.update()
    (found,) = [thing for thing in bpy.context.scene.objects if thing.type == "MESH"]
    return found


def to_srgb(linear: np.ndarray) -> list[float]:
    """Linear light as display values in 0..255."""
    clipped = linear.clip(0, 1)
    return (255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)).tolist()


def picture_of(material: Any, socket: str) -> Any:
    """The picture behind a socket of a material's surface, None without one."""
    if material is None or not material.node_tree:
        return None
    ends = [node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED"]
    links = list(ends[0].inputs[socket].links) if ends else []
    while links:
        node = links.pop().from_node
        if node.type == "TEX_IMAGE":
            return node.image
        links += [link for entry in node.inputs for link in entry.links]
    return None


def side_color(shape: Any, faces: list[Any], picture: Any) -> list[float] | None:
    """The middle colour of faces in display values, by the picture or else by the vertices."""
    if picture is not None:
        width, height = picture.size
        pixels = np.array(picture.pixels[:]).reshape(height, width, -1)  # as stored: sRGB, row 0 at v = 0
        uv = shape.uv_layers.active.data
        points = np.array([np.mean([uv[i].uv[:] for i in face.loop_indices], axis=0) for face in faces])
        columns, rows = (points % 1 * [width, height]).astype(int).T
        return (255 * np.median(pixels[rows, columns, :3], axis=0)).tolist()
    if not len(shape.color_attributes):
        return None
    colors = shape.color_attributes[0]
    index = [i for face in faces for i in (face.vertices if colors.domain == "POINT" else face.loop_indices)]
    return to_srgb(np.median([colors.data[i].color[:3] for i in index], axis=0))


def open_edges(shape: Any) -> int:
    """Edges of one face, once vertices at one position are one."""
    points = np.array([vertex.co[:] for vertex in shape.vertices])
    _, merged = np.unique((points / np.ptp(points)).round(6), axis=0, return_inverse=True)
    corners = merged.reshape(-1)[np.array([face.vertices[:] for face in shape.polygons])]
    edges = np.sort(corners[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return int((np.unique(edges, axis=0, return_counts=True)[1] == 1).sum())


def seen(path: str) -> dict[str, Any]:
    """Return how a file came in."""
    thing = imported(path)
    shape, place = thing.data, np.array(thing.matrix_world)
    points = np.array([vertex.co[:] for vertex in shape.vertices]) @ place[:3, :3].T + place[:3, 3]
    material = shape.materials[0] if len(shape.materials) else None
    picture = picture_of(material, "Base Color")
    turn = place[:3, :3] / np.linalg.norm(place[:3, 0])
    sides = {}
    for name, outward in SIDES.items():
        faces = [face for face in shape.polygons if turn @ np.array(face.normal) @ np.array(outward) > 0.98]
        sides[name] = side_color(shape, faces, picture)
    surface: dict[str, Any] = {}
    if material is not None and material.node_tree:
        ends = [node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED"]
        surface = {name.lower(): ends[0].inputs[name].default_value for name in ("Metallic", "Roughness") if ends}
    return {
        **sides,
        **surface,
        "low": points.min(axis=0).tolist(),
        "high": points.max(axis=0).tolist(),
        "open_edges": open_edges(shape),
        "normal_map": picture_of(material, "Normal") is not None,
    }


if __name__ == "__main__":
    print("SEEN" + json.dumps([seen(path) for path in sys.argv[1:]]))
