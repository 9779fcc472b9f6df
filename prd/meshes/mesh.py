"""Meshes: from a field to a clean, closed, textured surface on disk.

extract_isosurface -> clean (weld, keep one piece, outward) -> decimate -> unwrap -> bake -> Mesh.export

Colours are display (sRGB) values, as fields give them. Coordinates are the scene's (+Z up, front +X) everywhere but in
the files whose convention is Y up: see `Mesh.export`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import fast_simplification
import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from trimesh.exchange.obj import export_obj
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from prd.fields.protocol import Field
from prd.isosurface.extract import extract_isosurface
from prd.meshes.texture import paint, texel_points, to_bytes, unwrap

SUFFIXES = (".glb", ".obj", ".ply")
TO_Y_UP = [1, 2, 0]  # scene X -> Z, Y -> X, Z -> Y: +Y up, front +Z (glTF 2.0, section 3.4); a rotation
WELD = 2.0**-20  # scene units: vertices closer than this are one; readers merge at 1e-8 and must find nothing to merge
DUST = 1e-2  # of the largest piece's volume: smaller pieces are never kept
QUERY = 1 << 18  # points of all samples together in one call of field.rgb

Surface = tuple[NDArray[np.float32], NDArray[np.int64]]  # vertices [V, 3] scene units, faces [F, 3] outward


@dataclass(frozen=True)
class Mesh:
    """One coloured triangle mesh in scene units, +Z up, front +X.

    vertices       [V, 3]  float32; vertices on a texture cut appear once per chart, at the same position
    faces          [F, 3]  int64, counter-clockwise seen from outside
    vertex_normals [V, 3]  float32, unit, outward, continuous across texture cuts
    vertex_colors  [V, 3]  float32 in [0, 1], sRGB
    uv             [V, 2]  float32 in [0, 1], v up; None without a texture
    texture        [H, W, 3]  uint8 sRGB, row 0 at v = 1; None without a texture
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int64]
    vertex_normals: NDArray[np.float32]
    vertex_colors: NDArray[np.float32]
    uv: NDArray[np.float32] | None = None
    texture: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        count = len(self.vertices)
        for name, width in (("vertices", 3), ("vertex_normals", 3), ("vertex_colors", 3), ("uv", 2)):
            value = getattr(self, name)
            if value is not None and value.shape != (count, width):
                raise ValueError(f"{name}={value.shape}: expected ({count}, {width}), one row a vertex")
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{name}: holds NaN or infinity; check the field it was made from")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3 or len(self.faces) == 0:
            raise ValueError(f"faces={self.faces.shape}: expected [F, 3] with at least one face")
        if self.faces.min() < 0 or self.faces.max() >= count:
            raise ValueError(f"faces: indices {self.faces.min()}..{self.faces.max()} must lie in 0..{count - 1}")
        if (self.uv is None) != (self.texture is None):
            raise ValueError("uv and texture: give both or neither")

    @cached_property
    def _welded(self) -> trimesh.Trimesh:
        """The surface alone, texture cuts closed."""
        vertices, faces, _ = weld(self.vertices, self.faces)
        return trimesh.Trimesh(vertices, faces, process=False)

    @property
    def volume(self) -> float:
        """Enclosed volume, cubic scene units; meaningful if `is_watertight`."""
        return float(self._welded.volume)

    @property
    def is_watertight(self) -> bool:
        """Whether every edge belongs to exactly two faces of opposite direction (texture cuts closed)."""
        return bool(self._welded.is_watertight and self._welded.is_winding_consistent)

    @property
    def euler_number(self) -> int:
        """V - E + F of the surface, texture cuts closed: 2 for a sphere, 0 for a torus."""
        return int(self._welded.euler_number)

    def to_trimesh(self) -> trimesh.Trimesh:
        """The mesh in trimesh, in the scene's axes, with its texture in a PBR material or else its vertex colours."""
        return self._trimesh(self._visual(), [0, 1, 2])

    def _visual(self) -> ColorVisuals | TextureVisuals:
        if self.uv is None or self.texture is None:
            return ColorVisuals(vertex_colors=to_bytes(self.vertex_colors))
        picture = Image.fromarray(self.texture)  # sRGB by glTF's definition of a base colour: stored as it is
        material = PBRMaterial(name="surface", baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0)
        return TextureVisuals(uv=self.uv, material=material)

    def _trimesh(self, visual: ColorVisuals | TextureVisuals, axes: list[int]) -> trimesh.Trimesh:
        return trimesh.Trimesh(
            self.vertices[:, axes],
            self.faces,
            vertex_normals=self.vertex_normals[:, axes],
            visual=visual,
            process=False,
        )

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the mesh; the suffix names the format. Returns the path.

        .glb  glTF 2.0 binary: +Y up, front +Z; base colour texture in a PBR material (metallic 0, roughness 1), or
              without a texture linear COLOR_0
        .obj  +Y up, front +Z, as most readers expect; NAME.mtl and NAME.png beside it, or colours on the v lines
        .ply  the scene's own axes (+Z up, front +X); welded, with vertex colours

        Each file is written aside and renamed, so that a reader never sees half of one. Raises ValueError for another
        suffix and OSError where the folder cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"path={str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
        if suffix == ".glb":
            _write(path, self._glb())
        elif suffix == ".obj":
            text, beside = self._obj(path.stem)
            for name, data in beside.items():  # before the file that refers to them
                _write(path.with_name(name), data)
            _write(path, text)
        else:
            _write(path, self._ply())
        return path

    def _glb(self) -> bytes:
        visual = self._visual()
        if self.texture is None:  # COLOR_0 is linear in glTF
            visual = ColorVisuals(vertex_colors=to_bytes(srgb_to_linear(self.vertex_colors)))
        return _bytes(self._trimesh(visual, TO_Y_UP).export(file_type="glb", include_normals=True))

    def _obj(self, stem: str) -> tuple[bytes, dict[str, bytes]]:
        """The text and, by file name, what lies beside it."""
        visual = self._visual()
        if isinstance(visual, TextureVisuals) and self.texture is not None:
            white = [255, 255, 255, 255]  # the factors of the picture, which takes its file name from the material
            visual.material = SimpleMaterial(
                Image.fromarray(self.texture), name=stem, diffuse=white, ambient=white, specular=[0, 0, 0, 255]
            )
        text, beside = export_obj(
            self._trimesh(visual, TO_Y_UP),
            include_normals=True,
            return_texture=True,
            mtl_name=f"{stem}.mtl",
            header="prd: +Y up, front +Z",
        )
        return text.encode(), beside

    def _ply(self) -> bytes:
        vertices, faces, first = weld(self.vertices, self.faces)
        out = trimesh.Trimesh(
            vertices,
            faces,
            vertex_normals=self.vertex_normals[first],
            vertex_colors=to_bytes(self.vertex_colors[first]),
            process=False,
        )
        return _bytes(out.export(file_type="ply", vertex_normal=True))


def extract_mesh(
    field: Field,
    resolution: int = 96,
    *,
    target_faces: int | None = 10_000,
    texture_size: int | None = 1024,
    keep: Literal["largest", "all"] = "largest",
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> list[Mesh]:
    """The coloured meshes of a field's B samples, zero level of its signed distance.

    resolution     nodes an axis of the grid over the scene's cube, at least 2
    batch, device  of a field that does not tell by itself, as in `extract_isosurface`
    the others     as in `build_meshes`

    Raises EmptySurfaceError where a sample has no surface, ValueError for arguments out of range or a field that is
    not finite.
    """
    _check(target_faces, texture_size, keep)  # before the costly part
    with torch.no_grad():
        surfaces = extract_isosurface(field, resolution, batch=batch, device=device)
    return build_meshes(field, surfaces, target_faces=target_faces, texture_size=texture_size, keep=keep)


def build_meshes(
    field: Field,
    surfaces: Sequence[tuple[Tensor, Tensor]],
    *,
    target_faces: int | None = 10_000,
    texture_size: int | None = 1024,
    keep: Literal["largest", "all"] = "largest",
) -> list[Mesh]:
    """Coloured meshes from the raw surfaces of a field's B samples: clean, decimate, unwrap, bake.

    surfaces       B pairs of tensors: vertices [V, 3] in scene units, faces [F, 3]
    target_faces   triangles to decimate to, None for all; more are kept where fewer would change the topology
    texture_size   side of the baked texture in texels, None for vertex colours alone
    keep           "largest": the piece with the largest volume; "all": every piece but dust. Cavities go either way

    Raises ValueError for arguments out of range and for a field whose colours are not finite.
    """
    _check(target_faces, texture_size, keep)
    device = surfaces[0][0].device
    cleaned = [clean(_numpy(vertices), _numpy(faces), keep) for vertices, faces in surfaces]
    if target_faces is not None:
        cleaned = [decimate(vertices, faces, target_faces) for vertices, faces in cleaned]
    colors = query_rgb(field, [vertices for vertices, _ in cleaned], device)
    normals = [_normals(vertices, faces) for vertices, faces in cleaned]
    if texture_size is None:
        return [Mesh(v, f, n, c) for (v, f), n, c in zip(cleaned, normals, colors, strict=True)]
    charts = [unwrap(vertices, faces, texture_size) for vertices, faces in cleaned]
    texels = [
        texel_points(v[source], f, uv, texture_size) for (v, _), (source, f, uv) in zip(cleaned, charts, strict=True)
    ]
    baked = query_rgb(field, [t.points for t in texels], device)
    return [
        Mesh(v[source], f, n[source], c[source], uv, paint(t, rgb))
        for (v, _), (source, f, uv), n, c, t, rgb in zip(cleaned, charts, normals, colors, texels, baked, strict=True)
    ]


def clean(vertices: NDArray[np.float32], faces: NDArray[np.int64], keep: Literal["largest", "all"]) -> Surface:
    """Weld, drop floating pieces, and turn the winding outward.

    vertices [V, 3], faces [F, 3] of consistent winding; keep as in `build_meshes`. Raises ValueError if no piece
    encloses a volume.
    """
    vertices, faces, _ = weld(vertices, faces)
    adjacency = trimesh.Trimesh(vertices, faces, process=False).face_adjacency
    label = trimesh.graph.connected_component_labels(adjacency, node_count=len(faces))  # [F]
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    volume = np.bincount(label, (a * np.cross(b, c)).sum(1) / 6)  # signed, per piece
    largest = int(np.abs(volume).argmax())
    if volume[largest] == 0:
        raise ValueError(f"faces={faces.shape}: the surface encloses no volume")
    outward = volume * np.sign(volume[largest])  # negative: a cavity, which nobody sees
    wanted = outward > DUST * outward[largest] if keep == "all" else np.arange(len(volume)) == largest
    faces = faces[wanted[label]]
    return _compact(vertices, faces[:, ::-1] if volume[largest] < 0 else faces)


def weld(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> tuple[*Surface, NDArray[np.int64]]:
    """Merge vertices at one position (to 1e-6 scene units) and drop what collapses: slivers and pairs of equal faces.

    Returns vertices [V', 3], faces [F', 3] and first [V'], a vertex of the input at each position.
    """
    snapped = np.round(vertices.astype(np.float64) / WELD).astype(np.int64)
    _, first, merged = np.unique(snapped, axis=0, return_index=True, return_inverse=True)
    faces = merged.reshape(-1)[faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (c != a)]
    _, same, count = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    faces = faces[count[same.reshape(-1)] == 1]  # two faces back to back enclose nothing: both go, edges stay paired
    return (snapped[first] * WELD).astype(np.float32), faces, first


def decimate(vertices: NDArray[np.float32], faces: NDArray[np.int64], target_faces: int) -> Surface:
    """Simplify by quadric edge collapse to about `target_faces` triangles.

    A closed surface stays closed and keeps its topology: where the collapse would pinch a thin part, the target is
    doubled until it does not, at last leaving the surface as it is.
    """
    before = trimesh.Trimesh(vertices, faces, process=False)
    while target_faces < len(faces):
        points, triangles = fast_simplification.simplify(vertices, faces.astype(np.int32), target_count=target_faces)
        welded, kept, _ = weld(points, triangles.astype(np.int64))
        result = _compact(welded, kept)
        after = trimesh.Trimesh(*result, process=False)
        if not before.is_watertight or (after.is_watertight and after.euler_number == before.euler_number):
            return result
        target_faces *= 2
    return vertices, faces


def query_rgb(field: Field, points: Sequence[NDArray[np.float32]], device: torch.device) -> list[NDArray[np.float32]]:
    """Colours in [0, 1] at other points for each of a field's B samples.

    points: B arrays [N_b, 3]. Returns B arrays [N_b, 3]. Raises ValueError where the field gives NaN or infinity.
    """
    longest = max(len(p) for p in points)
    padded = torch.zeros(len(points), longest, 3)
    for row, p in zip(padded, points, strict=True):
        row[: len(p)] = torch.from_numpy(p)
    step = max(1, QUERY // len(points))
    with torch.no_grad():
        parts = [field.rgb(padded[:, i : i + step].to(device)).float().cpu() for i in range(0, longest, step)]
    rgb = torch.cat(parts, dim=1)
    if not bool(torch.isfinite(rgb).all()):
        raise ValueError("field.rgb: gave NaN or infinity on the surface; the generator that made the field diverged")
    return [row[: len(p)].clamp(0, 1).numpy() for row, p in zip(rgb, points, strict=True)]


def srgb_to_linear(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Display values in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _check(target_faces: int | None, texture_size: int | None, keep: str) -> None:
    if keep not in ("largest", "all"):
        raise ValueError(f"keep={keep!r}: must be 'largest' or 'all'")
    if target_faces is not None and target_faces < 4:
        raise ValueError(f"target_faces={target_faces}: must be at least 4, or None to keep every triangle")
    if texture_size is not None and not 16 <= texture_size <= 8192:
        raise ValueError(f"texture_size={texture_size}: must lie in 16..8192, or be None for vertex colours alone")


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()


def _normals(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit vertex normals [V, 3], weighted by the angle of each face at the vertex."""
    return trimesh.Trimesh(vertices, faces, process=False).vertex_normals.astype(np.float32)


def _compact(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> Surface:
    """Drop the vertices that no face uses."""
    used, inverse = np.unique(faces, return_inverse=True)
    return vertices[used], inverse.reshape(faces.shape)


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
