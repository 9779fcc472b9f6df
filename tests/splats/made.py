"""Random Gaussians and cameras, for tests."""

from __future__ import annotations

import torch

from prd.cameras import Cameras, orbit_cameras
from prd.splats.splats import Splats


def random_splats(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Splats:
    """Gaussians of several sizes within the cube, not flat."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return Splats(
        means=(uniform(count, 3) * 1.4 - 0.7).to(dtype),
        scales=(0.03 + 0.25 * uniform(count, 3)).to(dtype),
        rotations=torch.nn.functional.normalize(uniform(count, 4) - 0.5, dim=-1).to(dtype),
        opacities=(0.2 + 0.7 * uniform(count)).to(dtype),
        colors=uniform(count, 3).to(dtype),
    )


def two_views(dtype: torch.dtype = torch.float64, *, orthographic: bool = False) -> Cameras:
    """The cameras [1, 2] of one sample."""
    elevation, azimuth = torch.tensor([[20.0, -40.0]], dtype=dtype), torch.tensor([[10.0, 150.0]], dtype=dtype)
    return orbit_cameras(elevation, azimuth, 2.5, 50.0, orthographic=orthographic)
