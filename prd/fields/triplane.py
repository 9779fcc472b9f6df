"""A Field from six feature planes: three for geometry, three for texture, read by small MLPs (TriplaneTurbo, 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prd.fields.protocol import AutogradGradient

GRID_SAMPLE_TWICE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
NODES_A_TILE = 1 << 12  # nodes the dense grid handles at a time: their activations stay in a processor's cache
NODES_A_TILE_GPU = 1 << 18  # there the launches count, not the cache; 64 MB a layer of 64; not measured
SPARSE = 0.5  # share of its nodes with a gradient below which these are gathered for the backward pass


def plane_coordinates(points: Tensor) -> Tensor:
    """Where points [B, N, 3] fall on the planes xy, xz, yz: (column, row) in [-1, 1], [B, 3, N, 2]."""
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


class TriplaneHeads(nn.Module):
    """Three MLPs (Linear-ReLU-Linear-ReLU-Linear, no bias) from plane features to signed distance, deformation, colour.

    Geometry features are the sum of three planes [C], texture features their concatenation [3C].
    `sdf_init_scale` scales the last layer of the sdf head at initialisation: below 1 training starts near the sphere.
    """

    def __init__(self, channels: int = 32, width: int = 64, sdf_init_scale: float = 1.0) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.sdf = _mlp(channels, width, 1)
        self.deformation = _mlp(channels, width, 3)
        self.rgb = _mlp(3 * channels, width, 3)
        with torch.no_grad():
            self.sdf.get_parameter("4.weight").mul_(sdf_init_scale)


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
        rows = [index] if isinstance(index, int) else list(index)
        return TriplaneField(self.planes[rows], self.heads, self.bias_radius)

    def geometry_features(self, points: Tensor) -> Tensor:
        """Sum of the geometry planes at points [B, N, 3]: [B, N, C]."""
        return self._lookup(self.planes[:, :3], points).sum(dim=1)

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

    def _dense(self, head: nn.Sequential, lattices: list[Tensor]) -> Tensor:
        """One head at R^3 nodes, [B, R, R, R, out]: its first layer is applied plane by plane before the sum."""
        first, second, third = (layer.weight for layer in head if isinstance(layer, nn.Linear))
        shares = first.split(self.heads.channels, dim=1) if first.shape[1] > self.heads.channels else (first,) * 3
        with torch.autocast(first.device.type, enabled=False):  # the backward pass runs outside of it: one precision
            hidden = [F.linear(x.to(share.dtype), share) for x, share in zip(lattices, shares, strict=True)]
            return dense_head(hidden, second, third)


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


def dense_head(hidden: Sequence[Tensor], second: Tensor, third: Tensor) -> Tensor:
    """w3 relu(w2 relu(sum)) at R^3 nodes, [B, X, R, R, out], of the sum of three lattices of hidden features.

    hidden  xy [B, X, R, width], xz [B, X, R, width], yz [B, R, R, width]: the first layer's output, plane by plane
    second  w2 [width, width]; third  w3 [out, width]
    """
    return _DenseHead.apply(*hidden, second, third)


class _DenseHead(torch.autograd.Function):
    """out[b, x, y, z] = w3 relu(w2 relu(xy[b, x, y] + xz[b, x, z] + yz[b, y, z])), made tile by tile.

    xy and xz may hold a part of the x axis alone. The R^3 activations never exist together: the backward pass makes
    each tile's again while it is in the cache. Where few nodes receive a gradient (renderers look at those near the
    surface) it makes those alone.
    """

    @staticmethod
    def forward(ctx: Any, xy: Tensor, xz: Tensor, yz: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        ctx.save_for_backward(xy, xz, yz, w2, w3)
        batch, resolution = yz.shape[:2]
        out = xy.new_empty(batch, xy.shape[1], resolution, resolution, len(w3))
        for tile in _tiles(xy):
            out[tile] = F.linear(F.relu_(F.linear(_first_hidden(xy, xz, yz, *tile), w2)), w3)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        *hidden, w2, w3 = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (*hidden, w2, w3)]
        nodes = (grad_out != 0).any(dim=-1).nonzero()  # [n, 4] b, x, y, z; NaN counts
        if len(nodes) < SPARSE * grad_out[..., 0].numel():
            _some_backward(hidden, w2, w3, grad_out, nodes, grads)
        else:
            _whole_backward(hidden, w2, w3, grad_out, grads)
        return tuple(grads)


def _whole_backward(hidden: list[Tensor], w2: Tensor, w3: Tensor, grad_out: Tensor, grads: list[Tensor]) -> None:
    """Add the gradients of `_DenseHead`'s arguments to `grads`, tile by tile."""
    xy, xz, yz = hidden
    grad_xy, grad_xz, grad_yz, *grad_weights = grads
    for b, x, y in _tiles(xy):
        h1 = _first_hidden(xy, xz, yz, b, x, y)
        grad = grad_out[b, x, y].reshape(-1, len(w3))
        grad1 = _head_backward(h1.view(-1, h1.shape[-1]), w2, w3, grad, *grad_weights).view_as(h1)
        grad_xy[b, x, y] = grad1.sum(3)
        grad_xz[b, x] += grad1.sum(2)
        grad_yz[b, y] += grad1.sum(1)


def _some_backward(
    hidden: list[Tensor], w2: Tensor, w3: Tensor, grad_out: Tensor, nodes: Tensor, grads: list[Tensor]
) -> None:
    """`_whole_backward` of nodes [n, 4] (b, x, y, z) alone, outside of which grad_out is zero."""
    *grad_hidden, grad_w2, grad_w3 = grads
    for some in nodes.split(nodes_a_tile(nodes)):
        b, x, y, z = some.unbind(1)
        places = [
            (b * tensor.shape[1] + row) * tensor.shape[2] + column
            for tensor, row, column in zip(hidden, (x, x, y), (y, z, z), strict=True)
        ]
        first, second, third = (h.flatten(0, 2).index_select(0, i) for h, i in zip(hidden, places, strict=True))
        h1 = F.relu_(first.add_(second).add_(third))
        grad1 = _head_backward(h1, w2, w3, grad_out[b, x, y, z], grad_w2, grad_w3)
        for grad, place in zip(grad_hidden, places, strict=True):
            grad.flatten(0, 2).index_add_(0, place, grad1)


def _head_backward(h1: Tensor, w2: Tensor, w3: Tensor, grad: Tensor, grad_w2: Tensor, grad_w3: Tensor) -> Tensor:
    """From grad [n, out] to the gradient [n, width] before the first ReLU, whose output is h1 [n, width].

    Adds the weights' gradients to grad_w2 and grad_w3.
    """
    h2 = F.relu_(F.linear(h1, w2))
    grad_w3.addmm_(grad.T, h2)
    grad2 = torch.ops.aten.threshold_backward(grad @ w3, h2, 0)
    grad_w2.addmm_(grad2.T, h1)
    return torch.ops.aten.threshold_backward(grad2 @ w2, h1, 0)


def nodes_a_tile(tensor: Tensor) -> int:
    return NODES_A_TILE if tensor.device.type == "cpu" else NODES_A_TILE_GPU


def _tiles(xy: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of the samples and of the x and y axes of xy [B, x, y, C] that hold some nodes_a_tile nodes with all of z.

    All of y comes before more of x, and that before more samples: so the least is left to add up between tiles.
    """
    batch, planes, resolution, _ = xy.shape
    nodes = nodes_a_tile(xy)
    rows = min(resolution, max(1, nodes // resolution))
    size = min(planes, max(1, nodes // resolution**2))
    samples = max(1, nodes // (planes * resolution**2))
    for b, x, y in product(range(0, batch, samples), range(0, planes, size), range(0, resolution, rows)):
        yield slice(b, b + samples), slice(x, x + size), slice(y, y + rows)


def _first_hidden(xy: Tensor, xz: Tensor, yz: Tensor, b: slice, x: slice, y: slice) -> Tensor:
    """[B, x, y, z, width] of the tile."""
    return F.relu_((xy[b, x, y, None] + xz[b, x, None]).add_(yz[b, None, y]))
