"""Options of mesh extraction: one set for the pipelines, the command line and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from prd.utils.arguments import check_int

MAX_RESOLUTION = 2048  # nodes per axis: 8.6e9 nodes
TEXTURE_SIZES = (16, 8192)  # texels per side: below, charts find no room; above, readers and GPUs refuse the picture


@dataclass(frozen=True)
class MeshOptions:
    """Options of mesh extraction, checked when they are made; ValueError names the one that is out of its range.

    isosurface_resolution  nodes per axis of the isosurface grid over [-1, 1]^3
    target_faces           triangles to simplify to (more where fewer would change the topology), None for all
    texture_size           texels per side of the baked texture, None for vertex colours
    keep                   "all" pieces but dust (below 1 % of the largest), or the "largest" alone
    on_empty               no surface found: "raise" EmptySurfaceError, or "flag" it by a mesh that is None
    coarse_factor          None: evaluate every node of the grid. An integer: evaluate the field only near the surface,
                           found on a grid so many times coarser, which takes less memory and, from about 256^3 nodes
                           or without a fast grid of the field's own, less time. Not the same mesh for certain: a sheet,
                           hole or loose piece thinner than 2 coarse_factor / (isosurface_resolution - 1) scene units
                           may be missed, and nothing tells. Thin parts that hang together with thicker ones are found
    """

    isosurface_resolution: int = 160
    target_faces: int | None = 10_000
    texture_size: int | None = 1024
    keep: Literal["all", "largest"] = "all"
    on_empty: Literal["raise", "flag"] = "raise"
    coarse_factor: int | None = None

    def __post_init__(self) -> None:
        self._check_int("isosurface_resolution", 2, MAX_RESOLUTION)
        if self.target_faces is not None:
            self._check_int("target_faces", 4, None, "or None to keep every triangle")
        if self.texture_size is not None:
            self._check_int("texture_size", *TEXTURE_SIZES, "or None for vertex colours alone")
        check_one_of("keep", self.keep, ("all", "largest"))
        check_one_of("on_empty", self.on_empty, ("raise", "flag"))
        if self.coarse_factor is not None:
            self._check_int("coarse_factor", 2, self.isosurface_resolution - 1, "or None")

    def _check_int(self, name: str, least: int, most: int | None, otherwise: str = "") -> None:
        """Keep an integer of numpy or torch as Python's; ValueError unless it is one in least..most."""
        object.__setattr__(self, name, check_int(name, getattr(self, name), least, most, otherwise))


class MeshKeywords(TypedDict, total=False):
    """`MeshOptions` as the keyword arguments of a call, for type checkers."""

    isosurface_resolution: int
    target_faces: int | None
    texture_size: int | None
    keep: Literal["all", "largest"]
    on_empty: Literal["raise", "flag"]
    coarse_factor: int | None


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
