"""Sphere tracing: exact renderings of a field whose sdf never overestimates the distance (Hart, 1996)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import HALF_DIAGONAL, Cameras
from prd.fields.protocol import Field
from prd.rendering.views import Views, disparity_from_depth


@dataclass(frozen=True)
class SphereTracer:
    """Renders an exact field, not differentiably: the reference for the differentiable renderers.

    supersample: rays per side of a pixel, averaged; max_steps, tolerance: when a ray stops, scene units.
    """

    supersample: int = 2
    max_steps: int = 96
    tolerance: float = 1e-3

    @torch.no_grad()
    def trace(self, field: Field, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Distance along each ray and whether it hit, [B, N, 1] and [B, N, 1] bool; origins, directions [B, N, 3]."""
        reach = origins.norm(dim=-1, keepdim=True)
        distance = (reach - HALF_DIAGONAL).clamp(min=0)
        hit = torch.zeros_like(distance, dtype=torch.bool)
        active = torch.ones_like(hit)
        for step in range(self.max_steps):
            # compaction: rays that have landed or left are dropped every few steps
            if step % 4 == 0:
                keep = int(active.sum(dim=1).max())
                if keep == 0:
                    break
                index = active[..., 0].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :keep, None]
                o = origins.gather(1, index.expand(-1, -1, 3))
                d = directions.gather(1, index.expand(-1, -1, 3))
            t = distance.gather(1, index)
            sdf = field.sdf(o + t * d)
            near = (sdf < self.tolerance) & active.gather(1, index)
            t = torch.where(near, t, t + sdf.clamp(min=self.tolerance / 2))
            t = torch.where(active.gather(1, index), t, distance.gather(1, index))
            distance = distance.scatter(1, index, t)
            hit = hit.scatter(1, index, hit.gather(1, index) | near)
            gone = t > reach.gather(1, index) + HALF_DIAGONAL
            active = active.scatter(1, index, active.gather(1, index) & ~near & ~gone)
        return distance, hit

    @torch.no_grad()
    def __call__(
        self,
        field: Field,
        cameras: Cameras,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
        generator: torch.Generator | None = None,
    ) -> Views:
        """Views [B, V, height, width, .]; nothing is drawn, `generator` is ignored."""
        s = self.supersample
        origins, directions = cameras.rays(height * s, width * s)
        shape = origins.shape[:-1]
        o, d = origins.flatten(1, 3), directions.flatten(1, 3)
        distance, hit = self.trace(field, o, d)
        points = o + distance * d
        solid = hit.to(points.dtype)
        colour = field.rgb(points) * solid
        normal = F.normalize(field.sdf_and_gradient(points)[1], dim=-1) * solid
        forward = -cameras.camera_to_world[..., :3, 2]  # [B, V, 3]
        cosine = (directions * forward[:, :, None, None]).sum(-1, keepdim=True).flatten(1, 3)
        far = cameras.near_far[1]
        far_ray = far[:, :, None].expand(-1, -1, shape[2] * shape[3]).flatten(1)[..., None]
        depth = torch.where(hit, distance * cosine, far_ray)

        def pool(x: Tensor) -> Tensor:
            images = x.view(*shape, -1).flatten(0, 1).permute(0, 3, 1, 2)  # [B*V, C, sH, sW]
            return F.avg_pool2d(images, s).permute(0, 2, 3, 1).unflatten(0, shape[:2])

        opacity, depth = pool(solid), pool(depth)
        back = torch.as_tensor(background, dtype=colour.dtype, device=colour.device)
        rgb = pool(colour) + (1 - opacity) * back
        return Views(rgb, pool(normal), depth, disparity_from_depth(depth, cameras), opacity, cameras)
