"""Cameras: conventions, seen in pictures; sampling; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prd.cameras import Cameras, CamerasConfig, orbit_cameras
from prd.fields.protocol import AutogradGradient
from prd.rendering.protocol import Renderer
from tests.rendering.made import surface_renderer, volume_renderer

BALLS = 0.7 * torch.eye(3)  # a ball on each axis: red on +X, green on +Y, blue on +Z


class AxisCross(AutogradGradient):
    """Three balls of radius 0.2, each of the colour of its axis: x red, y green, z blue."""

    def _nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        distance, axis = (points[:, :, None] - BALLS).norm(dim=-1).min(dim=-1)
        return distance[..., None] - 0.2, axis

    def sdf(self, points: Tensor) -> Tensor:
        return self._nearest(points)[0]

    def rgb(self, points: Tensor) -> Tensor:
        return torch.eye(3)[self._nearest(points)[1]]


@torch.no_grad()
@pytest.mark.parametrize(
    "renderer", [volume_renderer(num_samples=96, inv_std=200.0), surface_renderer(grid_resolution=48)]
)
def test_a_coloured_axis_cross_lands_at_its_projected_pixels(renderer: Renderer) -> None:
    height, width = 48, 64
    cameras = orbit_cameras(torch.tensor([[25.0, -10.0]]), torch.tensor([[40.0, 65.0]]), 3.0, 50.0)  # none is hidden
    views = renderer(AxisCross(), cameras, height=height, width=width, background=0.0)
    pixels, depth = cameras.project(BALLS[None], height, width)
    for view in range(2):
        for axis in range(3):
            column, row = pixels[0, view, axis]
            image = views.rgb[0, view, ..., axis]
            rows, columns = (torch.arange(size) + 0.5 for size in (height, width))
            found = torch.stack([(image.sum(0) * columns).sum(), (image.sum(1) * rows).sum()]) / image.sum()
            assert (found - torch.stack([column, row])).abs().max() < 0.35  # a ball's image is not quite centred
            centre = views.rgb[0, view, int(row), int(column)]
            assert (centre - torch.eye(3)[axis]).abs().max() < 0.05
            assert views.depth[0, view, int(row), int(column), 0] == pytest.approx(
                float(depth[0, view, axis]) - 0.2, abs=0.05
            )


def test_the_front_is_on_plus_x_and_up_is_up() -> None:
    """From azimuth 0: +Y on the right, +Z above; from azimuth 90: -X (the point of +X mirrored) on the right."""
    cameras = orbit_cameras(torch.zeros(1, 2), torch.tensor([[0.0, 90.0]]), 2.0, 60.0)
    torch.testing.assert_close(cameras.position[0], torch.tensor([[2.0, 0, 0], [0, 2.0, 0]]), rtol=0, atol=1e-6)
    pixels, depth = cameras.project(0.5 * torch.eye(3)[None], 32, 32)
    scale = 16 / math.tan(math.radians(30))
    torch.testing.assert_close(pixels[0, 0, 1], torch.tensor([16 + scale * 0.25, 16.0]))
    torch.testing.assert_close(pixels[0, 0, 2], torch.tensor([16.0, 16 - scale * 0.25]))
    torch.testing.assert_close(pixels[0, 1, 0], torch.tensor([16 - scale * 0.25, 16.0]))
    torch.testing.assert_close(depth[0, 0], torch.tensor([1.5, 2.0, 2.0]))


def test_rays_matrices_and_projection_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(2, 3, generator=generator)
    cameras = orbit_cameras(angles * 100 - 50, angles * 360, 1.5 + angles, 30 + 60 * angles)
    height, width = 6, 9
    origins, directions = cameras.rays(height, width)
    points = (origins + 1.7 * directions).double()  # [B, V, H, W, 3]
    clip = (cameras.projection(width / height) @ cameras.world_to_camera()).double()
    for view in range(3):
        pixels, depth = cameras.project(points[:, view].flatten(1, 2).float(), height, width)
        row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        expected = torch.stack([column, row], dim=-1).flatten(0, 1).expand(2, -1, -1)
        torch.testing.assert_close(pixels[:, view], expected, rtol=0, atol=1e-3)
        homogeneous = torch.cat([points[:, view], torch.ones(2, height, width, 1)], dim=-1)
        x, y, _, w = torch.einsum("bij,bhwj->bhwi", clip[:, view], homogeneous).unbind(-1)
        torch.testing.assert_close((x / w + 1) / 2 * width, column.expand(2, -1, -1).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close((1 - y / w) / 2 * height, row.expand(2, -1, -1).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close(w.flatten(1).float(), depth[:, view], rtol=1e-5, atol=1e-5)


def test_sampling_spaces_four_views_and_keeps_to_its_ranges() -> None:
    recipe = CamerasConfig()
    cameras = recipe.sample(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))
    elevation, azimuth = torch.rad2deg(cameras.elevation), torch.rad2deg(cameras.azimuth)
    assert elevation.min() >= 0 and elevation.max() <= 30 and elevation.max() - elevation.min() > 20
    torch.testing.assert_close(elevation, elevation[:, :1].expand(-1, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(azimuth.diff(dim=1) % 360, torch.full((64, 3), 90.0), rtol=0, atol=1e-3)
    assert cameras.relative_distance.min() >= 0.8 - 1e-6 and cameras.relative_distance.max() <= 1 + 1e-6
    torch.testing.assert_close(cameras.fovy, torch.full((64, 4), math.radians(60)))


NAN = float("nan")


@pytest.mark.parametrize(
    ("elevation", "azimuth", "distance", "fovy", "named"),
    [
        (0.0, 0.0, 0.0, 50.0, "distance"),
        (0.0, 0.0, -1.0, 50.0, "distance"),
        (0.0, 0.0, NAN, 50.0, "distance"),
        (0.0, 0.0, 2.0, 0.0, "fovy"),
        (0.0, 0.0, 2.0, 180.0, "fovy"),
        (0.0, 0.0, 2.0, NAN, "fovy"),
        (90.0, 0.0, 2.0, 50.0, "elevation"),
        (NAN, 0.0, 2.0, 50.0, "elevation"),
        (0.0, NAN, 2.0, 50.0, "camera_to_world"),
        (0.0, 0.0, float("inf"), 50.0, "camera_to_world"),
    ],
)
def test_degenerate_cameras_are_refused(
    elevation: float, azimuth: float, distance: float, fovy: float, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        orbit_cameras(torch.tensor([[elevation]]), torch.tensor([[azimuth]]), distance, fovy)


@pytest.mark.parametrize("change", ["origin", "scaled", "mirrored", "shape"])
def test_poses_that_are_none_are_refused(change: str) -> None:
    good = orbit_cameras(torch.zeros(1, 2), torch.zeros(1, 2), 2.0, 50.0)
    pose = good.camera_to_world.clone()
    if change == "origin":
        pose[0, 1, :3, 3] = 0
    elif change == "scaled":
        pose[0, 1, :3, :3] *= 1.5
    elif change == "mirrored":
        pose[0, 1, :3, 0] *= -1
    else:
        pose = pose[0]
    with pytest.raises(ValueError, match="camera_to_world"):
        Cameras(pose, good.fovy)


@pytest.mark.parametrize(
    "settings",
    [{"views": 0}, {"elevation": (30, 0)}, {"elevation": (-90, 0)}, {"relative_distance": (0, 1)}, {"fovy": 180}],
)
def test_bad_sampling_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CamerasConfig(**settings)
    with pytest.raises(ValueError, match="uniforms"):
        CamerasConfig().sample(torch.rand(2, 4))


def test_no_rays_through_no_pixels() -> None:
    with pytest.raises(ValueError, match="height"):
        orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.0, 50.0).rays(0, 4)


def test_planes_in_the_wrong_order_are_refused():
    cameras = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 50.0)
    for near, far in ((1.0, 1.0), (0.0, 1.0), (torch.tensor([[2.0]]), torch.tensor([[1.0]]))):
        with pytest.raises(ValueError, match="near="):
            cameras.projection(1.0, near, far)


def test_cameras_are_made_under_autocast():
    angles = torch.tensor([[10.0, 40.0]]), torch.tensor([[33.0, 250.0]])
    with torch.autocast("cpu", torch.bfloat16):
        cameras = orbit_cameras(*angles, 2.4, 50.0)
    torch.testing.assert_close(cameras.camera_to_world, orbit_cameras(*angles, 2.4, 50.0).camera_to_world)


def test_a_far_plane_at_infinity_is_refused() -> None:
    cameras = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 2.4, 50.0)
    with pytest.raises(ValueError, match="far=inf"):
        cameras.projection(far=float("inf"))


def test_a_batch_of_cameras_falls_into_equal_parts() -> None:
    cameras = orbit_cameras(torch.zeros(4, 2), torch.arange(8.0).view(4, 2), 2.4, 50.0)
    parts = cameras.chunk(2)
    assert [part.batch for part in parts] == [2, 2]
    torch.testing.assert_close(torch.cat([part.azimuth for part in parts]), cameras.azimuth)
