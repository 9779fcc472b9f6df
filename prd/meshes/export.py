"""Files of meshes: glTF binary, Wavefront OBJ and PLY, each in the axes and colours that its readers expect."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from trimesh.exchange.obj import export_obj
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from prd.meshes.simplify import weld
from prd.meshes.texture import to_bytes
from prd.utils.arguments import check_writable_file
from prd.utils.files import file_stem, replace_file

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

SUFFIXES = (".glb", ".obj", ".ply")
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # a name that every reader of OBJ and MTL files takes
SOFTWARE = "prd"  # in the pictures that are written here
TO_Y_UP = [1, 2, 0]  # scene X -> Z, Y -> X, Z -> Y: +Y up, front +Z (glTF 2.0, section 3.4); a rotation


def export_mesh(mesh: Mesh, path: str | os.PathLike[str]) -> Path:
    """Write a mesh to a file; see `Mesh.export`."""
    path = check_writable_file("path", path, SUFFIXES)
    suffix = path.suffix.lower()
    if suffix == ".glb":
        _write(path, glb(mesh))
    elif suffix == ".obj":
        text, beside = obj(mesh, _free_stem(path), path.name)
        for name, data in beside.items():  # before the file that refers to them
            _write(path.with_name(name), data)
        _write(path, text)
    else:
        _write(path, ply(mesh))
    return path


def glb(mesh: Mesh) -> bytes:
    """Return a mesh as glTF 2.0 binary; vertex colours are linear there (COLOR_0), in float32."""
    if mesh.texture is not None:
        return _bytes(to_trimesh(mesh, visual_of(mesh), TO_Y_UP).export(file_type="glb", include_normals=True))
    out = to_trimesh(mesh, ColorVisuals(), TO_Y_UP)  # trimesh's own vertex colours are bytes: too coarse for linear
    out.vertex_attributes["_LINEAR"] = srgb_to_linear(mesh.vertex_colors.clip(0, 1))
    return _bytes(out.export(file_type="glb", include_normals=True, tree_postprocessor=_name_colors))


def _name_colors(tree: dict[str, Any]) -> None:
    """Give the vertex attribute that holds the colours glTF's name for it."""
    for shape in tree["meshes"]:
        for primitive in shape["primitives"]:
            primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_LINEAR")


def obj(mesh: Mesh, stem: str, owner: str) -> tuple[bytes, dict[str, bytes]]:
    """Return the text of an OBJ file and, by file name, what lies beside it.

    stem   name, without suffix, of the material and its picture
    owner  name of the OBJ file, by which those files are known as belonging to it
    """
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
    if mesh.texture is not None:
        beside[f"{stem}.mtl"] = f"{_mark(owner)}\n".encode() + beside[f"{stem}.mtl"]
        beside[f"{stem}.png"] = _png(mesh.texture, owner)
    return text.encode(), beside


def _free_stem(path: Path) -> str:
    """Return the stem of what lies beside an OBJ file: no file there that was not written for it has that name."""
    own = path.stem if PLAIN.fullmatch(path.stem) else file_stem(path.stem.encode("ascii", "ignore").decode(), "mesh")

    def is_free(stem: str) -> bool:
        beside = [path.with_name(f"{stem}{suffix}") for suffix in (".mtl", ".png")]
        return all(not os.path.lexists(file) or _belongs_to(file, path.name) for file in beside)

    tries = itertools.chain((own,), (f"{own}_{number}" for number in itertools.count(2)))
    return next(stem for stem in tries if is_free(stem))


def _mark(owner: str) -> str:
    """Return the first line of a material file, which says whose it is."""
    return f"# prd: beside {json.dumps(owner)}"


def _png(texture: NDArray[np.uint8], owner: str) -> bytes:
    """Return a picture that says whose it is."""
    says, data = PngInfo(), io.BytesIO()
    says.add_text("Software", SOFTWARE)
    says.add_text("Title", json.dumps(owner))
    Image.fromarray(texture).save(data, format="png", pnginfo=says)
    return data.getvalue()


def _belongs_to(file: Path, owner: str) -> bool:
    """Return True if a material file or a picture says that it was written here, beside the OBJ file `owner`."""
    try:
        if file.suffix == ".mtl":
            with file.open(encoding="utf-8", errors="replace") as lines:
                return lines.readline().rstrip() == _mark(owner)
        with Image.open(file) as picture:
            return (picture.info.get("Software"), picture.info.get("Title")) == (SOFTWARE, json.dumps(owner))
    except OSError:  # a folder, or no picture
        return False


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
    replace_file(path, lambda aside: aside.write_bytes(data))
