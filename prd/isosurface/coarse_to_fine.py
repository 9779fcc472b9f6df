"""An isosurface from a grid that is evaluated only where the surface can be.

The nodes of the fine grid are grouped into coarse cells of `factor` fine cells per side. The coarse cells' corners are
evaluated first; then the cells that can hold surface, and after them those into which the surface is found to
continue. What stays unevaluated is one-signed there as far as its corners tell, and is filled with that sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from prd.fields.fast import Geometry, values_at
from prd.fields.protocol import Field
from prd.isosurface.extract import OnEmpty, meshes_from_slabs
from prd.isosurface.marching_cubes import Marching, Surface, marching_cubes


@dataclass(frozen=True)
class NearSurface:
    """The values of R^3 nodes near the surface of B samples, and the sign of all others.

    nodes        [K] ascending linear indices (x R + y) R + z of the nodes evaluated, for any sample of the batch
    sdf          [B, K], deformation [B, K, 3] or None: there
    inside       [B, n, n, n] bool: the sign in each coarse cell that was left out
    outside      [B]: the largest |sdf - level| at the coarse corners, which stands for the values left out
    """

    resolution: int
    factor: int
    level: float
    nodes: Tensor
    sdf: Tensor
    deformation: Tensor | None
    inside: Tensor
    outside: Tensor

    def slabs(self, planes: int) -> Iterator[Geometry]:
        """The grids as `grid_slabs` gives them: sdf [B, n, R, R], deformation [B, n, R, R, 3] or None."""
        resolution, batch = self.resolution, len(self.sdf)
        cell = torch.arange(resolution, dtype=torch.long, device=self.nodes.device) // self.factor
        cell = cell.clamp_max(self.inside.shape[1] - 1)
        for first in range(0, resolution, planes):
            last = min(first + planes, resolution)
            signs = self.inside[:, cell[first:last]][:, :, cell][:, :, :, cell]
            outside = self.outside[:, None, None, None]
            filled = torch.where(signs, -outside, outside) + self.level
            bounds = self.nodes.new_tensor([first * resolution**2, last * resolution**2])
            begin, end = torch.searchsorted(self.nodes, bounds).tolist()
            place = self.nodes[begin:end] - bounds[0]
            sdf = filled.flatten(1).index_copy(1, place, self.sdf[:, begin:end]).view(filled.shape)
            offsets = None
            if self.deformation is not None:
                zeros = filled.new_zeros(batch, sdf[0].numel(), 3)
                offsets = zeros.index_copy(1, place, self.deformation[:, begin:end]).view(*sdf.shape, 3)
            yield sdf, offsets


def evaluate_near_surface(
    field: Field,
    resolution: int,
    *,
    factor: int = 4,
    lipschitz: float | None = None,
    level: float = 0.0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 18,
) -> NearSurface:
    """Evaluate a field near its surface; arguments and guarantee as in `extract_coarse_to_fine`."""
    if resolution < 2 or factor < 1 or batch < 1 or (lipschitz is not None and not lipschitz > 0):
        raise ValueError(
            f"resolution={resolution}, factor={factor}, batch={batch}, lipschitz={lipschitz}: "
            "need at least 2 nodes per axis, a factor and a batch of at least 1, a positive Lipschitz constant or None"
        )
    axis = torch.linspace(-1, 1, resolution, dtype=torch.float32, device=device)
    lines = torch.arange(0, resolution - 1, factor, dtype=torch.long, device=device)
    lines = torch.cat([lines, lines.new_tensor([resolution - 1])])  # the last coarse cells may be smaller
    with torch.no_grad():
        coarse = values_at(field, torch.cartesian_prod(*[axis[lines]] * 3), batch, chunk)[0] - level
        coarse = coarse.view(-1, *[len(lines)] * 3)
        todo, inside = _cells_to_evaluate(coarse, axis, lines, lipschitz)
    nodes = lines.new_zeros(0)
    sdf, deformation = coarse.new_zeros(len(coarse), 0), None
    done = torch.zeros_like(todo)
    while bool(todo.any()):
        cells = todo.nonzero()
        done |= todo
        block = _block(cells, factor, resolution)  # [M, (factor + 1)^3]
        new = torch.unique(block)
        new = new[~torch.isin(new, nodes)]
        xyz = new // resolution**2, new // resolution % resolution, new % resolution
        points = torch.stack([axis[index] for index in xyz], dim=-1)
        values, offsets = values_at(field, points, batch, chunk)
        nodes, order = torch.cat([nodes, new]).sort()
        sdf = torch.cat([sdf.to(values.dtype), values], dim=1)[:, order]
        if offsets is not None:
            known = offsets.new_zeros(len(offsets), 0, 3) if deformation is None else deformation
            deformation = torch.cat([known, offsets], dim=1)[:, order]
        signs = (sdf.detach() < level)[:, torch.searchsorted(nodes, block)]
        todo = _continuation(signs.unflatten(2, [factor + 1] * 3), cells, inside) & ~done
    outside = coarse.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(coarse.dtype).tiny)
    return NearSurface(resolution, factor, level, nodes, sdf, deformation, inside, outside.to(sdf.dtype))


def _cells_to_evaluate(coarse: Tensor, axis: Tensor, lines: Tensor, lipschitz: float | None) -> tuple[Tensor, Tensor]:
    """Coarse cells that may hold surface in some sample [n, n, n], and which cells are inside otherwise [B, n, n, n].

    coarse [B, n+1, n+1, n+1]: the signed distance at the corners. No point of a cell is farther than half its diagonal
    from the nearest corner; where |sdf| exceeds that, times the Lipschitz constant, at all corners, the sign holds.
    """
    corners = [
        coarse[:, x : x + len(lines) - 1, y : y + len(lines) - 1, z : z + len(lines) - 1]
        for x, y, z in product((0, 1), repeat=3)
    ]
    inside = corners[0] < 0
    mixed = torch.stack([(corner < 0) != inside for corner in corners]).any(dim=0)
    if lipschitz is not None:
        size = axis[lines].diff().square()
        diagonal = (size[:, None, None] + size[:, None] + size).sqrt()
        smallest = torch.stack(corners).abs().amin(dim=0)
        mixed = mixed | (smallest <= lipschitz * diagonal / 2)
    return mixed.any(dim=0), inside


def _block(cells: Tensor, factor: int, resolution: int) -> Tensor:
    """Linear indices [M, (factor + 1)^3] of the fine nodes of coarse cells [M, 3]; the last repeat their border."""
    step = torch.arange(factor + 1, dtype=torch.long, device=cells.device)
    x, y, z = ((cells[:, k, None] * factor + step).clamp_max(resolution - 1) for k in range(3))  # [M, factor + 1]
    return ((x[:, :, None, None] * resolution + y[:, None, :, None]) * resolution + z[:, None, None, :]).flatten(1)


def _continuation(signs: Tensor, cells: Tensor, inside: Tensor) -> Tensor:
    """Cells [n, n, n] next to cells [M, 3] with a node of another sign on the common face than theirs if left out.

    signs [B, M, s, s, s]: inside or not at the cells' nodes; inside [B, n, n, n]: what holds in a cell left out.
    """
    count = inside.shape[1]
    found = torch.zeros(count, count, count, dtype=torch.bool, device=cells.device)
    for dimension, side in product(range(3), (-1, 1)):
        neighbour = cells.clone()
        neighbour[:, dimension] += side
        exists = ((neighbour >= 0) & (neighbour < count)).all(dim=1)
        neighbour = neighbour[exists]
        x, y, z = neighbour.unbind(1)
        face = signs[:, exists].select(2 + dimension, 0 if side < 0 else -1).flatten(2)  # [B, m, s * s]
        differs = (face != inside[:, x, y, z][..., None]).any(dim=2).any(dim=0)
        found[x[differs], y[differs], z[differs]] = True
    return found


def extract_coarse_to_fine(
    field: Field,
    resolution: int,
    *,
    factor: int = 4,
    lipschitz: float | None = None,
    level: float = 0.0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 18,
    marching: Marching = marching_cubes,
    max_nodes: int = 1 << 23,
    on_empty: OnEmpty = "raise",
) -> list[Surface]:
    """`extract_isosurface` from a grid that is evaluated only near the surface.

    factor     fine cells along the side of a coarse cell
    lipschitz  the largest |sdf(p) - sdf(q)| / |p - q| of the field (1: a true distance), or None if it is not known. A
               trained field is no distance: those of the toy box have gradients of up to 11
    others     as in `extract_isosurface`

    With a Lipschitz constant that holds, the mesh is that of the dense grid: same vertices in the same order, to the
    rounding of the field's values. Without one, every connected piece of surface that some edge between coarse
    corners crosses an odd number of times is found whole, and so is all that touches a coarse cell which holds such a
    piece; a piece that lies within cells with corners of one sign (a sheet, a hole or an island thinner than
    `factor` fine cells, 2 factor / (R - 1) scene units) can be missed, silently: nothing short of looking would tell.

    In either case a shape that leaves the cube is closed half a cell or less beyond it by the largest |sdf| at the
    coarse corners, not at all nodes, so that its caps may differ by a part of a cell. Differentiable in the field;
    memory grows with the surface and `max_nodes`. Raises as `extract_isosurface`.

    It asks the field at scattered points. For one with a fast dense grid (TriplaneField, whose nodes cost a fifth of a
    point there) it pays from about 256^3 nodes with a factor of 8; for any other from the start.
    """
    near = evaluate_near_surface(
        field, resolution, factor=factor, lipschitz=lipschitz, level=level, batch=batch, device=device, chunk=chunk
    )
    planes = max(2, max_nodes // (len(near.sdf) * resolution**2))
    return meshes_from_slabs(lambda: near.slabs(planes), resolution, level, marching=marching, on_empty=on_empty)
