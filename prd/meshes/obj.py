"""Wavefront OBJ, with its material and picture beside it.

Positions, texture coordinates and normals have indices of their own, so that the surface is closed to a reader that
looks at positions alone.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prd.meshes.axes import NOTES, Up, turned
from prd.meshes.simplify import is_proper, merge_positions
from prd.meshes.texture import to_bytes
from prd.utils.files import file_stem

if TYPE_CHECKING:
    from prd.meshes.mesh import Mesh

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")  # a name that every reader of OBJ and MTL files takes
NORMAL = "_normal.png"  # after the stem
SOFTWARE = "prd"  # in the pictures that are written here


def obj(mesh: Mesh, stem: str, owner: str, up: Up = "y") -> tuple[bytes, dict[str, bytes]]:
    """Return the text of an OBJ file and, by file name, what lies beside it.

    stem   name, without suffix, of the material and its picture
    owner  name of the OBJ file, by which those files are known as belonging to it
    up     as in `prd.meshes.axes.turned`
    """
    positions, first, merged = merge_positions(mesh.vertices)
    corners = merged[mesh.faces]
    proper = is_proper(corners)
    faces = mesh.faces[proper]
    normals, normal_of = np.unique(turned(mesh.vertex_normals, up), axis=0, return_inverse=True)
    columns = [corners[proper], normal_of.reshape(-1)[faces]]  # [F, 3] each
    points, lines = turned(positions, up), [f"# {NOTES[up]}"]
    if mesh.uv is None or mesh.texture is None:
        lines += _rows("v", np.hstack([points, to_bytes(mesh.vertex_colors[first].clip(0, 1)) / 255]))
    else:
        uv, uv_of = np.unique(mesh.uv, axis=0, return_inverse=True)
        columns.insert(1, uv_of.reshape(-1)[faces])
        lines += [f"mtllib {stem}.mtl", *_rows("v", points), *_rows("vt", uv)]
    lines += [*_rows("vn", normals), *([] if mesh.texture is None else [f"usemtl {stem}"])]
    corner = "//".join(["%d"] * 2) if len(columns) == 2 else "/".join(["%d"] * 3)
    line = f"f {corner} {corner} {corner}"
    lines += [line % tuple(row) for row in (np.stack(columns, axis=2).reshape(len(faces), -1) + 1).tolist()]
    return "\n".join([*lines, ""]).encode(), _beside(mesh, stem, owner)


def _rows(word: str, values: NDArray[np.float32]) -> Iterable[str]:
    """Return lines of numbers in as many digits as give the same float32 back."""
    line = " ".join([word, *["%.9g"] * values.shape[1]])
    return (line % tuple(row) for row in values.tolist())


def _beside(mesh: Mesh, stem: str, owner: str) -> dict[str, bytes]:
    """Return the material file and its pictures by name; white factors leave the picture's colours as they are."""
    if mesh.texture is None:
        return {}
    white, black = "1.000000 1.000000 1.000000", "0.000000 0.000000 0.000000"
    material = [_mark(owner), f"newmtl {stem}", f"Ka {white}", f"Kd {white}", f"Ks {black}", "Ns 1.000000", "illum 1"]
    material += [f"Pm {mesh.metallic:f}", f"Pr {mesh.roughness:f}", f"map_Kd {stem}.png"]
    pictures = {f"{stem}.png": _png(mesh.texture, owner)}
    if mesh.normal_map is not None:  # by either name: readers take "norm", or read normals from "map_Bump"
        bumps = f"{stem}{NORMAL}"
        material += [f"norm {bumps}", f"map_Bump {bumps}"]
        pictures[bumps] = _png(mesh.normal_map, owner)
    return {f"{stem}.mtl": "\n".join([*material, ""]).encode(), **pictures}


def free_stem(path: Path) -> str:
    """Return the stem of what lies beside an OBJ file: no file there that was not written for it has that name."""
    own = path.stem if PLAIN.fullmatch(path.stem) else file_stem(path.stem.encode("ascii", "ignore").decode(), "mesh")

    def is_free(stem: str) -> bool:
        beside = [path.with_name(f"{stem}{suffix}") for suffix in (".mtl", ".png", NORMAL)]
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
