"""A Field from three or six feature planes and MLPs that also see where they are asked: AToM's and LATTE3D's.

Every head takes the features of its three planes, the position, and the position's sinusoidal encoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.fields.dense_head import dense_head
from prd.fields.planes import plane_coordinates, plane_lattices, sample_planes
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import colour_from_features
from prd.utils.arguments import one_or_more
from prd.utils.construction import float32_weights


def positional_encoding(coordinates: Tensor, frequencies: int) -> Tensor:
    """[..., 1 + 2 F] of coordinates [...] in [-1, 1]: x, sin(2^k pi x), cos(2^k pi x) for k < F (NeRF, Eq. 4)."""
    scales = 2.0 ** torch.arange(frequencies, device=coordinates.device, dtype=coordinates.dtype) * math.pi
    angles = coordinates[..., None] * scales
    return torch.cat([coordinates[..., None], angles.sin(), angles.cos()], dim=-1)


class PositionalHead(nn.Module):
    """Three linear layers with ReLU, no bias, from [plane features 3 C, encodings of x, y and z] to `outputs`."""

    @float32_weights()
    def __init__(self, channels: int, width: int, outputs: int, frequencies: int) -> None:
        super().__init__()
        self.channels, self.frequencies = channels, frequencies
        self.first = nn.Linear(3 * channels + 3 * (1 + 2 * frequencies), width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, outputs, bias=False)

    def forward(self, features: Tensor, points: Tensor) -> Tensor:
        """[..., outputs] of plane features [..., 3 C] (xy, xz, yz) at points [..., 3]."""
        encoded = positional_encoding(points, self.frequencies).flatten(-2)
        hidden = F.relu(self.first(torch.cat([features, encoded], dim=-1)))
        return self.third(F.relu(self.second(hidden)))

    def dense(self, lattices: list[Tensor], x: Tensor, nodes: Tensor) -> Tensor:
        """The head at the nodes x [X] times nodes [R]^2 of a grid, [B, X, R, R, outputs].

        lattices  the planes there, as `plane_lattices` gives them: xy [B, X, R, C], xz [B, X, R, C], yz [B, R, R, C]

        The first layer is applied plane by plane and axis by axis before the sum over planes.
        """
        weight = self.first.weight
        with torch.autocast(weight.device.type, enabled=False):
            *planes, position = weight.split([self.channels] * 3 + [weight.shape[1] - 3 * self.channels], dim=1)
            along = position.unflatten(1, (3, -1)).unbind(1)  # [width, 1 + 2 F] per axis
            at_x, at_y, at_z = (
                F.linear(positional_encoding(axis, self.frequencies), share)
                for axis, share in zip((x, nodes, nodes), along, strict=True)
            )
            xy, xz, yz = (F.linear(p.to(share.dtype), share) for p, share in zip(lattices, planes, strict=True))
            hidden = [xy + at_x[:, None] + at_y, xz + at_z, yz]
            return dense_head(hidden, self.second.weight, self.third.weight)


class PositionalHeads(nn.Module):
    """Separate networks for signed distance, deformation and colour (AToM, section 3.1 and A.1).

    The deformation's last layer starts at zero; `sdf_init_scale` scales that of the signed distance at the start.
    """

    @float32_weights()
    def __init__(
        self,
        channels: int,
        width: int = 64,
        frequencies: int = 6,
        *,
        texture_channels: int | None = None,
        sdf_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.sdf = PositionalHead(channels, width, 1, frequencies)
        self.deformation = PositionalHead(channels, width, 3, frequencies)
        self.rgb = PositionalHead(texture_channels or channels, width, 3, frequencies)
        with torch.no_grad():
            self.sdf.third.weight.mul_(sdf_init_scale)
            self.deformation.third.weight.zero_()


class PositionalTriplaneField(AutogradGradient):
    """B shapes from geometry and texture planes [B, 3, C, H, W] each (the same ones, in AToM) and their heads.

    sdf = MLP + |p| - bias_radius; deformation = tanh(MLP) / 2 cells, which keeps a grid's vertices in order.
    """

    def __init__(self, geometry: Tensor, texture: Tensor, heads: PositionalHeads, bias_radius: float = 0.5) -> None:
        for name, planes, head in (("geometry", geometry, heads.sdf), ("texture", texture, heads.rgb)):
            if planes.ndim != 5 or planes.shape[1:3] != (3, head.channels):
                raise ValueError(f"{name}={tuple(planes.shape)}: expected [B, 3, {head.channels}, H, W]")
        self.geometry = geometry.float() if geometry.dtype in (torch.float16, torch.bfloat16) else geometry
        self.texture = self.geometry if texture is geometry else texture.to(self.geometry.dtype)
        self.heads, self.bias_radius = heads, bias_radius

    def select(self, index: int | Sequence[int]) -> PositionalTriplaneField:
        """One of the B samples, or some, as a field of their own."""
        rows = one_or_more(index)
        geometry = self.geometry[rows]
        texture = geometry if self.texture is self.geometry else self.texture[rows]
        return PositionalTriplaneField(geometry, texture, self.heads, self.bias_radius)

    @staticmethod
    def _features(planes: Tensor, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[0] != planes.shape[0] or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3] with B = {planes.shape[0]}")
        sampled = sample_planes(planes.flatten(0, 1), plane_coordinates(points).flatten(0, 1))
        return sampled.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)  # [B, N, 3 C]

    def sdf(self, points: Tensor) -> Tensor:
        bias = points.norm(dim=-1, keepdim=True) - self.bias_radius
        return self.heads.sdf(self._features(self.geometry, points), points) + bias

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor]:
        features = self._features(self.geometry, points)
        bias = points.norm(dim=-1, keepdim=True) - self.bias_radius
        return self.heads.sdf(features, points) + bias, _cells(self.heads.deformation(features, points))

    def rgb(self, points: Tensor) -> Tensor:
        return colour_from_features(self.heads.rgb(self._features(self.texture, points), points)).clamp(0, 1)

    def grid(self, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """The field at the nodes linspace(-1, 1, R) of the cube, indexed [x, y, z], as the pointwise queries give it.

        Returns sdf [B, R, R, R], rgb [B, R, R, R, 3] and deformation [B, R, R, R, 3]; differentiable once.
        """
        sdf, deformation = self.geometry_grid(resolution, 0, resolution)
        nodes = self._nodes(resolution)
        features = self.heads.rgb.dense(plane_lattices(self.texture, nodes), nodes, nodes)
        return sdf, colour_from_features(features).clamp(0, 1), deformation

    def geometry_grid(self, resolution: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The planes x[first], ..., x[last - 1] of `grid`: sdf [B, n, R, R] and deformation [B, n, R, R, 3]."""
        if not 0 <= first < last <= resolution:
            raise ValueError(f"first={first}, last={last}: expected 0 <= first < last <= resolution={resolution}")
        nodes = self._nodes(resolution)
        x = nodes[first:last]
        xy, xz, yz = plane_lattices(self.geometry, nodes)
        lattices = [xy[:, first:last], xz[:, first:last], yz]
        radius = (x[:, None, None] ** 2 + nodes[:, None] ** 2 + nodes**2).sqrt() - self.bias_radius
        sdf = self.heads.sdf.dense(lattices, x, nodes)[..., 0] + radius
        return sdf, _cells(self.heads.deformation.dense(lattices, x, nodes))

    def _nodes(self, resolution: int) -> Tensor:
        if resolution < 2:
            raise ValueError(f"resolution={resolution}: must be at least 2")
        like: Any = self.geometry
        return torch.linspace(-1, 1, resolution, device=like.device, dtype=like.dtype)


def _cells(raw: Tensor) -> Tensor:
    """Offsets of a grid's vertices in cells, within half a cell."""
    return torch.tanh(raw) / 2
