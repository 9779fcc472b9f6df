"""Splats: an object as 3D Gaussians (Kerbl et al. 2023) that lie on the isosurface of a field."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prd.fields.checks import expect
from prd.fields.fast import splat_residuals
from prd.fields.protocol import Field
from prd.isosurface.extract import OnEmpty, extract_isosurface
from prd.isosurface.marching_cubes import Surface
from prd.rendering.surface import vertex_normals
from prd.splats.project import rotation_matrices

SplatUp = Literal["-y", "y", "z"]  # of a file: `prd.splats.files.write_splats`

THICKNESS = 0.05  # standard deviation along the normal, of that along the surface
OPACITY = 0.99
LEAST_AREA = 1e-8  # scene units squared: vertices of slivers
REACH = 2.0  # standard deviations that a head may move a Gaussian from its vertex, along each axis
STRETCH = 2.0  # of the logarithm of a scale that a head may add or take away: a factor of 7.4


@dataclass(frozen=True)
class Splats:
    """N Gaussians of one object, scene units, +Z up, front +X.

    means      [N, 3]
    scales     [N, 3]  standard deviations along the Gaussian's own axes, positive
    rotations  [N, 4]  quaternions (w, x, y, z), unit: own axes to the scene's; the own z axis is the outward normal
    opacities  [N]     at the mean, in [0, 1]
    colors     [N, 3]  sRGB in [0, 1], the same from every side
    """

    means: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor
    colors: Tensor

    def __post_init__(self) -> None:
        count = len(self.means)
        for name, width in (
            ("means", (3,)),
            ("scales", (3,)),
            ("rotations", (4,)),
            ("opacities", ()),
            ("colors", (3,)),
        ):
            value = getattr(self, name)
            if value.shape != (count, *width):
                raise ValueError(f"{name}={tuple(value.shape)}: expected {(count, *width)}, one row per Gaussian")

    def __len__(self) -> int:
        return len(self.means)

    def __repr__(self) -> str:
        return f"Splats({len(self)})"

    def normals(self) -> Tensor:
        """Outward unit normals [N, 3]."""
        return rotation_matrices(self.rotations)[..., 2]

    def detach(self) -> Splats:
        """The same Gaussians without a gradient."""
        return Splats(**{part.name: getattr(self, part.name).detach() for part in fields(self)})

    def to(self, device: torch.device | str | torch.dtype) -> Splats:
        """The same Gaussians on another device, or in another floating-point type."""
        return Splats(**{part.name: getattr(self, part.name).to(device) for part in fields(self)})

    def export(self, path: str | os.PathLike[str], *, up: SplatUp = "-y") -> Path:
        """Write them to a .ply or a .splat; see `prd.splats.files.write_splats`."""
        from prd.splats.files import write_splats

        return write_splats(self, path, up=up)


def extract_splats(
    field: Field,
    resolution: int = 96,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    on_empty: OnEmpty = "raise",
) -> list[Splats]:
    """The splats of a field's B samples, one Gaussian at each vertex of its isosurface; differentiable in the field.

    resolution        nodes per axis of the isosurface's grid, at least 2: the number of Gaussians goes with its square
    batch, device     how many samples the field holds, and where
    on_empty          where a sample has no surface: "raise" EmptySurfaceError, or "flag" it by no Gaussians
    """
    surfaces = extract_isosurface(field, resolution, batch=batch, device=device, on_empty=on_empty)
    return splats_on(field, surfaces)


def splats_on(field: Field, surfaces: Sequence[Surface]) -> list[Splats]:
    """One Gaussian at each vertex of B surfaces, flat along the surface, coloured by the field.

    surfaces  of the field's B samples: vertices [V, 3] in scene units, faces [F, 3]

    A Gaussian's disc of one deviation has the vertex's share of the area. A field with splat heads
    (`prd.fields.fast.splat_residuals`) moves, stretches and turns each, and changes its colour and opacity; heads that
    answer 0 change nothing. Differentiable in the field and, through the vertices, in what the surfaces were made of.
    """
    points = pad_sequence([vertices for vertices, _ in surfaces], batch_first=True)  # [B, V, 3], one query for all
    rgb = expect("rgb", field.rgb(points), points, 3)
    residuals = splat_residuals(field, points)
    found = []
    for index, (vertices, faces) in enumerate(surfaces):
        count = len(vertices)
        own = None if residuals is None else residuals[index, :count]
        found.append(_splats(vertices, faces, rgb[index, :count], own))
    return found


def _splats(vertices: Tensor, faces: Tensor, rgb: Tensor, residuals: Tensor | None) -> Splats:
    normals = vertex_normals(vertices, faces)
    area = vertex_areas(vertices, faces).clamp_min(LEAST_AREA)
    sigma = (area / math.pi).sqrt()[:, None]
    scales = torch.cat([sigma, sigma, THICKNESS * sigma], dim=-1)
    rotations = normal_rotations(normals)
    if residuals is None:
        return Splats(vertices, scales, rotations, torch.full_like(vertices[:, 0], OPACITY), rgb)
    moved, stretched, turned, lit, seen = residuals.to(vertices.dtype).split([3, 3, 3, 3, 1], dim=-1)
    own = torch.cat([torch.ones_like(seen), torch.tanh(turned)], dim=-1)  # a turn by at most 120 degrees
    return Splats(
        vertices + REACH * sigma * torch.tanh(moved),
        scales * torch.exp(STRETCH * torch.tanh(stretched)),
        quaternion_product(rotations, F.normalize(own, dim=-1)),
        torch.sigmoid(math.log(OPACITY / (1 - OPACITY)) + seen)[:, 0],
        torch.sigmoid(torch.logit(rgb, eps=1e-3) + lit),
    )


def vertex_areas(vertices: Tensor, faces: Tensor) -> Tensor:
    """Each vertex's share [N] of the surface's area: a third of that of the faces around it."""
    a, b, c = (vertices.index_select(0, corner) for corner in faces.unbind(1))
    double = torch.linalg.cross(b - a, c - a)
    area = double.square().sum(-1).clamp_min(LEAST_AREA**2).sqrt() / 2  # whose derivative is finite for slivers
    return torch.zeros_like(vertices[:, 0]).index_add(0, faces.t().reshape(-1), (area / 3).repeat(3))


def normal_rotations(normals: Tensor) -> Tensor:
    """Quaternions [N, 4] (w, x, y, z) that turn +z to unit normals [N, 3]; the identity for a normal of 0.

    The shortest turn from +z, or for normals that look down a half turn about x and the shortest turn from -z: neither
    comes near the opposite direction, where it is not defined.
    """
    x, y, z = normals.unbind(-1)
    zero = torch.zeros_like(z)
    upward = torch.stack([1 + z, -y, x, zero], dim=-1)
    downward = torch.stack([-y, 1 - z, zero, x], dim=-1)  # (1 - z, y, -x, 0) times (0, 1, 0, 0)
    return F.normalize(torch.where((z >= 0)[:, None], upward, downward), dim=-1)


def quaternion_product(first: Tensor, second: Tensor) -> Tensor:
    """Hamilton's product [..., 4] of quaternions (w, x, y, z): the turn `second`, then `first`."""
    a, b, c, d = first.unbind(-1)
    e, f, g, h = second.unbind(-1)
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ],
        dim=-1,
    )
