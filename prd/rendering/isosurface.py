"""From a signed distance on a grid to a mesh: differentiable marching cubes, welded and without holes.

The grid's nodes are R equally spaced points an axis from -1 to 1, both ends included, indexed [x, y, z]; a cell is the
cube between eight nodes. Topology is read off the signs alone; the vertices are differentiable in the signed distance
and in the offsets of the nodes (the "dual" freedom of DMTet and DiffMC: every node may move by half a cell).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from prd.fields import Field
from prd.rendering._cube_cases import EDGES, MAX_TRIANGLES, cube_cases

MAX_DEFORMATION = 0.5  # cells; up to here neighbouring nodes cannot pass each other
TINY = 1e-12  # keeps the interpolation's derivative finite in float32 where both ends of an edge are almost zero

Mesh = tuple[Tensor, Tensor]  # vertices [V, 3] in scene units, faces [F, 3] int64


class EmptySurfaceError(ValueError):
    """A signed distance without a sign change has no surface. `samples` lists the batch indices concerned."""

    def __init__(self, samples: list[int], resolution: int) -> None:
        self.samples = samples
        super().__init__(
            f"field: no surface in sample(s) {samples}: the signed distance has one sign on all {resolution}^3 nodes; "
            "try another seed or prompt or a higher resolution, and in training use ensure_surface"
        )


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of a case's triangles [256, 3 * MAX_TRIANGLES], -1 padded; an edge's axis [12] and base corner [12, 3]."""
    rows = torch.full((256, 3 * MAX_TRIANGLES), -1, dtype=torch.int64)
    for case, triangles in enumerate(cube_cases()):
        flat = [edge for triangle in triangles for edge in triangle]
        rows[case, : len(flat)] = torch.tensor(flat, dtype=torch.int64)
    axes = torch.tensor([axis for axis, _ in EDGES])
    corners = torch.tensor([corner for _, corner in EDGES])
    return rows.to(device), axes.to(device), corners.to(device)


def _case_of_cells(inside: Tensor) -> Tensor:
    """Case number [X-1, Y-1, Z-1] of each cell: bit 4 x + 2 y + z for corner (x, y, z), built one axis at a time."""
    bits = inside.to(torch.uint8)
    bits = bits[:, :, :-1] | bits[:, :, 1:] << 1
    bits = bits[:, :-1] | bits[:, 1:] << 2
    return bits[:-1] | bits[1:] << 4


@torch.no_grad()
def _topology(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Cut edges [2, V] (linear indices of their two nodes) and faces [F, 3] that index them; inside bool [X, Y, Z]."""
    device, nodes = inside.device, inside.numel()
    _, ny, nz = inside.shape
    strides = (ny * nz, nz, 1)
    vertex_of_edge = torch.empty(3 * nodes, dtype=torch.int32, device=device)  # read only where an edge is cut
    ends, count = [], 0
    for axis in range(3):
        cut = torch.zeros_like(inside)
        low, high = inside.narrow(axis, 0, inside.shape[axis] - 1), inside.narrow(axis, 1, inside.shape[axis] - 1)
        torch.bitwise_xor(low, high, out=cut.narrow(axis, 0, inside.shape[axis] - 1))
        base = cut.view(-1).nonzero()[:, 0]
        vertex_of_edge[axis * nodes + base] = torch.arange(count, count + len(base), dtype=torch.int32, device=device)
        ends.append(torch.stack([base, base + strides[axis]]))
        count += len(base)
    rows, axes, corners = _tables(device)
    case = _case_of_cells(inside)
    flat = case.view(-1)
    active = ((flat != 0) & (flat != 255)).nonzero()[:, 0]
    cell_z = active % (nz - 1)
    cell_xy = active // (nz - 1)
    first_node = (cell_xy // (ny - 1)) * strides[0] + cell_xy % (ny - 1) * strides[1] + cell_z
    offset = axes * nodes + corners @ torch.tensor(strides, device=device)  # of an edge's entry from its cell's
    edges = rows[flat[active].long()]  # [cells, 15]
    cell, slot = (edges >= 0).nonzero(as_tuple=True)
    faces = vertex_of_edge[first_node[cell] + offset[edges[cell, slot]]]
    return torch.cat(ends, dim=1), faces.long().view(-1, 3)


def marching_cubes(sdf: Tensor, deformation: Tensor | None = None, level: float = 0.0) -> Mesh:
    """The surface sdf = level of one grid, inside where sdf < level.

    sdf          [X, Y, Z]     any unit, at least 2 nodes an axis
    deformation  [X, Y, Z, 3]  offsets of the nodes in cells, limited here to +-0.5 (DiffMC's semantics)

    Returns vertices [V, 3] in cells (node (i, j, k) lies at (i, j, k)), differentiable in both arguments, and faces
    [F, 3] int64, counter-clockwise seen from outside. Vertices are shared between faces; every edge belongs to two
    faces except where the surface leaves the grid (see `pad_border`). Without a sign change both are empty. Lorensen
    and Cline 1987 with the consistent table of `_cube_cases`. Raises ValueError for a wrong shape or non-finite values.
    """
    if sdf.ndim != 3 or min(sdf.shape) < 2:
        raise ValueError(f"sdf={tuple(sdf.shape)}: expected [X, Y, Z] with at least 2 nodes an axis")
    if deformation is not None and deformation.shape != (*sdf.shape, 3):
        raise ValueError(f"deformation={tuple(deformation.shape)}: expected {(*sdf.shape, 3)}, one offset a node")
    if not bool(torch.isfinite(sdf.detach().sum())) and not bool(torch.isfinite(sdf).all()):
        raise ValueError("sdf: holds NaN or infinity; a surface needs finite values, look for a diverged network")
    ends, faces = _topology(sdf.detach() < level)
    _, ny, nz = sdf.shape
    nodes = torch.stack([ends // (ny * nz), ends // nz % ny, ends % nz], dim=-1).to(sdf.dtype)  # [2, V, 3]
    if deformation is not None:
        nodes = nodes + deformation.reshape(-1, 3)[ends].clamp(-MAX_DEFORMATION, MAX_DEFORMATION)
    low, high = sdf.reshape(-1)[ends] - level
    sign = torch.where(low.detach() < 0, 1.0, -1.0).to(sdf.dtype)
    t = -low * sign / ((high - low) * sign).clamp_min(TINY)
    return nodes[0] + t[:, None] * (nodes[1] - nodes[0]), faces


def pad_border(sdf: Tensor, deformation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Surround grids with one layer of outside nodes, so that their surfaces close.

    sdf [..., X, Y, Z] -> [..., X+2, Y+2, Z+2]; deformation [..., X, Y, Z, 3] likewise, with zeros. The new value is
    the largest |sdf|, hence the surface passes at most half a cell outside the old border. Subtract 1 from vertices.
    """
    outside = float(sdf.detach().abs().amax().clamp_min(TINY))
    padded = torch.nn.functional.pad(sdf, (1,) * 6, value=outside)
    if deformation is None:
        return padded, None
    return padded, torch.nn.functional.pad(deformation, (0, 0) + (1,) * 6)


def _is_border(resolution: int, device: torch.device) -> Tensor:
    border = torch.ones(resolution, resolution, resolution, dtype=torch.bool, device=device)
    border[1:-1, 1:-1, 1:-1] = False
    return border


def ensure_surface(sdf: Tensor) -> tuple[Tensor, Tensor]:
    """Give every sample a surface, in training (the paper's supplement, after InstantMesh).

    sdf [B, R, R, R]. Where all nodes are outside, the centre (one node for odd R, eight for even) is forced inside;
    where all are inside, the border is forced outside, to minus their own value, so that the faces lie half-way.
    The forced nodes pass gradients on unchanged. Returns (sdf, corrected bool [B]); the others are left as they are.
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
    return sdf + torch.where(nodes, forced - value, 0.0), corrected


def grid_points(resolution: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Nodes [R, R, R, 3] of the scene's cube, from -1 to 1 along each axis, indexed [x, y, z]."""
    if resolution < 2:
        raise ValueError(f"resolution={resolution}: must be at least 2 nodes an axis")
    axis = torch.linspace(-1, 1, resolution, device=device, dtype=dtype)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def evaluate_grid(
    field: Field, resolution: int, batch: int = 1, device: torch.device | str = "cpu", chunk: int = 1 << 18
) -> tuple[Tensor, Tensor | None]:
    """Signed distance [B, R, R, R] and deformation [B, R, R, R, 3] (or None) at the nodes of `grid_points`.

    Uses the field's own `grid(R) -> (sdf, rgb, deformation)` if it has one, else `sdf_and_deformation` on chunks of
    that many points; `batch` and `device` say for which points then.
    """
    grid: Callable[[int], tuple[Tensor, Tensor, Tensor | None]] | None = getattr(field, "grid", None)
    if grid is not None:
        sdf, _, deformation = grid(resolution)
        return sdf, deformation
    points = grid_points(resolution, device).view(1, -1, 3).expand(batch, -1, -1)
    parts = [field.sdf_and_deformation(p) for p in points.split(chunk, dim=1)]
    shape = (batch, resolution, resolution, resolution)
    sdf = torch.cat([part[0] for part in parts], dim=1).view(shape)
    if parts[0][1] is None:
        return sdf, None
    return sdf, torch.cat([cast(Tensor, part[1]) for part in parts], dim=1).view(*shape, 3)


def grid_to_meshes(sdf: Tensor, deformation: Tensor | None, level: float = 0.0) -> list[Mesh]:
    """One closed mesh a sample from grids over the scene's cube: sdf [B, R, R, R], deformation [B, R, R, R, 3].

    Vertices in scene units. The border is padded where the surface would leave the cube. A sample without a sign
    change raises EmptySurfaceError.
    """
    resolution, inside = sdf.shape[1], sdf.detach() < level
    has_both = inside.flatten(1).any(dim=1) & ~inside.flatten(1).all(dim=1)
    if not bool(has_both.all()):
        raise EmptySurfaceError((~has_both).nonzero()[:, 0].tolist(), resolution)
    leaves = (inside & _is_border(resolution, sdf.device)).flatten(1).any(dim=1).tolist()
    meshes = []
    for index, values in enumerate(sdf):
        offsets = None if deformation is None else deformation[index]
        if leaves[index]:
            values, offsets = pad_border(values - level, offsets)
            vertices, faces = marching_cubes(values, offsets)
            vertices = vertices - 1
        else:
            vertices, faces = marching_cubes(values, offsets, level)
        meshes.append((vertices * (2 / (resolution - 1)) - 1, faces))
    return meshes


def extract_isosurface(
    field: Field,
    resolution: int,
    *,
    level: float = 0.0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 18,
) -> list[Mesh]:
    """The surfaces of a field's B samples: [(vertices [V, 3] in scene units, faces [F, 3]), ...], closed, outward.

    resolution is R, the nodes an axis; `batch`, `device` and `chunk` as in `evaluate_grid`. Differentiable in the
    field. Raises EmptySurfaceError where a sample has no surface.
    """
    sdf, deformation = evaluate_grid(field, resolution, batch, device, chunk)
    return grid_to_meshes(sdf, deformation, level)
