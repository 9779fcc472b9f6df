"""A field evaluated once on a regular grid and interpolated from there: what makes a training step cheap.

The R nodes per axis are linspace(-1, 1, R), both ends included, indexed [x, y, z] (those of the isosurface's grid).
Interpolation is trilinear and differentiable with respect to the values at the nodes, hence to the wrapped field's
parameters; the gradient is a grid too (central differences), so that normals need no second backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prd.fields._grid_numba import look_up, march, put_back
from prd.fields.fast import Nodes, evaluate_nodes
from prd.fields.protocol import Field


def sdf_gradient_grid(sdf: Tensor) -> Tensor:
    """Central differences of sdf [B, R, R, R], one-sided on the border: [B, R, R, R, 3], per scene unit."""
    spacing = 2 / (sdf.shape[1] - 1)
    return torch.stack(torch.gradient(sdf, spacing=spacing, dim=(1, 2, 3)), dim=-1)


class GridField:
    """A Field that interpolates another one's values at R^3 nodes.

    Outside the cube the signed distance grows by the distance to the cube. Points are constants here: gradients reach
    the wrapped field, not the points. Raises ValueError for fewer than 2 nodes per axis.
    """

    def __init__(self, field: Field, resolution: int, batch: int = 1, device: torch.device | str = "cpu") -> None:
        if resolution < 2:
            raise ValueError(f"resolution={resolution}: must be at least 2 nodes per axis")
        self.resolution = resolution
        sdf, rgb, deformation = evaluate_nodes(field, resolution, batch, device)
        self._sdf, self._rgb = _at_least_float32(sdf), _at_least_float32(rgb)
        self._deformation = None if deformation is None else _at_least_float32(deformation)
        self.node_gradient = sdf_gradient_grid(self._sdf)  # [B, R, R, R, 3], also what the eikonal loss looks at
        self._volume = torch.cat([self._sdf[..., None], self.node_gradient, self._rgb], dim=-1)  # [B, x, y, z, 7]

    def grid(self, resolution: int) -> Nodes:
        """The values at the nodes; `resolution` must be the one this field was evaluated at."""
        if resolution != self.resolution:
            raise ValueError(
                f"resolution={resolution}: this field was evaluated at {self.resolution} nodes per axis; "
                f"use GridField(field, {resolution}) or the wrapped field"
            )
        return self._sdf, self._rgb, self._deformation

    def sample(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signed distance [B, N, 1], its gradient [B, N, 3] and colour [B, N, 3] at points [B, N, 3], in one lookup."""
        values = interpolate(self._volume, points)
        sdf, gradient = _beyond_cube(values[..., :1], values[..., 1:4], points)
        return sdf, gradient, values[..., 4:]

    def sdf(self, points: Tensor) -> Tensor:
        values = interpolate(self._sdf[..., None], points)
        return _beyond_cube(values, values.detach().expand(-1, -1, 3), points)[0]

    @torch.no_grad()
    def sdf_along(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Signed distance [B, M, S] at distances t [B, M, S] along rays [B, M, 3], without gradient."""
        if t.ndim != 3 or t.shape[0] != len(self._sdf) or not origins.shape == directions.shape == (*t.shape[:2], 3):
            raise ValueError(
                f"origins={tuple(origins.shape)}, directions={tuple(directions.shape)}, t={tuple(t.shape)}: expected "
                f"[B, M, 3] twice and [B, M, S] with B = {len(self._sdf)}"
            )
        if t.device.type == "cpu" and t.dtype == self._sdf.dtype:
            return march(self._sdf, origins, directions, t)
        points = origins[:, :, None] + t[..., None] * directions[:, :, None]
        return self.sdf(points.flatten(1, 2)).view(t.shape)

    def rgb(self, points: Tensor) -> Tensor:
        return interpolate(self._volume, points, slice(4, 7))

    def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        values = interpolate(self._volume, points, slice(0, 4))
        return _beyond_cube(values[..., :1], values[..., 1:], points)

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._deformation is None:
            return self.sdf(points), None
        return self.sdf(points), interpolate(self._deformation, points)


def interpolate(volume: Tensor, points: Tensor, channels: slice = slice(None)) -> Tensor:
    """Trilinear values [B, N, C'] at points [B, N, 3] of volume [B, x, y, z, C]; the border's value beyond the cube.

    channels  of the volume's: those asked for. Differentiable once, in the volume.
    """
    if points.ndim != 3 or points.shape[0] != volume.shape[0] or points.shape[2] != 3:
        raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3] with B = {volume.shape[0]}")
    points = points.detach().to(volume.dtype)
    if volume.device.type == "cpu":
        first, last, _ = channels.indices(volume.shape[-1])
        return _Lookup.apply(volume, points, (first, last))
    return sample_grid(volume[..., channels], points)


def sample_grid(volume: Tensor, points: Tensor) -> Tensor:
    """`interpolate` on every device: all channels of volume [B, x, y, z, C] at points [B, N, 3], [B, N, C]."""
    channels_first = volume.permute(0, 4, 3, 2, 1)  # [B, C, z, y, x]: grid_sample's own order
    values = F.grid_sample(channels_first, points[:, None, None], padding_mode="border", align_corners=True)
    return values[:, :, 0, 0].transpose(1, 2)


class _Lookup(torch.autograd.Function):
    """`sample_grid` on the CPU, of some channels."""

    @staticmethod
    def forward(ctx: Any, volume: Tensor, points: Tensor, channels: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(points)
        ctx.channels, ctx.shape = channels, volume.shape
        return look_up(volume, points, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (points,) = ctx.saved_tensors
        return put_back(grad, points, ctx.channels, ctx.shape), None, None


def _at_least_float32(x: Tensor) -> Tensor:
    """F.grid_sample in half precision is wrong on CPUs, and a mixed-precision field answers in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _beyond_cube(sdf: Tensor, gradient: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Add the distance to the cube, and its gradient, at the points outside; on clipped rays these are few or none."""
    if not points.numel() or bool(points.detach().abs().amax() <= 1):
        return sdf, gradient
    beyond = (points.detach().abs() > 1).any(dim=-1)  # [B, N]
    outside = points[beyond] - points[beyond].clamp(-1, 1)
    distance = outside.norm(dim=-1, keepdim=True)
    added = torch.zeros_like(sdf)
    added[beyond] = distance.to(sdf.dtype)
    along = torch.where(outside == 0, gradient[beyond], (outside / distance).to(gradient.dtype))
    return sdf + added, gradient.index_put((beyond,), along)
