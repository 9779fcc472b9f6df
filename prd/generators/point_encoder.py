"""PointNet with local pooling: a point cloud becomes features on three planes (after Convolutional Occupancy Networks).

LATTE3D's encoder. Planes are xy, xz, yz, laid out as `prd.fields.triplane.plane_coordinates` says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.fields.planes import plane_coordinates
from prd.fields.positional_triplane import positional_encoding
from prd.utils.construction import float32_weights

FREQUENCIES = 4  # of the positions' encoding


def dummy_cloud(count: int, radius: float = 0.6) -> Tensor:
    """The point cloud [N, 3] that says nothing: a Fibonacci sphere around the origin, scene units."""
    index = torch.arange(count, dtype=torch.float32, device="cpu") + 0.5
    z = 1 - 2 * index / count
    angle = math.pi * (1 + math.sqrt(5)) * index
    ring = (1 - z**2).sqrt()
    return radius * torch.stack([ring * angle.cos(), ring * angle.sin(), z], dim=-1)


def anneal_cloud(points: Tensor, dummy: Tensor, share: float) -> Tensor:
    """Clouds [B, N, 3] whose first `share` of points are the dummy's [N, 3]: 0 is the shape, 1 exactly the dummy."""
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: must lie in 0..1")
    if points.ndim != 3 or points.shape[1:] != dummy.shape:
        raise ValueError(f"points={tuple(points.shape)}: expected [B, {len(dummy)}, 3], as many as the dummy has")
    count = round(share * len(dummy))
    return torch.cat([dummy[:count].expand(len(points), -1, -1), points[:, count:]], dim=1)


class PointEncoder(nn.Module):
    """Point clouds [B, N, 3] in the cube [-1, 1]^3 to planes [B, 3, C, H, H].

    Each block mixes a point's features with the mean over its pixel of every plane (local pooling); at the end the
    points' features are averaged pixel by pixel. A pixel without points is 0.
    """

    @float32_weights()
    def __init__(self, width: int, channels: int, size: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Linear(3 * (1 + 2 * FREQUENCIES), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(num_blocks)
        )
        self.out = nn.Linear(width, channels)

    def forward(self, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3]")
        pixels = self.pixels(points)
        features = self.embed(positional_encoding(points, FREQUENCIES).flatten(-2))
        for block in self.blocks:
            planes = self.scatter(features, pixels)  # [B, 3, H H, width]
            index = pixels[..., None].expand(-1, -1, -1, planes.shape[-1])
            pooled = planes.gather(2, index).sum(dim=1)  # [B, N, width]
            features = features + block(F.relu(torch.cat([features, pooled], dim=-1)))
        planes = self.scatter(self.out(F.relu(features)), pixels)
        return planes.transpose(2, 3).unflatten(3, (self.size, self.size))

    def pixels(self, points: Tensor) -> Tensor:
        """The pixel of each point on each plane, row * H + column: [B, 3, N]."""
        place = (plane_coordinates(points.clamp(-1, 1)) + 1) / 2 * self.size  # [B, 3, N, 2] (column, row)
        column, row = place.long().clamp(max=self.size - 1).unbind(-1)
        return row * self.size + column

    def scatter(self, features: Tensor, pixels: Tensor) -> Tensor:
        """Means of features [B, N, W] over the points of each pixel: [B, 3, H H, W]."""
        batch, _, width = features.shape
        features = features.float()  # half precision counts no more than 256 points exactly
        index = pixels[..., None].expand(-1, -1, -1, width)
        total = features.new_zeros(batch, 3, self.size**2, width)
        total = total.scatter_add(2, index, features[:, None].expand(-1, 3, -1, -1))
        points = features.new_zeros(batch, 3, self.size**2).scatter_add(2, pixels, features.new_ones(pixels.shape))
        return total / points.clamp(min=1)[..., None]
