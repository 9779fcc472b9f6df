"""The recorded scene, a renderer of recorded segments, and the published names of its images."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prd.fields.protocol import AutogradGradient, Field
from prd.rendering.rays import RayBundle
from prd.rendering.views import Views, published_disparity
from prd.rendering.volume import VolumeRenderer

WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Scene(AutogradGradient):
    """sdf = |p| - radius, colour = p / 2 + offset; the background is slope * direction + level."""

    radius: Tensor
    offset: Tensor
    slope: float
    level: float

    @classmethod
    def read(cls, text: str) -> Scene:
        """The scene as `meta.json: geometry` words it."""
        number = r"([-\d.]+)"
        pattern = (
            rf"sdf = \|p\| - r \(r={number}\), features = 0\.5\*p \+ c \(c={number}\), identity colour activation, "
            rf"normal = p/\|p\|; background colour = {number}\*dir \+ {number}"
        )
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(f"meta.json geometry={text!r}: expected {pattern}")
        radius, offset, slope, level = (float(value) for value in match.groups())
        return cls(torch.tensor([radius]), torch.full((3,), offset), slope, level)

    def leaves(self) -> Scene:
        return replace(self, radius=self.radius.clone().requires_grad_(), offset=self.offset.clone().requires_grad_())

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + self.offset

    def background(self, directions: Tensor) -> Tensor:
        return self.slope * directions + self.level


@dataclass(frozen=True)
class OnRecordedEdges(VolumeRenderer):
    """Marches recorded segments: what follows from them is not blurred by the rounding of how they were placed."""

    edges: Tensor | None = None

    def sample_edges(self, field: Field, rays: RayBundle) -> Tensor:
        assert self.edges is not None
        return self.edges


def published_images(views: Views, rays: RayBundle, back: Tensor) -> dict[str, Tensor]:
    """The images [1, V, H, W, C] that the published volume renderer puts out, by its names for them."""
    forward = -views.cameras.camera_to_world[..., :3, 2][:, :, None, None]
    cosine = (rays.directions.view_as(views.rgb) * forward).sum(-1, keepdim=True)
    empty = 1 - views.opacity
    depth = (views.depth - empty * views.cameras.near_far[1][:, :, None, None, None]) / cosine  # sum of w t
    return {
        "comp_rgb": views.rgb,
        "comp_rgb_fg": views.rgb - empty * back,
        "opacity": views.opacity,
        "depth": depth,
        "z_variance": views.z_variance,
        "disparity": published_disparity(depth, views.opacity, views.cameras),
        "comp_normal": views.normal / views.opacity,
        "comp_normal_cam_vis": views.packed_normal(),
        "comp_normal_cam_vis_white": views.packed_normal(WHITE),
    }


def translation(z: float) -> Tensor:
    """A matrix [1, 1, 4, 4] of zeros but for a shift along z, to be added to a pose."""
    matrix = torch.zeros(1, 1, 4, 4)
    matrix[..., 2, 3] = z
    return matrix
