"""Options of mesh extraction: one set for the pipelines, the command line and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, TypedDict

from prd.utils.arguments import check_int, is_bool

MAX_RESOLUTION = 2048  # nodes per axis: 8.6e9 nodes
MAX_LODS = 8  # the last has 4^-7 of the triangles
TEXTURE_SIZES = (16, 8192)  # texels per side: below, charts find no room; above, readers and GPUs refuse the picture


@dataclass(frozen=True)
class MeshOptions:
    """Options of mesh extraction, checked when they are made; ValueError names the one that is out of its range.

    isosurface_resolution  nodes per axis of the isosurface grid over [-1, 1]^3
    target_faces           triangles to simplify to, None for all; a warning names the number that was reached where
                           fewer would change the topology
    topology               "keep" it when simplifying, or leave it "free": thin parts and handles may go
    close_handles          width, scene units: narrower handles and tunnels are closed first, with a warning; 0: none
    texture_size           texels per side of the baked texture, "auto" by the detail of the colours, None for vertex
                           colours
    lods                   levels of detail: each further one, in `Mesh.lods`, has a quarter of the triangles
    keep                   "all" pieces but dust (below 1 % of the largest), or the "largest" alone
    normal_map             bake the normals of the surface before simplifying into a second picture, for .glb, .gltf,
                           .obj and .usdz; needs a texture
    metallic, roughness    of the material, in [0, 1], in the same formats; the default is a plain one
    on_empty               no surface found: "raise" EmptySurfaceError, or "flag" it by a mesh that is None
    coarse_factor          None: evaluate every node of the grid. An integer: evaluate the field only near the surface,
                           found on a grid so many times coarser, which takes less memory and, from about 256^3 nodes
                           or without a fast grid of the field's own, less time. Not the same mesh for certain: a sheet,
                           hole or loose piece thinner than 2 coarse_factor / (isosurface_resolution - 1) scene units
                           may be missed, and nothing tells. Thin parts that hang together with thicker ones are found
    """

    isosurface_resolution: int = 160
    target_faces: int | None = 10_000
    texture_size: int | Literal["auto"] | None = "auto"
    keep: Literal["all", "largest"] = "all"
    on_empty: Literal["raise", "flag"] = "raise"
    coarse_factor: int | None = None
    topology: Literal["keep", "free"] = "keep"
    close_handles: float = 0.1
    lods: int = 1
    normal_map: bool = False
    metallic: float = 0.0
    roughness: float = 1.0

    def __post_init__(self) -> None:
        self._check_int("isosurface_resolution", 2, MAX_RESOLUTION)
        if self.target_faces is not None:
            self._check_int("target_faces", 4, None, "or None to keep every triangle")
        if self.texture_size is not None and self.texture_size != "auto":
            self._check_int("texture_size", *TEXTURE_SIZES, "or None for vertex colours alone, or 'auto'")
        check_one_of("keep", self.keep, ("all", "largest"))
        check_one_of("on_empty", self.on_empty, ("raise", "flag"))
        check_one_of("topology", self.topology, ("keep", "free"))
        self._check_real("close_handles", 2, "a width in 0..2 scene units; 0 closes none")
        self._check_real("metallic", 1, "in 0..1; 0 is no metal")
        self._check_real("roughness", 1, "in 0..1; 1 is matt")
        if not is_bool(self.normal_map):
            raise ValueError(f"normal_map={self.normal_map!r}: must be True or False")
        if self.normal_map and self.texture_size is None:
            raise ValueError("normal_map=True: needs a texture to lie beside; leave it out, or give a texture_size")
        self._check_int("lods", 1, MAX_LODS)
        if self.coarse_factor is not None:
            self._check_int("coarse_factor", 2, self.isosurface_resolution - 1, "or None")

    def _check_real(self, name: str, most: float, allowed: str) -> None:
        """Keep a number as Python's; ValueError unless it is one in 0..most."""
        value: Any = getattr(self, name)
        if is_bool(value) or not isinstance(value, Real) or not 0 <= float(value) <= most:
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        object.__setattr__(self, name, float(value))

    def _check_int(self, name: str, least: int, most: int | None, otherwise: str = "") -> None:
        """Keep an integer of numpy or torch as Python's; ValueError unless it is one in least..most."""
        object.__setattr__(self, name, check_int(name, getattr(self, name), least, most, otherwise))


class MeshKeywords(TypedDict, total=False):
    """`MeshOptions` as the keyword arguments of a call, for type checkers."""

    isosurface_resolution: int
    target_faces: int | None
    texture_size: int | Literal["auto"] | None
    keep: Literal["all", "largest"]
    on_empty: Literal["raise", "flag"]
    coarse_factor: int | None
    topology: Literal["keep", "free"]
    close_handles: float
    lods: int
    normal_map: bool
    metallic: float
    roughness: float


def mesh_options(options: MeshOptions | None, keywords: Mapping[str, Any]) -> MeshOptions:
    """Return `options` (None: the defaults) with some of them replaced; TypeError for an option that there is not."""
    if not isinstance(options, MeshOptions | None):
        raise TypeError(f"options={options!r}: must be MeshOptions; give one by its name, as target_faces=1000")
    names = [field.name for field in fields(MeshOptions)]
    if unknown := [name for name in keywords if name not in names]:
        raise TypeError(f"{unknown[0]}=: is no option of a mesh; there are {', '.join(names)}")
    return replace(options or MeshOptions(), **keywords)


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
