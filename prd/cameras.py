"""Cameras: one convention, stated once.

The world is right-handed with +Z up, and the front of an object is +X: azimuth 0 puts the camera on +X, azimuth 90
on +Y. Camera-to-world matrices follow OpenGL: the camera's x points right, y up, and it looks along -z. Row 0 of an
image is its top. Elevation, azimuth and field of view are degrees at the API, radians inside.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.utils.checked_types import CHECKS, Count, Float, Positive

Elevation = Annotated[Float, Field(gt=-90, lt=90)]
Angle = Annotated[Float, Field(gt=0, lt=180)]
Projection = Literal["perspective", "orthographic"]

HALF_DIAGONAL = math.sqrt(3.0)  # of the scene's cube [-1, 1]^3
RIGID = 1e-3  # largest entry of R R^T - 1 of a rotation
MIN_DISTANCE = 1e-6  # scene units; nearer to the origin a camera has no direction to it


@dataclass(frozen=True)
class Cameras:
    """Cameras that look at the origin, perspective or orthographic.

    camera_to_world [B, V, 4, 4]; fovy [B, V] vertical field of view in radians. The rays of orthographic cameras are
    parallel, and their images span what a perspective one of that fovy sees at the distance of the origin:
    2 distance tan(fovy / 2) scene units from bottom to top.

    Raises ValueError for a pose that is not finite or no rigid motion, a camera at the origin, or a field of view
    outside (0, pi).
    """

    camera_to_world: Tensor
    fovy: Tensor
    orthographic: bool = False

    def __post_init__(self) -> None:
        shape = self.camera_to_world.shape
        if len(shape) != 4 or shape[2:] != (4, 4) or self.fovy.shape != shape[:2]:
            raise ValueError(
                f"camera_to_world={tuple(shape)}, fovy={tuple(self.fovy.shape)}: expected [B, V, 4, 4] and [B, V]"
            )
        pose, fovy = self.camera_to_world.detach(), self.fovy.detach()
        rotation = pose[..., :3, :3]
        with torch.autocast(pose.device.type, enabled=False):  # whose products are no more exact than RIGID
            squared = rotation @ rotation.transpose(-1, -2)
        straight = ((squared - torch.eye(3, dtype=pose.dtype, device=pose.device)).abs() < RIGID).flatten(2).all(-1)
        right_handed = torch.linalg.det(rotation.float()) > 0
        checks = (
            ("camera_to_world", torch.isfinite(pose).flatten(2).all(-1), "must be finite"),
            ("camera_to_world", straight & right_handed, "its 3 x 3 part must be a rotation"),
            ("camera_to_world", pose[..., :3, 3].norm(dim=-1) > MIN_DISTANCE, "the camera must not be at the origin"),
            ("fovy", (fovy > 0) & (fovy < math.pi), "must lie between 0 and pi radians (0 and 180 degrees)"),
        )
        if bool(torch.stack([ok.all() for _, ok, _ in checks]).all()):  # one read of what may be on a GPU
            return
        for name, ok, allowed in checks:
            if not bool(ok.all()):
                sample, view = (~ok).nonzero()[0].tolist()
                value = getattr(self, name)[sample, view].tolist()
                raise ValueError(f"{name}[{sample}, {view}]={value}: {allowed}")

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
        """Distance times tan(fovy / 2), [B, V]: half of what an image spans at the origin, scene units."""
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

    def to(self, device: torch.device | str | torch.dtype) -> Cameras:
        """These cameras on another device, or in another floating-point type."""
        return replace(self, camera_to_world=self.camera_to_world.to(device), fovy=self.fovy.to(device))

    def chunk(self, parts: int) -> list[Cameras]:
        """The cameras of the first samples, of the next, ..., in `parts` equal batches."""
        pairs = zip(self.camera_to_world.chunk(parts), self.fovy.chunk(parts), strict=True)
        return [replace(self, camera_to_world=matrices, fovy=fovy) for matrices, fovy in pairs]

    def select(self, views: Tensor) -> Cameras:
        """The views [B, n] (indices per sample) of these cameras."""
        rows = torch.arange(self.batch, dtype=torch.long, device=views.device)[:, None]
        return replace(self, camera_to_world=self.camera_to_world[rows, views], fovy=self.fovy[rows, views])

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Origins and unit directions of the rays through the pixel centres, each [B, V, H, W, 3].

        Rays of orthographic cameras begin on the plane through the camera that is parallel to the image.
        """
        if height < 1 or width < 1:
            raise ValueError(f"height={height}, width={width}: must be positive")
        device, dtype = self.fovy.device, self.fovy.dtype
        rows = torch.arange(height, device=device, dtype=dtype) + 0.5
        columns = torch.arange(width, device=device, dtype=dtype) + 0.5
        half = self.relative_distance if self.orthographic else torch.tan(self.fovy / 2)  # of an image, at depth 1
        scale = 2 * half[..., None, None] / height  # [B, V, 1, 1] units per pixel
        x = ((columns - width / 2)[None, None, None, :] * scale).expand(-1, -1, height, -1)
        y = (-(rows - height / 2)[None, None, :, None] * scale).expand(-1, -1, -1, width)
        plane = torch.zeros_like(x) if self.orthographic else -torch.ones_like(x)
        local = torch.stack([x, y, plane], dim=-1)  # [B, V, H, W, 3]
        directions = torch.einsum("bvij,bvhwj->bvhwi", self.camera_to_world[..., :3, :3], local)
        if self.orthographic:
            forward = -self.camera_to_world[..., None, None, :3, 2]
            forward = forward / forward.norm(dim=-1, keepdim=True)
            return self.position[:, :, None, None] + directions, forward.expand_as(directions)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.position[:, :, None, None].expand_as(directions), directions

    def world_to_camera(self) -> Tensor:
        """[B, V, 4, 4], the inverse of camera_to_world (a rigid motion)."""
        rotation = self.camera_to_world[..., :3, :3].transpose(-1, -2)
        translation = -(rotation @ self.position[..., None])
        bottom = self.camera_to_world[..., 3:, :]
        return torch.cat([torch.cat([rotation, translation], dim=-1), bottom], dim=-2)

    def project(self, points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Project points [B, N, 3]: (column, row) [B, V, N, 2] in pixels, and depth [B, V, N] along the viewing axis.

        The centre of the first pixel is (0.5, 0.5), row 0 at the top; depth in scene units, positive before the
        camera. A point beside or behind it has coordinates outside the image, or a depth that is not positive.
        """
        local = (points[:, None] - self.position[:, :, None]) @ self.camera_to_world[..., :3, :3]  # [B, V, N, 3]
        depth = -local[..., 2]
        if self.orthographic:
            scale, shrink = height / (2 * self.relative_distance)[..., None], torch.ones_like(depth)
        else:
            scale, shrink = height / (2 * torch.tan(self.fovy / 2))[..., None], depth  # pixels per unit at depth 1
        column = width / 2 + scale * local[..., 0] / shrink
        row = height / 2 - scale * local[..., 1] / shrink
        return torch.stack([column, row], dim=-1), depth

    def projection(self, aspect: float = 1.0, near: float | Tensor = 0.1, far: float | Tensor = 100.0) -> Tensor:
        """OpenGL projection [B, V, 4, 4]: clip = projection @ world_to_camera @ [x, y, z, 1], y up, z in [-w, w].

        near, far: planes in scene units along the viewing axis, numbers or [B, V]; ValueError unless 0 < near < far and
        both are finite.
        """
        nearest, furthest = (torch.as_tensor(plane, dtype=torch.float64, device="cpu") for plane in (near, far))
        if not bool(((nearest > 0) & (nearest < furthest) & (furthest < math.inf)).all()):
            raise ValueError(f"near={near}, far={far}: need 0 < near < far, both finite")
        f = 1 / (self.relative_distance if self.orthographic else torch.tan(self.fovy / 2))
        matrix = self.camera_to_world.new_zeros(self.batch, self.views, 4, 4)
        matrix[..., 0, 0] = f / aspect
        matrix[..., 1, 1] = f
        if self.orthographic:
            matrix[..., 2, 2] = -2 / (far - near)
            matrix[..., 2, 3] = -(far + near) / (far - near)
            matrix[..., 3, 3] = 1
            return matrix
        matrix[..., 2, 2] = -(far + near) / (far - near)
        matrix[..., 2, 3] = -2 * far * near / (far - near)
        matrix[..., 3, 2] = -1
        return matrix


def orbit_cameras(
    elevation: Tensor,
    azimuth: Tensor,
    distance: Tensor | float,
    fovy: Tensor | float,
    *,
    orthographic: bool = False,
) -> Cameras:
    """Cameras on a sphere around the origin, looking at it.

    elevation, azimuth [B, V] in degrees (elevation strictly between -90 and 90); distance [B, V] or a number, scene
    units; fovy [B, V] or a number, degrees, between 0 and 180; orthographic as for `Cameras`. Raises ValueError
    outside these ranges or for NaN.
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
    return Cameras(torch.cat([top, bottom], dim=-2), angle, orthographic)


@settings(frozen=True, kw_only=True, config=CHECKS)
class CamerasConfig:
    """Settings and drawing of orbit cameras: `views` cameras evenly spaced in azimuth, from a random start per prompt.

    The paper says four views at uniform azimuth intervals (section 3.4); the defaults are the published recipe's. Half
    of what an orthographic image spans is the relative distance, or distance * tan(fovy / 2) where both are given.
    """

    views: Count = 4  # views per prompt, evenly spaced in azimuth
    azimuths: tuple[Float, ...] | None = None  # of the views, degrees; null: evenly spaced from a random start
    projection: Projection = "perspective"  # orthographic: parallel rays, as many scene units in an image at any depth
    elevation: tuple[Elevation, Elevation] = (0.0, 30.0)  # range, degrees above the horizon
    relative_distance: tuple[Positive, Positive] = (0.8, 1.0)  # range of distance * tan(fovy / 2)
    fovy: Angle | tuple[Angle, Angle] = 60.0  # vertical field of view, degrees; a range is drawn from
    distance: tuple[Positive, Positive] | None = None  # range, scene units, in the place of relative_distance

    @model_validator(mode="after")
    def _check(self) -> CamerasConfig:
        for name in ("elevation", "relative_distance", "fovy", "distance"):
            if not isinstance(given := getattr(self, name), tuple):
                continue
            low, high = given
            if low > high:
                raise ValueError(f"{name}=[{low}, {high}]: must be [low, high]")
        if self.azimuths is not None and len(self.azimuths) != self.views:
            raise ValueError(
                f"azimuths={list(self.azimuths)}: must be one for each of views={self.views}; set views to their number"
            )
        return self

    @property
    def fovy_range(self) -> tuple[float, float]:
        """Lowest and highest field of view, degrees."""
        return self.fovy if isinstance(self.fovy, tuple) else (self.fovy, self.fovy)

    @property
    def num_draws(self) -> int:
        """Random numbers per prompt: elevation, azimuth, distance, and the field of view where it varies."""
        return 4 if isinstance(self.fovy, tuple) else 3

    @property
    def middle(self) -> tuple[float, float]:
        """Distance in scene units and field of view in degrees at the middle of their ranges."""
        fovy = sum(self.fovy_range) / 2
        if self.distance is not None:
            return sum(self.distance) / 2, fovy
        return sum(self.relative_distance) / 2 / math.tan(math.radians(fovy) / 2), fovy

    def sample(self, uniforms: Tensor) -> Cameras:
        """Cameras [B, views] from uniforms [B, num_draws] in [0, 1): elevation, azimuth, distance, field of view."""
        if uniforms.ndim != 2 or uniforms.shape[1] != self.num_draws:
            raise ValueError(f"uniforms={tuple(uniforms.shape)}: expected [B, {self.num_draws}]")

        def between(low: float, high: float, column: int) -> Tensor:
            return (low + (high - low) * uniforms[:, column : column + 1]).expand(-1, self.views)

        elevation = between(*self.elevation, 0)
        steps = torch.arange(self.views, dtype=uniforms.dtype, device=uniforms.device)
        azimuth = (uniforms[:, 1:2] + steps) / self.views * 360 - 180
        if self.azimuths is not None:
            azimuth = azimuth.new_tensor(self.azimuths).expand_as(azimuth)
        parallel = self.projection == "orthographic"
        fovy = between(*self.fovy_range, 3) if self.num_draws == 4 else torch.full_like(elevation, self.fovy_range[0])
        if self.distance is not None:
            return orbit_cameras(elevation, azimuth, between(*self.distance, 2), fovy, orthographic=parallel)
        relative = between(*self.relative_distance, 2)
        distance = relative / torch.tan(torch.deg2rad(fovy) / 2)
        return orbit_cameras(elevation, azimuth, distance, fovy, orthographic=parallel)


def __getattr__(name: str) -> Any:
    """Read the former name of `CamerasConfig` for one release."""
    if name != "CameraSampling":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("prd.CameraSampling is now prd.CamerasConfig", FutureWarning, stacklevel=2)
    return CamerasConfig
