"""Mesh files of any maker as they are: triangles, colours and texture coordinates, whatever software wrote them.

`read_file_mesh` changes nothing but the axes, so that what is measured is the file; `prd.meshes.read.read_mesh` gives
the shape alone, scaled into the cube.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from prd.meshes.axes import noted_up, turned_back
from prd.meshes.read import UnreadableMesh

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
Y_UP = (".glb", ".gltf", ".obj")  # +Y up, front +Z; the others have the scene's axes
LINEAR = (".glb", ".gltf")  # whose vertex colours and factors are linear light
MAX_FACES = 5_000_000  # of a file: more is refused before it fills the memory
GREY = 0.5  # of a mesh without colours
CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class FileMesh:
    """Triangles of a mesh file in the scene's axes (+Z up, front +X), in the file's units.

    vertices    [V, 3]  float64
    faces       [F, 3]  int64
    colors      [V, 3]  float32 sRGB in [0, 1]; multiplied with the texture where a face has one
    uv          [V, 2]  float32, v up; NaN where a vertex has none
    texture_of  [F]     int64, index into `textures`, -1 for none
    textures    uint8 pictures [H, W, 3], row 0 at v = 1
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    colors: NDArray[np.float32]
    uv: NDArray[np.float32]
    texture_of: NDArray[np.int64]
    textures: tuple[NDArray[np.uint8], ...]


def read_file_mesh(path: Path, *, up: str | None = None, max_faces: int = MAX_FACES) -> FileMesh:
    """Read a mesh file of any maker, all its parts placed as its scene says.

    up         "y" or "z": the file's upward axis; None: y for glTF and OBJ, z for the others
    max_faces  most triangles that are read

    Raises UnreadableMesh, in one sentence, for a file that is not there or cannot be read, that holds no triangle, too
    many of them, a vertex that is not finite or a face of a vertex that is not there.
    """
    if not path.is_file():
        raise UnreadableMesh(f"{path.name}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise UnreadableMesh(f"{path.name}: unknown suffix; must end in {', '.join(SUFFIXES)}")
    try:
        declared = declared_faces(path)
        _check_count(path, declared, max_faces)
        scene: Any = trimesh.load_scene(path, process=False)
        parts = [part for part in _parts(scene, path.suffix.lower() in LINEAR) if len(part.faces)]
    except UnreadableMesh:
        raise
    except Exception as error:  # of trimesh's readers, which share no class
        reason = " ".join(str(error).split())[:200]
        raise UnreadableMesh(f"{path.name}: cannot be read as a mesh ({type(error).__name__}: {reason})") from error
    if not parts:
        raise UnreadableMesh(f"{path.name}: is empty: it holds no triangles")
    mesh = _joined(parts)
    _check_count(path, len(mesh.faces), max_faces)
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise UnreadableMesh(f"{path.name}: a face names a vertex that is not there")
    if not np.isfinite(mesh.vertices[mesh.faces]).all():
        raise UnreadableMesh(f"{path.name}: holds vertices that are NaN or infinite")
    noted = noted_up(path) if up is None else None  # "z" is then the one that `Mesh.export` writes, front -Y
    if noted is not None or (up or ("y" if path.suffix.lower() in Y_UP else "z")) == "y":
        mesh = replace(mesh, vertices=turned_back(mesh.vertices, noted or "y"))
    return mesh


def declared_faces(path: Path) -> int:
    """Return the number of triangles that a file's header or lines declare, without reading them; 0 if unknown."""
    suffix = path.suffix.lower()
    if suffix == ".ply":
        with path.open("rb") as stream:
            found = re.search(rb"element\s+face\s+(\d+)", stream.read(1 << 16))
        return int(found[1]) if found else 0
    if suffix == ".obj":
        return _count_lines(path, b"f")
    if suffix == ".stl":
        with path.open("rb") as stream:
            head = stream.read(84)
        count = struct.unpack("<I", head[80:84])[0] if len(head) == 84 else 0
        return count if path.stat().st_size == 84 + 50 * count else 0
    return _gltf_faces(path) if suffix in (".glb", ".gltf") else 0


def _count_lines(path: Path, start: bytes) -> int:
    """Count the lines of a file that begin with a word."""
    count, tail = 0, b"\n"
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            count += (tail + block).count(b"\n" + start + b" ")
            tail = block[-(len(start) + 1) :]
    return count


def _gltf_faces(path: Path) -> int:
    """The triangles that a glTF file's accessors declare."""
    with path.open("rb") as stream:
        if path.suffix.lower() == ".glb":
            head = stream.read(20)
            if len(head) < 20 or head[:4] != b"glTF":
                raise UnreadableMesh(f"{path.name}: is no glTF binary (it does not begin with 'glTF')")
            text = stream.read(struct.unpack("<I", head[12:16])[0])
        else:
            text = stream.read()
    tree = json.loads(text)
    accessors, total = tree.get("accessors", []), 0
    for shape in tree.get("meshes", []):
        for primitive in shape.get("primitives", []):
            index = primitive.get("indices", primitive.get("attributes", {}).get("POSITION"))
            total += accessors[index]["count"] // 3 if index is not None else 0
    return int(total)


def _check_count(path: Path, count: int, max_faces: int) -> None:
    if count > max_faces:
        raise UnreadableMesh(f"{path.name}: {count} faces are more than {max_faces}; simplify it first")


def _parts(scene: Any, linear: bool) -> Iterator[FileMesh]:
    """The triangle meshes of a scene, each where the scene puts it."""
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh):
            continue
        part = _part(geometry, linear)
        matrix = np.asarray(transform, np.float64)
        faces = part.faces[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0 else part.faces  # mirrored: turned back out
        moved = part.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        yield FileMesh(moved, faces, part.colors, part.uv, part.texture_of, part.textures)


def _part(geometry: trimesh.Trimesh, linear: bool) -> FileMesh:
    """One triangle mesh of trimesh; `linear`: its vertex colours and factors are linear light, as glTF's are."""
    vertices, faces = np.asarray(geometry.vertices, np.float64), np.asarray(geometry.faces, np.int64)
    visual: Any = geometry.visual
    uv, picture, colors = getattr(visual, "uv", None), None, None
    if visual.kind == "texture":
        picture, factor = _material(visual.material)
        colors = np.broadcast_to(_display(factor, linear), (len(vertices), 3))
        attributes = visual.vertex_attributes  # where trimesh puts COLOR_0 beside a material
        stored: Any = attributes["color"] if "color" in attributes else None
        if stored is not None and len(stored) == len(vertices):
            colors = colors * _display(_unit(stored), linear)
    elif visual.kind == "vertex":
        colors = _display(_unit(visual.vertex_colors), linear)
    elif visual.kind == "face":
        colors = np.repeat(_display(_unit(visual.face_colors), linear), 3, axis=0)
        vertices, faces = vertices[faces].reshape(-1, 3), np.arange(3 * len(faces), dtype=np.int64).reshape(-1, 3)
        uv = None
    count = len(vertices)
    has_uv = uv is not None and np.shape(uv) == (count, 2)
    coordinates = np.asarray(uv, np.float32) if has_uv else np.full((count, 2), np.nan, np.float32)
    textured = picture is not None and has_uv
    return FileMesh(
        vertices,
        faces,
        np.full((count, 3), GREY, np.float32) if colors is None else np.asarray(colors, np.float32),
        coordinates,
        np.full(len(faces), 0 if textured else -1, np.int64),
        (picture,) if textured and picture is not None else (),
    )


def _material(material: Any) -> tuple[NDArray[np.uint8] | None, NDArray[np.float32]]:
    """Base colour picture [H, W, 3] or None, and factor [3] of a material of trimesh."""
    picture = getattr(material, "baseColorTexture", None)
    factor = getattr(material, "baseColorFactor", None)
    if picture is None and factor is None and hasattr(material, "image"):
        picture = material.image
        factor = None if picture is not None else material.diffuse
    pixels = np.asarray(picture.convert("RGB"), np.uint8) if isinstance(picture, Image.Image) else None
    if factor is None:
        return pixels, np.ones(3, np.float32)
    return pixels, _unit(np.asarray(factor))


def _unit(values: Any) -> NDArray[np.float32]:
    """Colours as float32 in [0, 1], without alpha."""
    array = np.asarray(values)
    scale = 255.0 if array.dtype == np.uint8 else 65535.0 if array.dtype == np.uint16 else 1.0
    return np.nan_to_num(array[..., :3].astype(np.float32) / scale).clip(0, 1)


def _display(rgb: NDArray[np.float32], linear: bool) -> NDArray[np.float32]:
    """Colours as display values: linear light becomes sRGB (IEC 61966-2-1)."""
    if not linear:
        return rgb
    return np.where(rgb <= 0.0031308, rgb * 12.92, 1.055 * np.maximum(rgb, 1e-9) ** (1 / 2.4) - 0.055)


def _joined(parts: list[FileMesh]) -> FileMesh:
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    pictures = np.cumsum([0, *(len(part.textures) for part in parts)])
    return FileMesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.faces + start for part, start in zip(parts, starts[:-1], strict=True)]),
        np.concatenate([part.colors for part in parts]),
        np.concatenate([part.uv for part in parts]),
        np.concatenate(
            [
                np.where(p.texture_of < 0, -1, p.texture_of + start)
                for p, start in zip(parts, pictures[:-1], strict=True)
            ]
        ),
        tuple(picture for part in parts for picture in part.textures),
    )
