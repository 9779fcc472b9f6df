"""Feature planes: where points fall on them, and lookups, pointwise and on the nodes of a grid.

The geometry of a shape has three planes in the order of `PLANE_AXES`, its texture three more in the same order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLANE_AXES = ("xy", "xz", "yz")
GRID_SAMPLE_TWICE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def plane_coordinates(points: Tensor) -> Tensor:
    """Project points [B, N, 3] on the planes xy, xz, yz: (column, row) in [-1, 1], [B, 3, N, 2]."""
    x, y, z = points.unbind(-1)
    return torch.stack(
        [torch.stack([y, x], dim=-1), torch.stack([-x, -z], dim=-1), torch.stack([y, -z], dim=-1)], dim=1
    )


def sample_planes(planes: Tensor, coordinates: Tensor) -> Tensor:
    """Bilinear, texel centres at half-integers, zero outside; differentiable twice in both arguments.

    planes [M, C, H, W]; coordinates [M, N, 2] (column, row) in [-1, 1]. Returns [M, N, C].
    """
    if GRID_SAMPLE_TWICE:
        sampled = F.grid_sample(planes, coordinates[:, None], "bilinear", "zeros", align_corners=False)
        return sampled[:, :, 0].transpose(1, 2)
    return gather_planes(planes, coordinates)


def gather_planes(planes: Tensor, coordinates: Tensor) -> Tensor:
    """`sample_planes` from elementary operations: F.grid_sample has no second derivative before torch 2.13."""
    channels, height, width = planes.shape[1:]
    size = coordinates.new_tensor([width, height])
    texel = (coordinates + 1) * size / 2 - 0.5
    corner = texel.detach().floor()
    fraction = texel - corner
    flat = planes.flatten(2).transpose(1, 2)  # [M, H W, C]
    total = flat.new_zeros(())
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = corner[..., 0] + dx, corner[..., 1] + dy
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (
                fraction[..., 1] if dy else 1 - fraction[..., 1]
            )
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            texels = flat.gather(1, index.long()[..., None].expand(-1, -1, channels))
            total = total + texels * (weight * inside)[..., None]
    return total


def resampling_matrix(nodes: Tensor, size: int) -> Tensor:
    """Bilinear weights [R, size] of the texels of one axis at coordinates `nodes` [R]; zero outside."""
    texel = (nodes[:, None] + 1) * size / 2 - 0.5
    return (1 - (texel - torch.arange(size, device=nodes.device, dtype=nodes.dtype)).abs()).clamp_min(0)


def plane_lattices(planes: Tensor, nodes: Tensor) -> list[Tensor]:
    """Planes [B, 3, C, H, W] at the nodes [R] of their axes: xy [B, x, y, C], xz [B, x, z, C], yz [B, y, z, C]."""
    rows, columns = planes.shape[-2:]
    down, up = resampling_matrix(nodes, rows), resampling_matrix(-nodes, rows)
    right, left = resampling_matrix(nodes, columns), resampling_matrix(-nodes, columns)
    xy, xz, yz = planes.unbind(1)  # [B, C, H, W] each
    return [
        (down @ xy @ right.T).permute(0, 2, 3, 1),  # row x, column y
        (up @ xz @ left.T).permute(0, 3, 2, 1),  # row -z, column -x
        (up @ yz @ right.T).permute(0, 3, 2, 1),  # row -z, column y
    ]


def nodes_of_cut_cells(inside: Tensor) -> Tensor:
    """Return bool [B, X, Y, Z] for nodes of cells that have some of their corners inside and some outside.

    inside bool [B, X, Y, Z]
    """
    some, whole = inside, inside
    for axis in (1, 2, 3):
        last = inside.shape[axis] - 1
        some = some.narrow(axis, 0, last) | some.narrow(axis, 1, last)
        whole = whole.narrow(axis, 0, last) & whole.narrow(axis, 1, last)
    cut = some & ~whole  # of cells
    for axis in (1, 2, 3):
        shape = list(cut.shape)
        shape[axis] += 1
        nodes = torch.zeros(shape, dtype=torch.bool, device=cut.device)
        nodes.narrow(axis, 0, shape[axis] - 1).copy_(cut)
        nodes.narrow(axis, 1, shape[axis] - 1).logical_or_(cut)
        cut = nodes
    return cut
