"""Multi-resolution grids of features whose parameters are given, not owned (Instant NGP, Mueller et al. 2022).

ATT3D's mapping network makes one set of parameters per prompt. A level of R nodes per axis is dense while R^3 entries
fit `table_size`, and hashed beyond (Instant NGP, Eq. 4). Plain PyTorch; differentiable in the parameters and, twice, in
the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from prd.fields.planes import resampling_matrix

PRIMES = (1, 2_654_435_761, 805_459_861)


class FeatureGrids:
    """The shape of a multi-resolution grid over the cube [-1, 1]^3.

    resolutions  nodes per axis of each level, the outermost on the cube's faces
    features     F, channels of a level
    table_size   most entries of a level
    """

    def __init__(self, resolutions: Sequence[int], features: int, table_size: int = 1 << 19) -> None:
        if not resolutions or min(resolutions) < 2:
            raise ValueError(f"resolutions={tuple(resolutions)}: each level needs at least 2 nodes per axis")
        self.resolutions, self.features, self.table_size = tuple(resolutions), features, table_size
        self.entries = tuple(min(resolution**3, table_size) for resolution in self.resolutions)

    @property
    def num_parameters(self) -> int:
        """Numbers of all levels, for one prompt."""
        return sum(self.entries) * self.features

    @property
    def channels(self) -> int:
        """Channels of a point's encoding, those of all levels."""
        return len(self.resolutions) * self.features

    def levels(self, parameters: Tensor) -> list[Tensor]:
        """Tables [B, entries, F], level by level, of parameters [B, num_parameters]."""
        if parameters.ndim != 2 or parameters.shape[1] != self.num_parameters:
            raise ValueError(f"parameters={tuple(parameters.shape)}: expected [B, {self.num_parameters}]")
        flat = parameters.split([count * self.features for count in self.entries], dim=1)
        return [level.unflatten(1, (-1, self.features)) for level in flat]

    def encode(self, parameters: Tensor, points: Tensor) -> Tensor:
        """Trilinear features [B, N, channels] at points [B, N, 3], which are clamped to the cube."""
        tables = self.levels(parameters)
        return torch.cat(
            [self._level(table, r, points) for table, r in zip(tables, self.resolutions, strict=True)], dim=-1
        )

    def _level(self, table: Tensor, resolution: int, points: Tensor) -> Tensor:
        place = (points.clamp(-1, 1) + 1) / 2 * (resolution - 1)
        base = place.detach().floor().clamp(max=resolution - 2)
        fraction = place - base  # [B, N, 3] in [0, 1]
        corner = base.long()
        total = points.new_zeros(())
        for offset in product((0, 1), repeat=3):
            step = torch.tensor(offset, dtype=torch.long, device=points.device)
            weight = torch.where(step.bool(), fraction, 1 - fraction).prod(dim=-1, keepdim=True)
            index = self.index(corner + step, resolution)  # [B, N]
            values = table.gather(1, index[..., None].expand(-1, -1, self.features))
            total = total + values * weight
        return total

    def index(self, nodes: Tensor, resolution: int) -> Tensor:
        """The entry of each node [..., 3] (x, y, z counted from 0) in its level's table."""
        x, y, z = nodes.unbind(-1)
        if resolution**3 <= self.table_size:
            return (x * resolution + y) * resolution + z
        return (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) % self.table_size

    def encode_grid(self, parameters: Tensor, x: Tensor, nodes: Tensor) -> Tensor:
        """`encode` at the nodes x [X] times nodes [R]^2 of a regular grid: [B, X, R, R, channels].

        Dense levels are resampled axis by axis, which costs a small part of looking every node up.
        """
        parts = []
        points: Tensor | None = None
        for table, resolution in zip(self.levels(parameters), self.resolutions, strict=True):
            if resolution**3 <= self.table_size:
                parts.append(_resample(table.unflatten(1, (resolution,) * 3), x, nodes))
                continue
            if points is None:
                points = torch.cartesian_prod(x, nodes, nodes).expand(len(parameters), -1, -1)
            parts.append(self._level(table, resolution, points).unflatten(1, (len(x), len(nodes), len(nodes))))
        return torch.cat(parts, dim=-1)


def _resample(volume: Tensor, x: Tensor, nodes: Tensor) -> Tensor:
    """Trilinear values [B, X, R, R, F] of a dense level [B, r, r, r, F]."""
    resolution = volume.shape[1]

    def weights(axis: Tensor) -> Tensor:
        # nodes on the faces of the cube: as texels of size 2 / (r - 1) that reach half a texel beyond them
        return resampling_matrix(axis * (resolution - 1) / resolution, resolution)

    along, other = weights(x), weights(nodes)
    volume = torch.einsum("zk,bijkf->bijzf", other, volume)
    volume = torch.einsum("yj,bijzf->biyzf", other, volume)
    return torch.einsum("xi,biyzf->bxyzf", along, volume)
