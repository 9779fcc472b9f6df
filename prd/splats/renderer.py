"""The splat renderer: field -> isosurface -> a Gaussian at each vertex -> images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.cameras import Cameras
from prd.fields.protocol import Field
from prd.isosurface.marching_cubes import Surface
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer, check_meshes
from prd.splats.rasterize import rasterize_splats
from prd.splats.splats import Splats, splats_on
from prd.utils.checked_types import CHECKS


@settings(frozen=True, kw_only=True, config=CHECKS)
class SplatConfig(SurfaceConfig):
    """Settings of the splat renderer: those of the mesh renderer, one of them with another meaning."""

    antialias: bool = True  # keep what Gaussians smaller than a pixel cover; most viewers of splat files enlarge them


@dataclass(frozen=True)
class SplatRenderer(SurfaceRenderer):
    """Renders a Field through 3D Gaussians on its isosurface (`prd.splats.splats.splats_on`).

    config    its settings
    on_empty  as in `SurfaceRenderer`

    A field with splat heads teaches them and, through the vertices, its geometry. Normals are those of the Gaussians'
    flat sides; depth and disparity are composited of their means.
    """

    config_class: ClassVar[type] = SplatConfig

    config: SurfaceConfig = field(default_factory=SplatConfig)

    def accepts_grid(self, resolution: int) -> bool:
        """False: a grid of the field's values has no splat heads, and gives its points no gradient."""
        return False

    def _draw(self, field: Field, meshes: list[Surface], cameras: Cameras, height: int, width: int) -> Tensor:
        check_meshes(meshes, cameras)
        samples = zip(splats_on(field, meshes), cameras.chunk(cameras.batch), strict=True)
        return torch.stack([draw_splats(own, seen, height, width, self.config.antialias) for own, seen in samples])


def draw_splats(splats: Splats, cameras: Cameras, height: int, width: int, antialias: bool = True) -> Tensor:
    """Images [V, H, W, 8] of one object: rgb, normal, far - depth and opacity, all 0 where nothing is seen.

    cameras    of one sample, [1, V]
    antialias  as in `prd.splats.project.project`

    `prd.rendering.surface.composite` makes views of them.
    """
    forward = -cameras.camera_to_world[0, :, None, :3, 2]  # [V, 1, 3]
    depth = ((splats.means - cameras.position[0, :, None]) * forward).sum(-1, keepdim=True)  # [V, N, 1]
    same = torch.cat([splats.colors, splats.normals()], dim=-1).expand(cameras.views, -1, -1)
    features = torch.cat([same, cameras.near_far[1][0, :, None, None] - depth], dim=-1)
    return torch.cat(rasterize_splats(splats, features, cameras, height, width, antialias=antialias), dim=-1)
