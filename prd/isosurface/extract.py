"""Extraction of meshes from a signed distance field: grids of its values, cut along a level.

The grid's nodes are R equally spaced points per axis from -1 to 1, both ends included, indexed [x, y, z]. How its cells
are cut is `marching_cubes` or `marching_tetrahedra`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from prd.errors import PrdError
from prd.fields.fast import Geometry, grid_slabs
from prd.fields.protocol import Field
from prd.isosurface.marching_cubes import TINY, Marching, Stitcher, Surface, marching_cubes, pad_border

Isosurface = Callable[[Tensor, Tensor | None, float], Surface]  # as `Marching.__call__`
OnEmpty = Literal["raise", "flag"]


class EmptySurfaceError(PrdError, ValueError):
    """A signed distance without a sign change has no surface. `samples` lists the batch indices concerned."""

    def __init__(self, samples: list[int], resolution: int) -> None:
        self.samples = samples
        super().__init__(
            f"field: no surface in sample(s) {samples}: the signed distance has one sign at all nodes that were "
            f"evaluated of {resolution}^3; "
            "try another seed or prompt or a higher resolution, and in training use ensure_surface"
        )


def _is_border(resolution: int, device: torch.device) -> Tensor:
    border = torch.ones(resolution, resolution, resolution, dtype=torch.bool, device=device)
    border[1:-1, 1:-1, 1:-1] = False
    return border


def ensure_surface(sdf: Tensor, *, detach: bool = False) -> tuple[Tensor, Tensor]:
    """Give every sample a surface, in training (the paper's supplement, after InstantMesh).

    sdf [B, R, R, R]. Where all nodes are outside, the centre (one node for odd R, eight for even) is forced inside;
    where all are inside, the border is forced outside, to minus their own value, so that the faces lie half-way.
    The forced nodes pass gradients on unchanged; with `detach` a corrected sample passes none at all, as InstantMesh
    has it. Returns (sdf, corrected bool [B]); the others are left as they are.
    """
    if sdf.ndim != 4 or len(set(sdf.shape[1:])) != 1 or sdf.shape[1] < 3:
        raise ValueError(f"sdf={tuple(sdf.shape)}: expected [B, R, R, R] with R >= 3")
    resolution, value = sdf.shape[1], sdf.detach()
    empty = (value >= 0).flatten(1).all(dim=1)
    full = (value < 0).flatten(1).all(dim=1)
    corrected = empty | full
    if not bool(corrected.any()):
        return sdf, corrected
    centre = torch.zeros(resolution, resolution, resolution, dtype=torch.bool, device=sdf.device)
    middle = slice((resolution - 1) // 2, resolution // 2 + 1)
    centre[middle, middle, middle] = True
    size = value.abs().clamp_min(1 / resolution)
    forced = torch.where(empty[:, None, None, None], -size, size)
    nodes = torch.where(empty[:, None, None, None], centre, _is_border(resolution, sdf.device))
    nodes = nodes & corrected[:, None, None, None]
    if detach:
        sdf = torch.where(corrected[:, None, None, None], value, sdf)
    return sdf + torch.where(nodes, forced - value, 0.0), corrected


def grid_to_meshes(
    sdf: Tensor,
    deformation: Tensor | None,
    level: float = 0.0,
    *,
    isosurface: Isosurface = marching_cubes,
    on_empty: OnEmpty = "raise",
) -> list[Surface]:
    """One closed mesh per sample from grids over the scene's cube: sdf [B, R, R, R], deformation [B, R, R, R, 3].

    Vertices in scene units. The border is padded where the surface would leave the cube. A sample without a sign
    change raises EmptySurfaceError, or with on_empty="flag" is flagged by a mesh without faces. NaN and infinity are
    ValueErrors.
    """
    _check_batch(sdf, deformation, level)
    resolution, inside = sdf.shape[1], sdf.detach() < level
    has_both = inside.flatten(1).any(dim=1) & ~inside.flatten(1).all(dim=1)
    _check_found(has_both.tolist(), resolution, on_empty)
    leaves = (inside & _is_border(resolution, sdf.device)).flatten(1).any(dim=1).tolist()
    meshes = []
    for index, values in enumerate(sdf):
        offsets = None if deformation is None else deformation[index]
        if leaves[index] and has_both[index]:
            values, offsets = pad_border(values - level, offsets)
            vertices, faces = isosurface(values, offsets, 0.0)
            vertices = vertices - 1
        else:
            vertices, faces = isosurface(values, offsets, level)
        meshes.append((vertices * (2 / (resolution - 1)) - 1, faces))
    return meshes


def _check_batch(sdf: Tensor, deformation: Tensor | None, level: float) -> None:
    if sdf.ndim != 4 or len(set(sdf.shape[1:])) != 1 or sdf.shape[1] < 2:
        raise ValueError(f"sdf={tuple(sdf.shape)}: expected [B, R, R, R] with R >= 2")
    if deformation is not None and deformation.shape != (*sdf.shape, 3):
        raise ValueError(f"deformation={tuple(deformation.shape)}: expected {(*sdf.shape, 3)}, one offset per node")
    _check_level(level)
    if not bool(torch.isfinite(sdf.detach().sum())):  # before a sample of NaN is called empty
        bad = (~torch.isfinite(sdf.detach()).flatten(1).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"sdf: holds NaN or infinity in sample(s) {bad}; look for a diverged network")


def _check_level(level: float) -> None:
    if not math.isfinite(level):
        raise ValueError(f"level={level}: must be a finite number")


def _check_found(found: list[bool], resolution: int, on_empty: OnEmpty) -> None:
    if on_empty not in ("raise", "flag"):
        raise ValueError(f"on_empty={on_empty!r}: must be 'raise' or 'flag'")
    if on_empty == "raise" and not all(found):
        raise EmptySurfaceError([index for index, has_surface in enumerate(found) if not has_surface], resolution)


def meshes_from_slabs(
    slabs: Callable[[], Iterable[Geometry]],
    resolution: int,
    level: float = 0.0,
    *,
    marching: Marching = marching_cubes,
    on_empty: OnEmpty = "raise",
) -> list[Surface]:
    """`grid_to_meshes` of grids that never exist as a whole; the same meshes, vertex by vertex.

    slabs()  begins a new pass over the grids' slabs along x, sdf [B, n, R, R] and deformation [B, n, R, R, 3] or None,
             together R planes; a second pass is made if a shape leaves the cube
    """
    _check_level(level)
    stitchers: list[Stitcher] = []
    facts = []  # of each slab [4, B]: some node inside, some outside, the border inside; the largest |sdf - level|
    first = 0
    for sdf, deformation in slabs():
        stitchers = stitchers or [Stitcher(marching, level) for _ in sdf]
        for index, stitcher in enumerate(stitchers):
            stitcher.add(sdf[index], None if deformation is None else deformation[index])
        inside = sdf.detach() < level
        on_border = torch.ones(sdf.shape[1:], dtype=torch.bool, device=sdf.device)
        on_border[int(first == 0) : len(on_border) - int(first + len(on_border) == resolution), 1:-1, 1:-1] = False
        peak = (sdf.detach() - level).abs().flatten(1).amax(dim=1)
        leaves = (inside & on_border).flatten(1).any(1)
        facts.append(torch.stack([inside.flatten(1).any(1), ~inside.flatten(1).all(1), leaves, peak]))
        first += sdf.shape[1]
    some_in, some_out, leaves, peak = torch.stack(facts).amax(dim=0).cpu()
    found = (some_in * some_out).bool().tolist()
    _check_found(found, resolution, on_empty)
    padded = [index for index in range(len(found)) if found[index] and bool(leaves[index])]
    for index, stitcher in _stitch_padded(slabs, padded, peak.clamp_min(TINY).tolist(), marching, level).items():
        stitchers[index] = stitcher
    meshes = []
    for index, stitcher in enumerate(stitchers):
        vertices, faces = stitcher.mesh()
        vertices = vertices - 1 if index in padded else vertices
        meshes.append((vertices * (2 / (resolution - 1)) - 1, faces))
    return meshes


def _stitch_padded(
    slabs: Callable[[], Iterable[Geometry]], samples: list[int], outside: list[float], marching: Marching, level: float
) -> dict[int, Stitcher]:
    """Stitchers of some samples with a layer of nodes at `outside` around the grid, as `pad_border` adds it."""
    stitchers = {index: Stitcher(marching, 0.0) for index in samples}

    def add(index: int, sdf: Tensor, deformation: Tensor | None, sides: tuple[int, int]) -> None:
        pad = (1, 1, 1, 1, *sides)
        offsets = None if deformation is None else torch.nn.functional.pad(deformation, (0, 0, *pad))
        stitchers[index].add(torch.nn.functional.pad(sdf - level, pad, value=outside[index]), offsets)

    first = True
    for sdf, deformation in slabs() if samples else ():
        for index in samples:
            add(index, sdf[index], None if deformation is None else deformation[index], (int(first), 0))
        first = False
    for index, stitcher in stitchers.items():
        values, offsets = stitcher.kept or (None, None)
        assert values is not None
        stitcher.add(torch.full_like(values, outside[index]), None if offsets is None else torch.zeros_like(offsets))
    return stitchers


def extract_isosurface(
    field: Field,
    resolution: int,
    *,
    level: float = 0.0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 18,
    marching: Marching = marching_cubes,
    max_nodes: int = 1 << 23,
    on_empty: OnEmpty = "raise",
) -> list[Surface]:
    """The surfaces of a field's B samples: [(vertices [V, 3] in scene units, faces [F, 3]), ...], closed, outward.

    resolution  R, the nodes per axis, at least 2; `batch`, `device` and `chunk` as in `evaluate_grid`
    marching    `marching_cubes` or `marching_tetrahedra`
    max_nodes   of all samples evaluated at a time: beyond, the grid is made and marched slab by slab, and the memory
                grows with R^2 and the surface instead of R^3 (without gradients; with them, the graph holds it all).
                The mesh is that of the whole grid, vertex by vertex
    on_empty    where a sample has no surface: "raise" EmptySurfaceError, or "flag" it by a mesh without faces

    Differentiable in the field. A shape that leaves the cube is evaluated twice if made in slabs.
    """
    if resolution < 2 or batch < 1:
        raise ValueError(f"resolution={resolution}, batch={batch}: must be at least 2 nodes per axis and 1 sample")
    planes = max(2, max_nodes // (batch * resolution**2))

    def slabs() -> Iterator[Geometry]:
        near = None if torch.is_grad_enabled() else level
        return grid_slabs(field, resolution, planes, batch=batch, device=device, chunk=chunk, level=near)

    if planes >= resolution:
        return grid_to_meshes(*next(slabs()), level, isosurface=marching, on_empty=on_empty)
    return meshes_from_slabs(slabs, resolution, level, marching=marching, on_empty=on_empty)
