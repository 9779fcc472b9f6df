"""Meshes: from a field to a clean, closed, textured surface on disk.

extract_surfaces -> clean (weld, keep one piece, outward) -> decimate -> unwrap -> bake -> Mesh.export

Colours are display (sRGB) values, as fields give them. Coordinates are the scene's (+Z up, front +X) everywhere but in
the files whose convention is Y up: see `Mesh.export`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray

from prd.fields.fast import one_sample
from prd.fields.protocol import Field
from prd.isosurface.coarse_to_fine import extract_coarse_to_fine
from prd.isosurface.extract import extract_isosurface
from prd.isosurface.marching_cubes import Surface
from prd.meshes.charts import charts_of
from prd.meshes.edges import topology_of
from prd.meshes.export import SUFFIXES, Export, ExportKeywords, export_mesh, to_trimesh
from prd.meshes.handles import close_handles
from prd.meshes.normals import FineSurface, in_tangent_space, tangents
from prd.meshes.options import MeshKeywords, MeshOptions, mesh_options
from prd.meshes.simplify import NEAR, clean, decimate, merge_near, vertex_normals, weld
from prd.meshes.texture import paint, texel_points, texture_size, unwrap
from prd.meshes.vertex_colors import fitted_colors

__all__ = ["SUFFIXES", "Mesh", "MeshOptions", "build_mesh", "extract_mesh", "extract_surfaces"]

logger = logging.getLogger(__name__)

MANY_CHARTS = 20
QUERY = 1 << 18  # points in one call of field.rgb


@dataclass(frozen=True)
class Mesh:
    """One coloured triangle mesh in scene units, +Z up, front +X.

    vertices       [V, 3]  float32; vertices on a texture cut appear once per chart, at the same position
    faces          [F, 3]  int64, counter-clockwise seen from outside
    vertex_normals [V, 3]  float32, unit, outward, continuous across texture cuts
    vertex_colors  [V, 3]  float32 in [0, 1], sRGB
    uv             [V, 2]  float32 in [0, 1], v up; None without a texture
    texture        [H, W, 3]  uint8 sRGB, row 0 at v = 1; None without a texture
    metadata       what made it, stored in its files: prompt, seed, model, licence; values that JSON holds
    normal_map     [H, W, 3]  uint8, normals in the texture's tangent space, Y up; None without one
    metallic, roughness   of the material, in [0, 1]
    lods           coarser levels of detail of the same object, the next finest first
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int64]
    vertex_normals: NDArray[np.float32]
    vertex_colors: NDArray[np.float32]
    uv: NDArray[np.float32] | None = None
    texture: NDArray[np.uint8] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    lods: tuple[Mesh, ...] = ()
    normal_map: NDArray[np.uint8] | None = None
    metallic: float = 0.0
    roughness: float = 1.0

    def __repr__(self) -> str:
        size = "None" if self.texture is None else f"{self.texture.shape[1]}x{self.texture.shape[0]}"
        return f"Mesh(vertices={len(self.vertices)}, faces={len(self.faces)}, texture={size})"

    def __post_init__(self) -> None:
        count = len(self.vertices)
        for name, width in (("vertices", 3), ("vertex_normals", 3), ("vertex_colors", 3), ("uv", 2)):
            value = getattr(self, name)
            if value is not None and value.shape != (count, width):
                raise ValueError(f"{name}={value.shape}: expected ({count}, {width}), one row per vertex")
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{name}: holds NaN or infinity; check the field it was made from")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3 or len(self.faces) == 0:
            raise ValueError(f"faces={self.faces.shape}: expected [F, 3] with at least one face")
        if self.faces.min() < 0 or self.faces.max() >= count:
            raise ValueError(f"faces: indices {self.faces.min()}..{self.faces.max()} must lie in 0..{count - 1}")
        if (self.uv is None) != (self.texture is None):
            raise ValueError("uv and texture: give both or neither")
        if self.normal_map is not None and self.texture is None:
            raise ValueError("normal_map: needs uv and texture; give them too")

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
        """Return True if every edge belongs to exactly two faces of opposite direction (texture cuts closed)."""
        return bool(self._welded.is_watertight and self._welded.is_winding_consistent)

    @property
    def euler_number(self) -> int:
        """V - E + F of the surface, texture cuts closed: 2 for a sphere, 0 for a torus."""
        return int(self._welded.euler_number)

    def to_trimesh(self) -> trimesh.Trimesh:
        """The mesh in trimesh, in the scene's axes, with its texture in a PBR material or else its vertex colours."""
        return to_trimesh(self)

    def export(self, path: str | os.PathLike[str], **options: Unpack[ExportKeywords]) -> Path:
        """Write the mesh; the suffix names the format. Returns the path.

        .glb   glTF 2.0 binary, in metres: +Y up, front +Z; base colour texture, or without a texture linear COLOR_0 in
               16 bits, in a PBR material; `normal_map` and tangents; `metadata` in asset.extras; `lods` under MSFT_lod
        .gltf  the same as JSON, in one file
        .obj   +Y up, front +Z, as most readers expect; NAME.mtl, NAME.png and NAME_normal.png beside it, or colours on
               the v lines
        .ply   +Y up, front +Z; welded, with vertex colours. Blender's importer takes it for +Z up: give up="z" for it
        .stl   for printers, in millimetres: +Z up, front -Y, welded, its lowest corner at the origin
        .3mf   as .stl, with vertex colours
        .usdz  in metres, +Y up, front +Z, as .glb; needs usd-core, the extra `usd`

        up       "y" (+Y up, front +Z) or "z" (+Z up, front -Y) of .obj, .ply and .stl; None: as above
        height   of the object, a number and its unit (mm, cm, m, in), as "60mm"; None: a scene unit is 1 m, 50 mm for
                 printers. .obj and .ply say no unit and take no height
        picture  "png" or "webp" (lossless; a smaller file for readers of EXT_texture_webp) of .glb and .gltf
        compress "draco": the geometry of .glb and .gltf, for readers of KHR_draco_mesh_compression; needs DracoPy, the
                 extra `draco`; positions in 14 bits, normals in 10, texture coordinates in 12

        The file that `path` names is replaced. Those beside it are replaced only where they say that they were
        written for this .obj; else they are called NAME_2, NAME_3, ... NAME is the .obj's own, with other characters
        than ASCII letters, digits and "._-" left out, for not every reader takes them.

        Each file is written aside and renamed, so that a reader never sees half of one. Raises ValueError for another
        suffix and options that the format does not have, and OSError where the folder cannot be written.
        """
        return export_mesh(self, Export(path, **options, levels=1 + len(self.lods)))


def extract_mesh(
    field: Field,
    options: MeshOptions | None = None,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    **keywords: Unpack[MeshKeywords],
) -> list[Mesh | None]:
    """Return the coloured meshes of a field's B samples, the zero level of its signed distance.

    options, keywords  `MeshOptions`, and those to replace in them
    batch, device      of a field that does not tell by itself, as in `extract_isosurface`

    Raises EmptySurfaceError where a sample has no surface (with on_empty="flag" its mesh is None), ValueError for
    options out of range or a field that is not finite.
    """
    options = mesh_options(options, keywords)  # before the costly part
    surfaces = extract_surfaces(field, options, batch=batch, device=device)
    samples = [one_sample(field, i, batch) if batch > 1 else field for i in range(batch)]
    return [
        None if surface is None else build_mesh(sample, surface, options)
        for sample, surface in zip(samples, surfaces, strict=True)
    ]


@torch.no_grad()
def extract_surfaces(
    field: Field, options: MeshOptions, *, batch: int = 1, device: torch.device | str = "cpu"
) -> list[Surface | None]:
    """Return the raw surface of each of a field's B samples; None for one without, if `options.on_empty` flags it.

    Raises EmptySurfaceError otherwise, and ValueError for a field that is not finite.
    """
    extract: Any = extract_isosurface
    if options.coarse_factor is not None:
        extract = partial(extract_coarse_to_fine, factor=options.coarse_factor)
    resolution, on_empty = options.isosurface_resolution, options.on_empty
    surfaces = extract(field, resolution, batch=batch, device=device, on_empty=on_empty)
    return [None if on_empty == "flag" and not len(surface[1]) else surface for surface in surfaces]


def build_mesh(
    field: Field, surface: Surface, options: MeshOptions | None = None, **keywords: Unpack[MeshKeywords]
) -> Mesh:
    """Return the coloured mesh of the raw surface of a field of one sample: clean, decimate, unwrap, bake.

    A warning says how many handles were closed, and which number of triangles could not be met.

    Raises ValueError for options out of range, a surface that encloses no volume and a field whose colours are not
    finite.
    """
    options = mesh_options(options, keywords)
    device = surface[0].device
    raw_vertices, raw_faces = (tensor.detach().cpu().numpy() for tensor in surface)
    vertices, faces = clean(raw_vertices, raw_faces, options.keep)
    if options.close_handles and topology_of(faces).is_closed:
        vertices, faces, closed = close_handles(vertices, faces, options.close_handles)
        if closed:
            logger.warning(
                "closed %d handle(s) narrower than %g scene units; close_handles=0 (--close-handles 0) keeps them",
                *(closed, options.close_handles),
            )
    fine = FineSurface(vertices, vertex_normals(vertices, faces)) if options.normal_map else None
    levels: list[Mesh] = []
    for level in range(options.lods):
        target = options.target_faces or len(faces)
        vertices, faces = _simplified(vertices, faces, max(4, target >> 2 * level), options)
        mesh = _coloured(field, vertices, faces, options, device, fine)
        levels.append(replace(mesh, metallic=options.metallic, roughness=options.roughness))
    return replace(levels[0], lods=tuple(levels[1:]))


def _simplified(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], target: int, options: MeshOptions
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return a surface of at most `target` triangles, or of as few as can be had, with a warning."""
    vertices, faces = merge_near(*decimate(vertices, faces, target, options.topology))
    if len(faces) > target:
        remedy = "" if options.topology == "free" else "; topology='free' (--topology free) changes it"
        logger.warning(
            "target_faces=%d: %d triangles were reached, for fewer would change the topology%s",
            *(target, len(faces), remedy),
        )
    elif not topology_of(faces).is_closed:
        logger.warning("target_faces=%d: the surface of so few triangles is not closed; take more", target)
    return vertices, faces


def _coloured(
    field: Field,
    vertices: NDArray[np.float32],
    faces: NDArray[np.int64],
    options: MeshOptions,
    device: torch.device,
    fine: FineSurface | None,
) -> Mesh:
    """Return the mesh of a simplified surface with a field's colours, per vertex or in a texture."""
    rgb = partial(query_rgb, field, device=device)
    if options.texture_size is None:
        colors = fitted_colors(vertices, faces, rgb)
        return Mesh(vertices, faces, vertex_normals(vertices, faces), colors)
    size = options.texture_size
    if size == "auto":
        size = texture_size(vertices, faces, rgb)
    source, charted, uv = unwrap(vertices, faces, size)
    if charts_of(charted, len(uv))[0] > MANY_CHARTS:  # of needles, on which a chart's growth stops: merge more of them
        vertices, faces = merge_near(vertices, faces, 2 * NEAR)
        source, charted, uv = unwrap(vertices, faces, size)
    colors, normals = fitted_colors(vertices, faces, rgb)[source], vertex_normals(vertices, faces)[source]
    vertices, faces = vertices[source], charted
    parts = [vertices] if fine is None else [vertices, normals, tangents(vertices, faces, normals, uv)]
    texels = texel_points(np.hstack(parts), faces, uv, size)
    points = texels.points[:, :3]
    texture, bumps = paint(texels, rgb(points)), None
    if fine is not None:
        smooth, along = texels.points[:, 3:6], texels.points[:, 6:]
        bumps = paint(texels, in_tangent_space(fine.normals_at(points, smooth), smooth, along))
    return Mesh(vertices, faces, normals, colors, uv, texture, normal_map=bumps)


@torch.no_grad()
def query_rgb(field: Field, points: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Return the colours [N, 3] in [0, 1] of a field of one sample at points [N, 3].

    Raises ValueError where the field gives NaN or infinity.
    """
    asked = torch.from_numpy(points)[None]
    parts = [field.rgb(part.to(device)).float().cpu() for part in asked.split(QUERY, dim=1)]
    rgb = torch.cat(parts, dim=1)[0]
    if not bool(torch.isfinite(rgb).all()):
        raise ValueError("field.rgb: gave NaN or infinity on the surface; the model that made the field diverged")
    return rgb.clamp(0, 1).numpy()
