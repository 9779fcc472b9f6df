"""Projection of 3D Gaussians to ellipses on an image (EWA splatting: Zwicker et al. 2001; Kerbl et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import Cameras

NEAR = 0.01  # scene units before a camera; a Gaussian whose mean is nearer, or behind, is not drawn
MARGIN = 1.3  # times the tangent of the half view angle: further out the Jacobian is that of this border
LOW_PASS = 0.3  # pixels squared, added to the ellipse's variances: the reconstruction filter of a pixel
MOST_ALPHA = 0.999  # of one Gaussian at a pixel: (1 - alpha) divides in the backward pass
LEAST_LEFT = 1e-4  # transmittance; the Gaussian that would leave less is not drawn at the pixel, nor those behind it
LEAST_ALPHA = 1 / 255  # what covers a pixel's centre by less is not drawn there: the ellipses are finite


@dataclass(frozen=True)
class Ellipses:
    """N Gaussians as the V views of one sample see them; coordinates in pixels, (0.5, 0.5) the first pixel's centre.

    centres    [V, N, 2]  (column, row)
    conics     [V, N, 3]  (a, b, c) of the inverse covariance [[a, b], [b, c]], per pixel squared
    depths     [V, N]     along the viewing axis, scene units
    opacities  [V, N]     at the centre
    extents    [V, N, 2]  half width and height of the box that holds what is drawn; 0 for what is not; no gradient
    """

    centres: Tensor
    conics: Tensor
    depths: Tensor
    opacities: Tensor
    extents: Tensor


def check_one_sample(cameras: Cameras) -> None:
    """ValueError for the cameras of several samples: Gaussians are those of one object."""
    if cameras.batch != 1:
        raise ValueError(f"cameras: of {cameras.batch} samples; give those of one, [1, V], for each object's splats")


def rotation_matrices(rotations: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] in the order (w, x, y, z), of any length but zero."""
    w, x, y, z = F.normalize(rotations, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def project(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    opacities: Tensor,
    cameras: Cameras,
    height: int,
    width: int,
    *,
    antialias: bool = False,
) -> Ellipses:
    """The ellipses of N Gaussians in the V views of one sample's cameras, differentiable in all four tensors.

    means [N, 3], scales [N, 3] standard deviations, scene units; rotations [N, 4] (w, x, y, z); opacities [N] in [0, 1]
    cameras    of one sample, [1, V]
    antialias  lower the opacity of what the pixel's filter enlarges, so that it covers as much as without it

    The covariance on the image is J W S W^T J^T + 0.3 I, with S = R diag(scales^2) R^T, the camera's rotation W and the
    Jacobian J of the pinhole projection at the mean (Zwicker et al. 2001, Eq. 24 to 31; Kerbl et al. 2023, Eq. 5).
    `antialias` multiplies the opacity by the root of the ratio of the determinants before and after the 0.3 (Yu et al.
    2024, Mip-Splatting, Eq. 9).
    """
    check_one_sample(cameras)
    world_to_camera = cameras.camera_to_world[0, :, :3, :3].transpose(-1, -2)  # [V, 3, 3]
    local = (means - cameras.position[0, :, None]) @ world_to_camera.transpose(-1, -2)  # [V, N, 3]
    depths = -local[..., 2]
    z = torch.ones_like(depths) if cameras.orthographic else depths.clamp_min(NEAR)
    half = half_height(cameras)[:, None]
    focal = height / (2 * half)  # [V, 1] pixels per unit at depth 1
    right, down = local[..., 0] / z, -local[..., 1] / z  # of the image plane at depth 1
    centres = torch.stack([width / 2 + focal * right, height / 2 + focal * down], dim=-1)
    limit = MARGIN * half
    right, down = torch.clamp(right, -limit * width / height, limit * width / height), torch.clamp(down, -limit, limit)
    scale, zero = focal / z, torch.zeros_like(z)  # d depth = -d local z
    across, along = (zero, zero) if cameras.orthographic else (scale * right, scale * down)
    rows = torch.stack([scale, zero, across], dim=-1), torch.stack([zero, -scale, along], dim=-1)
    jacobian = torch.stack(rows, dim=-2)  # [V, N, 2, 3]
    axes = jacobian @ world_to_camera[:, None] @ (rotation_matrices(rotations) * scales[:, None, :])  # [V, N, 2, 3]
    x, y = axes.unbind(-2)
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    before = xx * yy - xy * xy
    xx, yy = xx + LOW_PASS, yy + LOW_PASS
    determinant = xx * yy - xy * xy
    conics = torch.stack([yy, -xy, xx], dim=-1) / determinant[..., None]
    seen = opacities.expand_as(depths)
    if antialias:  # the clamp keeps the root's derivative finite for a disc seen edge on
        seen = seen * (before / determinant).clamp_min(1e-6).sqrt()
    with torch.no_grad():
        reach = 2 * torch.log(seen / LEAST_ALPHA).clamp_min(0)  # of the squared Mahalanobis distance
        extents = (reach[..., None] * torch.stack([xx, yy], dim=-1)).sqrt()
        inside = (centres + extents > 0).all(-1) & (centres[..., 0] - extents[..., 0] < width)
        inside &= (centres[..., 1] - extents[..., 1] < height) & (depths > NEAR)
        extents = torch.where(inside[..., None], extents, 0.0)
    return Ellipses(centres, conics, depths, seen, extents)


def half_height(cameras: Cameras) -> Tensor:
    """Half of what the images [V] of one sample's cameras span from bottom to top, scene units: at depth 1, or all."""
    return cameras.relative_distance[0] if cameras.orthographic else torch.tan(cameras.fovy[0] / 2)


def intrinsics(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """World-to-camera matrices [V, 4, 4] and K [V, 3, 3] of one sample's cameras in OpenCV's axes (y down, z ahead)."""
    flip = cameras.camera_to_world.new_tensor([1.0, -1.0, -1.0, 1.0])
    focal = height / (2 * half_height(cameras))
    matrix = focal.new_zeros(len(focal), 3, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = focal
    matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = width / 2, height / 2, 1.0
    return flip[:, None] * cameras.world_to_camera()[0], matrix
