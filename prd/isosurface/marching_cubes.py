"""Cutting the cells of a grid along a level: marching cubes, differentiable, welded and without holes.

A cell is the cube between eight nodes of a grid indexed [x, y, z]. Topology is read off the signs alone; the vertices
are differentiable in the values and in the offsets of the nodes (the "dual" freedom of DMTet and DiffMC: every node
may move by half a cell).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from prd.isosurface._cube_cases import EDGES, Corner, Triangle, cube_cases

MAX_DEFORMATION = 0.5  # cells; up to here neighbouring nodes cannot pass each other
NUMBER_BITS = 40  # of a vertex's number among those of its direction, while a surface is made from slabs
TINY = 1e-12  # keeps the interpolation's derivative finite in float32 where both ends of an edge are almost zero

Surface = tuple[Tensor, Tensor]  # vertices [V, 3] scene units, faces [F, 3] int64


@lru_cache(maxsize=16)
def _tables(marching: Marching, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of a case's triangles [256, K], -1 padded; an edge's direction, by number, [E] and base corner [E, 3]."""
    cases = marching.cases()
    rows = torch.full((256, 3 * max(map(len, cases))), -1, dtype=torch.int64, device="cpu")
    for case, triangles in enumerate(cases):
        flat = [edge for triangle in triangles for edge in triangle]
        rows[case, : len(flat)] = torch.tensor(flat, dtype=torch.int64, device="cpu")
    numbers = [marching.directions.index(direction) for direction, _ in marching.edges]
    directions = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    corners = torch.tensor([corner for _, corner in marching.edges], dtype=torch.int64, device="cpu")
    return rows.to(device), directions.to(device), corners.to(device)


def _case_of_cells(inside: Tensor) -> Tensor:
    """Case number [X-1, Y-1, Z-1] of each cell: bit 4 x + 2 y + z for corner (x, y, z), built one axis at a time."""
    bits = inside.to(torch.uint8)
    bits = bits[:, :, :-1] | bits[:, :, 1:] << 1
    bits = bits[:, :-1] | bits[:, 1:] << 2
    return bits[:-1] | bits[1:] << 4


def check_grids(sdf: Tensor, deformation: Tensor | None) -> None:
    if sdf.ndim != 3 or min(sdf.shape) < 2:
        raise ValueError(f"sdf={tuple(sdf.shape)}: expected [X, Y, Z] with at least 2 nodes per axis")
    if deformation is not None and deformation.shape != (*sdf.shape, 3):
        raise ValueError(f"deformation={tuple(deformation.shape)}: expected {(*sdf.shape, 3)}, one offset per node")
    for name, values in (("sdf", sdf), ("deformation", deformation)):
        if values is None or bool(torch.isfinite(values.detach().sum())):
            continue
        if not bool(torch.isfinite(values).all()):  # else the sum alone overflowed
            raise ValueError(f"{name}: holds NaN or infinity; these must be finite, look for a diverged network")


@dataclass(frozen=True)
class Marching:
    """A way of cutting the cells of a grid along a level: `marching_cubes`, or `marching_tetrahedra`.

    edges  the edges of a cell that may be cut: (direction, base corner), one step (0 or 1 per axis) from that corner
    cases  gives for each of the 256 cases (bit 4 x + 2 y + z: corner (x, y, z) is inside) its triangles, as triples of
           indices into `edges`, counter-clockwise seen from outside
    """

    edges: tuple[tuple[Corner, Corner], ...]
    cases: Callable[[], list[list[Triangle]]]

    @cached_property
    def directions(self) -> tuple[Corner, ...]:
        return tuple(dict.fromkeys(direction for direction, _ in self.edges))

    def __call__(self, sdf: Tensor, deformation: Tensor | None = None, level: float = 0.0) -> Surface:
        """The surface sdf = level of one grid, inside where sdf < level.

        sdf          [X, Y, Z]     any unit, at least 2 nodes per axis
        deformation  [X, Y, Z, 3]  offsets of the nodes in cells, limited here to +-0.5 (DiffMC's semantics)

        Returns vertices [V, 3] in cells (node (i, j, k) lies at (i, j, k)), differentiable in both arguments, and
        faces [F, 3] int64, counter-clockwise seen from outside. Vertices are shared between faces; every edge belongs
        to two faces except where the surface leaves the grid (see `pad_border`). Without a sign change both are empty.
        Raises ValueError for a wrong shape or non-finite values.
        """
        check_grids(sdf, deformation)
        ends, faces, _ = self.topology(sdf.detach() < level)
        return place_vertices(sdf, deformation, level, ends), faces

    @torch.no_grad()
    def topology(self, inside: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Cut edges [2, V] (linear indices of their two nodes), faces [F, 3] that index them, cut edges per direction.

        inside bool [X, Y, Z]. The edges are listed direction by direction, each in the order of its base nodes.
        """
        device, nodes = inside.device, inside.numel()
        _, ny, nz = inside.shape
        strides = (ny * nz, nz, 1)
        # read only where an edge is cut
        vertex_of_edge = torch.empty(len(self.directions) * nodes, dtype=torch.int32, device=device)
        ends, counts = [], [0]
        for number, (dx, dy, dz) in enumerate(self.directions):
            x, y, z = inside.shape[0] - dx, ny - dy, nz - dz
            cut = torch.zeros_like(inside)
            torch.bitwise_xor(inside[:x, :y, :z], inside[dx:, dy:, dz:], out=cut[:x, :y, :z])
            base = cut.view(-1).nonzero()[:, 0]
            first = sum(counts)
            vertex_of_edge[number * nodes + base] = torch.arange(
                first, first + len(base), dtype=torch.int32, device=device
            )
            ends.append(torch.stack([base, base + dx * strides[0] + dy * strides[1] + dz]))
            counts.append(len(base))
        rows, directions, corners = _tables(self, device)
        flat = _case_of_cells(inside).view(-1)
        active = ((flat != 0) & (flat != 255)).nonzero()[:, 0]
        cell_z = active % (nz - 1)
        cell_xy = active // (nz - 1)
        first_node = (cell_xy // (ny - 1)) * strides[0] + cell_xy % (ny - 1) * strides[1] + cell_z
        offset = directions * nodes + corners @ torch.tensor(
            strides, dtype=torch.int64, device=device
        )  # an edge's entry from its cell's
        edges = rows[flat[active].long()]  # [cells, K]
        cell, slot = (edges >= 0).nonzero(as_tuple=True)
        faces = vertex_of_edge[first_node[cell] + offset[edges[cell, slot]]]
        return torch.cat(ends, dim=1), faces.long().view(-1, 3), counts[1:]


def place_vertices(sdf: Tensor, deformation: Tensor | None, level: float, ends: Tensor, first_x: int = 0) -> Tensor:
    """Crossings [V, 3], in cells, of the level and edges ends [2, V] (linear indices into sdf, x from first_x on)."""
    _, ny, nz = sdf.shape
    nodes = torch.stack([ends // (ny * nz) + first_x, ends // nz % ny, ends % nz], dim=-1).to(sdf.dtype)  # [2, V, 3]
    if deformation is not None:
        nodes = nodes + deformation.reshape(-1, 3)[ends].clamp(-MAX_DEFORMATION, MAX_DEFORMATION)
    low, high = sdf.reshape(-1)[ends] - level
    sign = torch.where(low.detach() < 0, 1, -1).to(sdf.dtype)
    t = -low * sign / ((high - low) * sign).clamp_min(TINY)
    return nodes[0] + t[:, None] * (nodes[1] - nodes[0])


def _unit(axis: int) -> Corner:
    return (int(axis == 0), int(axis == 1), int(axis == 2))


# Lorensen and Cline 1987, with the consistent table of `_cube_cases`.
marching_cubes = Marching(edges=tuple((_unit(axis), corner) for axis, corner in EDGES), cases=cube_cases)


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


@dataclass
class Stitcher:
    """One sample's surface from consecutive slabs of its grid: the vertices and faces of the whole, in their order.

    Neighbouring slabs share a plane of nodes; the edges within it belong to the later one, where they come first. A
    vertex is known by its direction and its number among that direction's, until the numbers of all are known.
    """

    marching: Marching
    level: float
    planes: int = 0  # marched so far, without the last
    kept: tuple[Tensor, Tensor | None] | None = None  # the last plane
    vertices: list[list[Tensor]] = field(default_factory=list)  # of each direction, one tensor per slab
    shared: list[Tensor] = field(default_factory=list)  # those within the last plane
    faces: list[Tensor] = field(default_factory=list)

    def add(self, sdf: Tensor, deformation: Tensor | None) -> None:
        """The next planes: sdf [n, Y, Z], deformation [n, Y, Z, 3]."""
        if self.kept is not None:
            last, offsets = self.kept
            sdf = torch.cat([last, sdf])
            deformation = None if deformation is None or offsets is None else torch.cat([offsets, deformation])
        self.kept = sdf[-1:], None if deformation is None else deformation[-1:]
        if len(sdf) < 2:
            return
        check_grids(sdf, deformation)
        ends, faces, counts = self.marching.topology(sdf.detach() < self.level)
        parts = place_vertices(sdf, deformation, self.level, ends, self.planes).split(counts)
        self.vertices = self.vertices or [[] for _ in counts]
        size = torch.tensor(counts, dtype=torch.int64, device=faces.device)
        direction = torch.bucketize(faces, size.cumsum(0), right=True)
        before = size.new_tensor([sum(map(len, known)) for known in self.vertices])
        number = faces + (before - size.cumsum(0) + size)[direction]
        self.faces.append(direction << NUMBER_BITS | number)
        in_last = ends[0] >= (len(sdf) - 1) * sdf[0].numel()
        own = [len(part) - int(mask.sum()) for part, mask in zip(parts, in_last.split(counts), strict=True)]
        for known, part, count in zip(self.vertices, parts, own, strict=True):
            known.append(part[:count])
        self.shared = [part[count:] for part, count in zip(parts, own, strict=True)]
        self.planes += len(sdf) - 1

    def mesh(self) -> Surface:
        """Vertices [V, 3] in cells and faces [F, 3]."""
        parts = [torch.cat([*known, last]) for known, last in zip(self.vertices, self.shared, strict=True)]
        code = torch.cat(self.faces)
        counts = code.new_tensor([0, *map(len, parts[:-1])]).cumsum(0)
        return torch.cat(parts), (code & (1 << NUMBER_BITS) - 1) + counts[code >> NUMBER_BITS]
