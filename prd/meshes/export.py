"""Files of meshes: which formats there are, what each can hold, and writing them whole."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

import prd
from prd.errors import ConfigError
from prd.meshes.axes import NOTES, Up, turned
from prd.meshes.gltf import Compression, PictureFormat, glb, gltf, srgb_to_linear
from prd.meshes.obj import free_stem, obj
from prd.meshes.options import MeshOptions, check_one_of
from prd.meshes.printing import MM_PER_UNIT, stl, threemf
from prd.meshes.simplify import weld
from prd.meshes.texture import to_bytes
from prd.meshes.usd import usdz
from prd.utils.arguments import check_writable_file
from prd.utils.files import replace_file

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

__all__ = [
    *("FORMATS", "SUFFIXES", "Export", "ExportKeywords", "export_mesh", "options_for", "parse_length", "ply"),
    "srgb_to_linear",
]


@dataclass(frozen=True)
class Format:
    """Abilities of a file format.

    up        ways up it can have, the default first
    unit      of its lengths, millimetres; None where it says none
    pictures  formats of the texture's picture to choose from
    scene     whether it is a scene: it holds levels of detail and takes compressed geometry
    texture   whether it holds one, and with it a normal map
    """

    up: tuple[Up, ...]
    unit: float | None = None
    pictures: tuple[PictureFormat, ...] = ("png",)
    scene: bool = False
    texture: bool = True


FORMATS = {
    ".glb": Format(("y",), 1000.0, ("png", "webp"), scene=True),
    ".obj": Format(("y", "z")),
    ".ply": Format(("y", "z"), texture=False),
    ".gltf": Format(("y",), 1000.0, ("png", "webp"), scene=True),
    ".stl": Format(("z", "y"), 1.0, texture=False),
    ".3mf": Format(("z",), 1.0, texture=False),
    ".usdz": Format(("y",), 1000.0),
}
SUFFIXES = tuple(FORMATS)
LENGTH = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(mm|cm|m|in)", re.ASCII)
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "in": 25.4}


def options_for(options: MeshOptions, *suffixes: str) -> MeshOptions:
    """Return the options of a mesh without a texture where none of its files holds one: it would be baked for nothing.

    suffixes  of the files, as ".stl"
    """
    if any(FORMATS[suffix.lower()].texture for suffix in suffixes):
        return options
    return replace(options, texture_size=None, normal_map=False)


class ExportKeywords(TypedDict, total=False):
    """Options of `Mesh.export`, for type checkers."""

    up: Up | None
    height: str | None
    picture: PictureFormat
    compress: Compression | None


@dataclass(frozen=True)
class Export:
    """A file to be written and what is asked of it, checked when it is made; the options are those of `Mesh.export`.

    name    of the argument that gave `path`, for messages
    levels  of detail that the mesh has
    """

    path: str | os.PathLike[str]
    up: Up | None = None
    height: str | None = None
    picture: PictureFormat = "png"
    compress: Compression | None = None
    name: str = "path"
    levels: int = 1

    def __post_init__(self) -> None:
        path = check_writable_file(self.name, self.path, SUFFIXES)
        object.__setattr__(self, "path", path)
        suffix, format = path.suffix.lower(), FORMATS[path.suffix.lower()]
        if self.up is not None:
            check_one_of("up", self.up, ("y", "z"))
            if self.up not in format.up:
                raise ConfigError(f"up={self.up!r}: a {suffix} is +{format.up[0].upper()} up; leave it out")
        check_one_of("picture", self.picture, ("png", "webp"))
        if self.picture not in format.pictures:
            raise ConfigError(f"picture={self.picture!r}: {suffix} takes none but png; leave it out, or write a .glb")
        if self.height is not None and parse_length("height", self.height) and format.unit is None:
            united = ", ".join(name for name, other in FORMATS.items() if other.unit)
            raise ConfigError(f"height={self.height!r}: {suffix} says no unit of length; write one of {united}")
        able = " or ".join(name for name, other in FORMATS.items() if other.scene)
        self._check_compress(suffix, able)
        if self.levels > 1 and not format.scene:
            raise ConfigError(f"lods={self.levels}: {suffix} holds one mesh; write a {able}, or take lods=1")
        if suffix == ".usdz" and importlib.util.find_spec("pxr") is None:
            raise ConfigError(
                f"{self.name}={os.fspath(self.path)!r}: .usdz needs usd-core, which is not installed; pip install "
                "'prd-3d[usd]', or write a .glb"
            )

    def _check_compress(self, suffix: str, able: str) -> None:
        """Raise ConfigError unless the format takes compressed geometry and the compressor is there."""
        if self.compress is None:
            return
        check_one_of("compress", self.compress, ("draco",))
        if not FORMATS[suffix].scene:
            raise ConfigError(f"compress='draco': a {suffix} is not compressed; leave it out, or write a {able}")
        if importlib.util.find_spec("DracoPy") is None:
            raise ConfigError(
                "compress='draco': needs DracoPy, which is not installed; pip install 'prd-3d[draco]', or leave it out"
            )


def parse_length(name: str, text: str) -> float:
    """Return a length in millimetres; ValueError unless it is a positive number and its unit, as "60mm"."""
    found = LENGTH.fullmatch(text) if isinstance(text, str) else None
    millimetres = float(found[1]) * MILLIMETRES[found[2]] if found else 0.0
    if not 0.01 <= millimetres <= 1e6:
        raise ConfigError(f"{name}={text!r}: must be 0.01mm to 1000m, a number and mm, cm, m or in, as 60mm")
    return millimetres


def export_mesh(mesh: Mesh, export: Export) -> Path:
    """Write a mesh to a file; see `Mesh.export`."""
    path = Path(export.path)
    suffix, format = path.suffix.lower(), FORMATS[path.suffix.lower()]
    up, extras, scale = export.up or format.up[0], asset_extras(mesh), _scale(mesh, export, format)
    if suffix in (".glb", ".gltf"):
        write = glb if suffix == ".glb" else gltf
        _write(path, write((mesh, *mesh.lods), extras, scale, export.picture, export.compress))
    elif suffix == ".obj":
        text, beside = obj(mesh, free_stem(path), path.name, up)
        for name, data in beside.items():  # before the file that refers to them
            _write(path.with_name(name), data)
        _write(path, text)
    elif suffix == ".ply":
        _write(path, ply(mesh, up))
    elif suffix == ".stl":
        _write(path, stl(mesh, scale, up))
    else:
        _write(path, (threemf if suffix == ".3mf" else usdz)(mesh, extras, scale))
    return path


def asset_extras(mesh: Mesh) -> dict[str, Any]:
    """Return what a file says about its making: `Mesh.metadata` and this library's name and version."""
    return {**mesh.metadata, "generator": f"prd {prd.__version__}"}


def _scale(mesh: Mesh, export: Export, format: Format) -> float:
    """Return the file's units of length per scene unit."""
    if export.height is None or format.unit is None:
        return MM_PER_UNIT if format.unit == 1.0 else 1.0
    extent = mesh.vertices[:, 2].max() - mesh.vertices[:, 2].min()
    if not extent > 0:
        raise ConfigError(f"height={export.height!r}: the mesh is flat, it has no height; leave it out")
    return parse_length("height", export.height) / format.unit / float(extent)


def ply(mesh: Mesh, up: Up = "y") -> bytes:
    """Return a mesh as binary PLY, welded, with vertex normals and colours."""
    vertices, faces, first = weld(mesh.vertices, mesh.faces)
    reals, colors = ("x", "y", "z", "nx", "ny", "nz"), ("red", "green", "blue")
    rows = np.zeros(len(vertices), np.dtype([("reals", "<f4", 6), ("colors", "u1", 3)]))
    rows["reals"][:, :3], rows["reals"][:, 3:] = turned(vertices, up), turned(mesh.vertex_normals[first], up)
    rows["colors"] = to_bytes(mesh.vertex_colors[first].clip(0, 1))
    triangles = np.zeros(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    triangles["count"], triangles["corners"] = 3, faces
    header = [
        *("ply", "format binary_little_endian 1.0", f"comment {NOTES[up]}", f"element vertex {len(vertices)}"),
        *(f"property float {name}" for name in reals),
        *(f"property uchar {name}" for name in colors),
        *(f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"),
    ]
    return "\n".join(header).encode() + rows.tobytes() + triangles.tobytes()


def to_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    """Return a mesh in trimesh, in the scene's axes, with its texture in a PBR material or else its vertex colours."""
    visual: ColorVisuals | TextureVisuals
    if mesh.uv is None or mesh.texture is None:
        visual = ColorVisuals(vertex_colors=to_bytes(mesh.vertex_colors))
    else:
        picture = Image.fromarray(mesh.texture)
        bumps = None if mesh.normal_map is None else Image.fromarray(mesh.normal_map)
        material = PBRMaterial(
            name="surface",
            baseColorTexture=picture,
            normalTexture=bumps,
            metallicFactor=mesh.metallic,
            roughnessFactor=mesh.roughness,
        )
        visual = TextureVisuals(uv=mesh.uv, material=material)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.vertex_normals, visual=visual, process=False)


def _write(path: Path, data: bytes) -> None:
    """Write aside in the same folder, then rename: atomic, and nothing is left behind on failure."""
    replace_file(path, lambda aside: aside.write_bytes(data))
