"""Cameras: one convention, stated once.

The world is right-handed with +Z up, and the front of an object is +X: azimuth 0 puts the camera on +X, azimuth 90
on +Y. Camera-to-world matrices follow OpenGL: the camera's x points right, y up, and it looks along -z. Row 0 of an
image is its top. Elevation, azimuth and field of view are degrees at the API, radians inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_DIAGONAL = math.sqrt(3.0)  # of the scene's cube [-1, 1]^3


@dataclass(frozen=True)
class Cameras:
    """Perspective cameras that look at the origin.

    camera_to_world [B, V, 4, 4]; fovy [B, V] vertical field of view in radians.
    """

    camera_to_world: Tensor
    fovy: Tensor

    def __post_init__(self) -> None:
        shape = self.camera_to_world.shape
        if len(shape) != 4 or shape[2:] != (4, 4) or self.fovy.shape != shape[:2]:
            raise ValueError(
                f"camera_to_world={tuple(shape)}, fovy={tuple(self.fovy.shape)}: expected [B, V, 4, 4] and [B, V]"
            )

    @property
    def batch(self) -> int:
        return self.camera_to_world.shape[0]

    @property
    def views(self) -> int:
        return self.camera_to_world.shape[1]

    @property
    def position(self) -> Tensor:
        """Camera centres in the world, [B, V, 3]."""
        return self.camera_to_world[..., :3, 3]

    @property
    def distance(self) -> Tensor:
        """Distance from the origin, [B, V], scene units."""
        return self.position.norm(dim=-1)

    @property
    def relative_distance(self) -> Tensor:
        """Distance times tan(fovy / 2), [B, V]: what the published recipe samples in [0.8, 1]."""
        return self.distance * torch.tan(self.fovy / 2)

    @property
    def elevation(self) -> Tensor:
        """Radians, [B, V]."""
        return torch.asin((self.position[..., 2] / self.distance).clamp(-1, 1))

    @property
    def azimuth(self) -> Tensor:
        """Radians, [B, V]."""
        return torch.atan2(self.position[..., 1], self.position[..., 0])

    @property
    def near_far(self) -> tuple[Tensor, Tensor]:
        """Planes that enclose the scene's cube along the viewing axis: distance -/+ sqrt(3), each [B, V]."""
        return self.distance - HALF_DIAGONAL, self.distance + HALF_DIAGONAL

    def to(self, device: torch.device | str) -> Cameras:
        return Cameras(self.camera_to_world.to(device), self.fovy.to(device))

    def select(self, views: Tensor) -> Cameras:
        """The views [B, n] (indices per sample) of these cameras."""
        rows = torch.arange(self.batch, device=views.device)[:, None]
        return Cameras(self.camera_to_world[rows, views], self.fovy[rows, views])

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Origins and unit directions of the rays through the pixel centres, each [B, V, H, W, 3]."""
        device, dtype = self.fovy.device, self.fovy.dtype
        rows = torch.arange(height, device=device, dtype=dtype) + 0.5
        columns = torch.arange(width, device=device, dtype=dtype) + 0.5
        scale = 2 * torch.tan(self.fovy / 2)[..., None, None] / height  # [B, V, 1, 1] units per pixel at depth 1
        x = ((columns - width / 2)[None, None, None, :] * scale).expand(-1, -1, height, -1)
        y = (-(rows - height / 2)[None, None, :, None] * scale).expand(-1, -1, -1, width)
        local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)  # [B, V, H, W, 3]
        directions = torch.einsum("bvij,bvhwj->bvhwi", self.camera_to_world[..., :3, :3], local)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.position[:, :, None, None].expand_as(directions), directions

    def world_to_camera(self) -> Tensor:
        """[B, V, 4, 4], the inverse of camera_to_world (a rigid motion)."""
        rotation = self.camera_to_world[..., :3, :3].transpose(-1, -2)
        translation = -(rotation @ self.position[..., None])
        bottom = self.camera_to_world[..., 3:, :]
        return torch.cat([torch.cat([rotation, translation], dim=-1), bottom], dim=-2)

    def projection(self, aspect: float = 1.0, near: float = 0.1, far: float = 100.0) -> Tensor:
        """OpenGL projection [B, V, 4, 4]: clip = projection @ world_to_camera @ [x, y, z, 1], y up, z in [-w, w]."""
        f = 1 / torch.tan(self.fovy / 2)
        matrix = self.camera_to_world.new_zeros(self.batch, self.views, 4, 4)
        matrix[..., 0, 0] = f / aspect
        matrix[..., 1, 1] = f
        matrix[..., 2, 2] = -(far + near) / (far - near)
        matrix[..., 2, 3] = -2 * far * near / (far - near)
        matrix[..., 3, 2] = -1
        return matrix


def orbit_cameras(elevation: Tensor, azimuth: Tensor, distance: Tensor | float, fovy: Tensor | float) -> Cameras:
    """Cameras on a sphere around the origin, looking at it.

    elevation, azimuth [B, V] in degrees (elevation strictly between -90 and 90); distance [B, V] or a number, scene
    units; fovy [B, V] or a number, degrees.
    """
    if elevation.ndim != 2 or elevation.shape != azimuth.shape:
        raise ValueError(
            f"elevation={tuple(elevation.shape)}, azimuth={tuple(azimuth.shape)}: expected two tensors [B, V]"
        )
    if not bool((elevation.abs() < 90).all()):
        raise ValueError(f"elevation={elevation.abs().max().item():g}: must lie strictly between -90 and 90 degrees")
    e, a = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    d = torch.as_tensor(distance, dtype=e.dtype, device=e.device).expand_as(e)
    if not bool((d > 0).all()):
        raise ValueError(f"distance={d.min().item():g}: must be positive")
    back = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)  # [B, V, 3] camera z
    right = torch.stack([-a.sin(), a.cos(), torch.zeros_like(a)], dim=-1)  # camera x
    up = torch.linalg.cross(back, right)  # camera y
    rotation = torch.stack([right, up, back], dim=-1)
    top = torch.cat([rotation, (back * d[..., None])[..., None]], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*e.shape, 1, 4)
    angle = torch.deg2rad(torch.as_tensor(fovy, dtype=e.dtype, device=e.device)).expand_as(e)
    return Cameras(torch.cat([top, bottom], dim=-2), angle)


@dataclass(frozen=True)
class CameraSampling:
    """How training cameras are drawn: `views` cameras 90 degrees apart (360 / views), one draw a prompt."""

    views: int = 4  # cameras a prompt, at uniform azimuth intervals
    elevation: tuple[float, float] = (0.0, 30.0)  # degrees, uniform, shared by the views of a prompt
    relative_distance: tuple[float, float] = (0.8, 1.0)  # distance * tan(fovy / 2), uniform
    fovy: float = 60.0  # degrees

    def sample(self, uniforms: Tensor) -> Cameras:
        """Cameras [B, views] from uniforms [B, 3] in [0, 1): elevation, azimuth offset, distance."""
        low, high = self.elevation
        elevation = (low + (high - low) * uniforms[:, 0:1]).expand(-1, self.views)
        steps = torch.arange(self.views, dtype=uniforms.dtype, device=uniforms.device)
        azimuth = (uniforms[:, 1:2] + steps) / self.views * 360 - 180
        near, far = self.relative_distance
        relative = (near + (far - near) * uniforms[:, 2:3]).expand(-1, self.views)
        return orbit_cameras(elevation, azimuth, relative / math.tan(math.radians(self.fovy) / 2), self.fovy)
