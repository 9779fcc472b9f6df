"""Files of meshes: glTF binary, Wavefront OBJ and PLY, each in the axes and colours that its readers expect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.exchange.obj import export_obj
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from prd.meshes.simplify import weld
from prd.meshes.texture import to_bytes
from prd.utils.arguments import expanded_path

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

SUFFIXES = (".glb", ".obj", ".ply")
TO_Y_UP = [1, 2, 0]  # scene X -> Z, Y -> X, Z -> Y: +Y up, front +Z (glTF 2.0, section 3.4); a rotation


def export_mesh(mesh: Mesh, path: str | os.PathLike[str]) -> Path:
    """Write a mesh to a file; see `Mesh.export`."""
    path = expanded_path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".glb":
        _write(path, glb(mesh))
    elif suffix == ".obj":
        text, beside = obj(mesh, path.stem)
        for name, data in beside.items():  # before the file that refers to them
            _write(path.with_name(name), data)
        _write(path, text)
    else:
        _write(path, ply(mesh))
    return path


def glb(mesh: Mesh) -> bytes:
    """Return a mesh as glTF 2.0 binary."""
    visual = visual_of(mesh)
    if mesh.texture is None:  # COLOR_0 is linear in glTF
        visual = ColorVisuals(vertex_colors=to_bytes(srgb_to_linear(mesh.vertex_colors)))
    return _bytes(to_trimesh(mesh, visual, TO_Y_UP).export(file_type="glb", include_normals=True))


def obj(mesh: Mesh, stem: str) -> tuple[bytes, dict[str, bytes]]:
    """Return the text of an OBJ file and, by file name, what lies beside it."""
    visual = visual_of(mesh)
    if isinstance(visual, TextureVisuals) and mesh.texture is not None:
        white = [255, 255, 255, 255]  # the factors of the picture, which takes its file name from the material
        visual.material = SimpleMaterial(
            Image.fromarray(mesh.texture), name=stem, diffuse=white, ambient=white, specular=[0, 0, 0, 255]
        )
    text, beside = export_obj(
        to_trimesh(mesh, visual, TO_Y_UP),
        include_normals=True,
        return_texture=True,
        mtl_name=f"{stem}.mtl",
        header="prd: +Y up, front +Z",
    )
    return text.encode(), beside


def ply(mesh: Mesh) -> bytes:
    """Return a mesh as binary PLY, welded, with vertex colours."""
    vertices, faces, first = weld(mesh.vertices, mesh.faces)
    out = trimesh.Trimesh(
        vertices,
        faces,
        vertex_normals=mesh.vertex_normals[first],
        vertex_colors=to_bytes(mesh.vertex_colors[first]),
        process=False,
    )
    return _bytes(out.export(file_type="ply", vertex_normal=True))


def visual_of(mesh: Mesh) -> ColorVisuals | TextureVisuals:
    """Return a mesh's texture in a PBR material, or else its vertex colours."""
    if mesh.uv is None or mesh.texture is None:
        return ColorVisuals(vertex_colors=to_bytes(mesh.vertex_colors))
    picture = Image.fromarray(mesh.texture)  # sRGB by glTF's definition of a base colour: stored as it is
    material = PBRMaterial(name="surface", baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0)
    return TextureVisuals(uv=mesh.uv, material=material)


def to_trimesh(mesh: Mesh, visual: ColorVisuals | TextureVisuals, axes: list[int]) -> trimesh.Trimesh:
    """Return a mesh in trimesh, its coordinates in the order of `axes`."""
    return trimesh.Trimesh(
        mesh.vertices[:, axes],
        mesh.faces,
        vertex_normals=mesh.vertex_normals[:, axes],
        visual=visual,
        process=False,
    )


def srgb_to_linear(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Display values in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _bytes(exported: object) -> bytes:
    """Binary formats come out of trimesh as bytes; its signature promises less."""
    assert isinstance(exported, bytes)
    return exported


def _write(path: Path, data: bytes) -> None:
    """Write aside in the same folder, then rename: atomic, and nothing is left behind on failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
