"""A Field from six feature planes: three for geometry, three for texture, read by small MLPs (TriplaneTurbo, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.fields.dense_head import dense_head, head_at
from prd.fields.fast import SPLAT_CHANNELS
from prd.fields.planes import nodes_of_cut_cells, plane_coordinates, plane_lattices, sample_planes
from prd.fields.protocol import AutogradGradient
from prd.utils.arguments import one_or_more
from prd.utils.construction import float32_weights


class TriplaneHeads(nn.Module):
    """Three MLPs (Linear-ReLU-Linear-ReLU-Linear, no bias) from plane features to signed distance, deformation, colour.

    Geometry features are the sum of three planes [C], texture features their concatenation [3C].
    `sdf_init_scale` scales the last layer of the sdf head at initialisation: below 1 training starts near the sphere.
    `splats`: a fourth MLP, of all features [4C], for Gaussians (`prd.splats`); its last layer is 0 at initialisation.
    """

    def __init__(
        self, channels: int = 32, width: int = 64, sdf_init_scale: float = 1.0, *, splats: bool = False
    ) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.sdf = _mlp(channels, width, 1)
        self.deformation = _mlp(channels, width, 3)
        self.rgb = _mlp(3 * channels, width, 3)
        self.splats = _mlp(4 * channels, width, SPLAT_CHANNELS) if splats else None
        with torch.no_grad():
            self.sdf.get_parameter("4.weight").mul_(sdf_init_scale)
            if self.splats is not None:
                self.splats.get_parameter("4.weight").zero_()


@float32_weights()
def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, outputs, bias=False),
    )


def colour_from_features(features: Tensor) -> Tensor:
    """sigmoid(f) * 1.002 - 0.001: reaches 0 and 1 at finite f (mip-NeRF, supplement); leaves [0, 1] by 0.001."""
    return torch.sigmoid(features) * 1.002 - 0.001


class TriplaneField(AutogradGradient):
    """B shapes as planes [B, 6, C, H, W] (xy, xz, yz for geometry, then xy, xz, yz for texture) and their heads.

    sdf = MLP(sum of the geometry planes) + |p| - bias_radius. A plane fades to 0 within half a texel beyond its border.
    Half-precision planes become float32: F.grid_sample in half precision is wrong on CPUs.
    """

    def __init__(self, planes: Tensor, heads: TriplaneHeads, bias_radius: float = 0.5) -> None:
        if planes.ndim != 5 or planes.shape[1] != 6 or planes.shape[2] != heads.channels:
            raise ValueError(f"planes={tuple(planes.shape)}: expected [B, 6, {heads.channels}, H, W]")
        self.planes = planes.float() if planes.dtype in (torch.float16, torch.bfloat16) else planes
        self.heads = heads
        self.bias_radius = bias_radius

    def select(self, index: int | Sequence[int]) -> TriplaneField:
        """One of the B samples, or some, as a field of their own."""
        rows = one_or_more(index)
        return TriplaneField(self.planes[rows], self.heads, self.bias_radius)

    def geometry_features(self, points: Tensor) -> Tensor:
        """Sum of the geometry planes at points [B, N, 3]: [B, N, C]."""
        xy, xz, yz = self._lookup(self.planes[:, :3], points).unbind(1)
        return xy + xz + yz  # faster than a sum over the strided axis

    def texture_features(self, points: Tensor) -> Tensor:
        """Concatenation of the texture planes (xy, xz, yz) at points [B, N, 3]: [B, N, 3C]."""
        return self._lookup(self.planes[:, 3:], points).transpose(1, 2).flatten(2)

    def _lookup(self, planes: Tensor, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[0] != planes.shape[0] or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3] with B = {planes.shape[0]}")
        sampled = sample_planes(planes.flatten(0, 1), plane_coordinates(points).flatten(0, 1))
        return sampled.unflatten(0, (-1, 3))  # [B, 3, N, C]

    def _bias(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.bias_radius

    def sdf(self, points: Tensor) -> Tensor:
        return self.heads.sdf(self.geometry_features(points)) + self._bias(points)

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor]:
        features = self.geometry_features(points)
        return self.heads.sdf(features) + self._bias(points), self.heads.deformation(features)

    def colour_features(self, points: Tensor) -> Tensor:
        """The colour head's raw output [B, N, 3], before the sigmoid."""
        return self.heads.rgb(self.texture_features(points))

    def rgb(self, points: Tensor) -> Tensor:
        return colour_from_features(self.colour_features(points)).clamp(0, 1)

    def splat_residuals(self, points: Tensor) -> Tensor | None:
        """The splat head's raw output [B, N, 13] at points [B, N, 3]; None without that head."""
        if self.heads.splats is None:
            return None
        features = torch.cat([self.geometry_features(points), self.texture_features(points)], dim=-1)
        return self.heads.splats(features)

    def grid(
        self, resolution: int, *, rgb: bool = True, deformation: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The field at the nodes linspace(-1, 1, R) of the cube, indexed [x, y, z], as the pointwise queries give it.

        Returns sdf [B, R, R, R], rgb [B, R, R, R, 3] and deformation [B, R, R, R, 3]; None for what is switched off.
        Each plane is resampled once on the R x R lattice of its two coordinates and goes through its share of the
        first linear layer there; only the sum over planes is made at R^3 nodes. Differentiable once.
        """
        sdf, offset = self._geometry(resolution, slice(0, resolution), deformation)
        if not rgb:
            return sdf, None, offset
        features = self._dense(self.heads.rgb, plane_lattices(self.planes[:, 3:], self._nodes(resolution)))
        return sdf, colour_from_features(features).clamp(0, 1), offset

    def geometry_grid(self, resolution: int, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """The planes x[first], ..., x[last - 1] of `grid`: sdf [B, n, R, R] and deformation [B, n, R, R, 3]."""
        if not 0 <= first < last <= resolution:
            raise ValueError(f"first={first}, last={last}: expected 0 <= first < last <= resolution={resolution}")
        return self._geometry(resolution, slice(first, last), True)

    @torch.no_grad()
    def surface_grid(self, resolution: int, first: int, last: int, level: float) -> tuple[Tensor, Tensor]:
        """`geometry_grid` without gradient, the deformation where cells are cut by a level, and zero elsewhere.

        Nodes of the first and last plane count as cut where the grid goes on beyond them.
        """
        if not 0 <= first < last <= resolution:
            raise ValueError(f"first={first}, last={last}: expected 0 <= first < last <= resolution={resolution}")
        sdf, _ = self._geometry(resolution, slice(first, last), False)
        cut = nodes_of_cut_cells(sdf < level)
        cut[:, : int(first > 0)] = True
        cut[:, last - first - int(last < resolution) :] |= last < resolution
        nodes = cut.nonzero()
        deformation = sdf.new_zeros(*sdf.shape, 3)
        xy, xz, yz = plane_lattices(self.planes[:, :3], self._nodes(resolution))
        found = self._dense(self.heads.deformation, [xy[:, first:last], xz[:, first:last], yz], nodes)
        deformation[tuple(nodes.T)] = found.to(deformation.dtype)
        return sdf, deformation

    def _nodes(self, resolution: int) -> Tensor:
        if resolution < 2:
            raise ValueError(f"resolution={resolution}: must be at least 2")
        return torch.linspace(-1, 1, resolution, device=self.planes.device, dtype=self.planes.dtype)

    def _geometry(self, resolution: int, x: slice, deformation: bool) -> tuple[Tensor, Tensor | None]:
        nodes = self._nodes(resolution)
        xy, xz, yz = plane_lattices(self.planes[:, :3], nodes)
        lattices = [xy[:, x], xz[:, x], yz]
        squares = nodes**2
        radius = (squares[x, None, None] + squares[:, None] + squares).sqrt() - self.bias_radius
        sdf = self._dense(self.heads.sdf, lattices)[..., 0] + radius
        return sdf, self._dense(self.heads.deformation, lattices) if deformation else None

    def _dense(self, head: nn.Sequential, lattices: list[Tensor], nodes: Tensor | None = None) -> Tensor:
        """One head at R^3 nodes, [B, R, R, R, out]: its first layer is applied plane by plane before the sum.

        nodes [n, 4] (b, x, y, z): at these alone, [n, out].
        """
        first, second, third = (layer.weight for layer in head if isinstance(layer, nn.Linear))
        shares = first.split(self.heads.channels, dim=1) if first.shape[1] > self.heads.channels else (first,) * 3
        with torch.autocast(first.device.type, enabled=False):  # the backward pass runs outside of it: one precision
            hidden = [F.linear(x.to(share.dtype), share) for x, share in zip(lattices, shares, strict=True)]
            return dense_head(hidden, second, third) if nodes is None else head_at(hidden, second, third, nodes)
