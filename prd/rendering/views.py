"""Views: what a renderer returns and a teacher takes."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    rgb: Tensor
    normal: Tensor
    depth: Tensor
    disparity: Tensor
    opacity: Tensor
    cameras: Cameras

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


def disparity_from_depth(depth: Tensor, cameras: Cameras) -> Tensor:
    """clamp((far - depth) / (far - near), 0, 1) with near / far = distance -/+ sqrt(3); depth [B, V, H, W, 1]."""
    near, far = (plane[:, :, None, None, None] for plane in cameras.near_far)
    return ((far - depth) / (far - near)).clamp(0, 1)
