"""Views: what a renderer returns and a teacher takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prd.cameras import Cameras

RICHDREAMER_BACKGROUND = (0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Views:
    """Renderings of B shapes from V cameras, every tensor [B, V, H, W, channels].

    rgb        [..., 3] in [0, 1], composited over the background
    normal     [..., 3] world-space unit normal times opacity, in [-1, 1]; 0 where nothing was hit
    depth      [..., 1] z along the viewing axis, scene units, composited with far: sum(w z) + (1 - sum w) far
    disparity  [..., 1] clamp((far - depth) / (far - near), 0, 1), near / far = distance -/+ sqrt(3); 0 = background
    opacity    [..., 1] in [0, 1]
    cameras    the cameras that made them
    z_variance [..., 1] sum of w (t - sum w t)^2 along each ray, scene units squared; 0 (the default) for a surface
    """

    rgb: Tensor
    normal: Tensor
    depth: Tensor
    disparity: Tensor
    opacity: Tensor
    cameras: Cameras
    z_variance: Tensor = None  # type: ignore[assignment]  # a tensor once made

    def __post_init__(self) -> None:
        if self.z_variance is None:
            object.__setattr__(self, "z_variance", torch.zeros_like(self.opacity))

    def camera_normal(self) -> Tensor:
        """Normals in the cameras' axes (x right, y up, z towards the camera) times opacity, [B, V, H, W, 3]."""
        rotation = self.cameras.camera_to_world[..., :3, :3]
        return torch.einsum("bvji,bvhwj->bvhwi", rotation, self.normal)

    def packed_normal(self, background: tuple[float, float, float] = RICHDREAMER_BACKGROUND) -> Tensor:
        """RichDreamer's normal image in [0, 1], [B, V, H, W, 3].

        (n + 1) / 2 of the camera-space normal with x negated, over `background` by opacity.
        """
        flipped = self.camera_normal() * self.normal.new_tensor([-1.0, 1.0, 1.0])
        empty = self.normal.new_tensor(background)
        return (flipped + self.opacity) / 2 + (1 - self.opacity) * empty


Disparity = Literal["camera", "triplane_turbo"]  # of depth along the viewing axis, or as TriplaneTurbo published it


def disparity_from_depth(depth: Tensor, cameras: Cameras) -> Tensor:
    """clamp((far - depth) / (far - near), 0, 1) with near / far = distance -/+ sqrt(3); depth [B, V, H, W, 1]."""
    near, far = (plane[:, :, None, None, None] for plane in cameras.near_far)
    return ((far - depth) / (far - near)).clamp(0, 1)


def published_disparity(depth: Tensor, opacity: Tensor, cameras: Cameras) -> Tensor:
    """TriplaneTurbo's published disparity: `depth` is multiplied by an opacity it already contains.

    depth [B, V, H, W, 1]: sum of w t along the ray from the volume renderer, or `published_mesh_depth`; not composited.
    """
    near, far = (plane[:, :, None, None, None] for plane in cameras.near_far)
    return ((far - depth * opacity - (1 - opacity) * far) / (far - near)).clamp(0, 1)


def published_mesh_depth(depth: Tensor, opacity: Tensor, near: float = 0.1, far: float = 1000.0) -> Tensor:
    """Depth as TriplaneTurbo's mesh renderer has it: z in clip space where a surface is, else 0.

    depth [B, V, H, W, 1] along the viewing axis; near, far of the published projection, scene units.
    """
    return opacity * ((far + near) * depth - 2 * far * near) / (far - near)


def background_like(background: float | Tensor, images: Tensor) -> Tensor:
    """A background for images [B, V, H, W, .], in their type; ValueError unless it fits [B, V, H, W, 3]."""
    back = torch.as_tensor(background, dtype=images.dtype, device=images.device)
    shape = (*images.shape[:4], 3)
    sizes = tuple(back.shape)
    fits = len(sizes) <= 5 and all(n in (1, m) for n, m in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"background={sizes}: must be a number or broadcastable to [B, V, H, W, 3] = {shape}")
    return back


def check_image_size(height: int, width: int) -> None:
    """ValueError for images below 2 pixels per side."""
    if height < 2 or width < 2:
        raise ValueError(f"height={height}, width={width}: must be at least 2 pixels each")
