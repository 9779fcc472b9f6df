"""Cameras: conventions, seen in pictures; sampling; what is refused."""

from __future__ import annotations

import math
from functools import partial

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
@pytest.mark.parametrize("orthographic", [False, True])
def test_a_coloured_axis_cross_lands_at_its_projected_pixels(renderer: Renderer, orthographic: bool) -> None:
    height, width = 48, 64
    angles = torch.tensor([[25.0, -10.0]]), torch.tensor([[40.0, 65.0]])  # of which none is hidden
    cameras = orbit_cameras(*angles, 3.0, 50.0, orthographic=orthographic)
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


@pytest.mark.parametrize("orthographic", [False, True])
def test_rays_matrices_and_projection_agree(orthographic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(2, 3, generator=generator)
    cameras = orbit_cameras(angles * 100 - 50, angles * 360, 1.5 + angles, 30 + 60 * angles, orthographic=orthographic)
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
        expected_w = torch.ones_like(depth) if orthographic else depth
        torch.testing.assert_close(w.flatten(1).float(), expected_w[:, view], rtol=1e-5, atol=1e-5)


def test_perspective_numbers_are_what_they_were_before_there_were_others() -> None:
    """Rays, pixels, the projection and what is sampled, bit for bit by the formulas of perspective cameras alone."""
    uniforms = torch.rand(3, 3, generator=torch.Generator().manual_seed(2))
    cameras = CamerasConfig().sample(uniforms)
    elevation = torch.deg2rad((0.0 + 30.0 * uniforms[:, :1]).expand(-1, 4))
    azimuth = torch.deg2rad((uniforms[:, 1:2] + torch.arange(4.0)) / 4 * 360 - 180)
    fovy = torch.full_like(elevation, 60.0)
    distance = (0.8 + (1.0 - 0.8) * uniforms[:, 2:]).expand(-1, 4) / torch.tan(torch.deg2rad(fovy) / 2)
    back = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # rounding: sines differ by the CPU
    close(cameras.camera_to_world[..., :3, 2], back)
    close(cameras.position, back * distance[..., None])
    close(cameras.fovy, torch.deg2rad(fovy))
    assert not cameras.orthographic
    height, width = 5, 7
    origins, directions = cameras.rays(height, width)
    scale = 2 * torch.tan(cameras.fovy / 2)[..., None, None] / height
    x = ((torch.arange(width) + 0.5 - width / 2) * scale).expand(-1, -1, height, -1)
    y = (-(torch.arange(height) + 0.5 - height / 2)[:, None] * scale).expand(-1, -1, -1, width)
    local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    turned = torch.einsum("bvij,bvhwj->bvhwi", cameras.camera_to_world[..., :3, :3], local)
    close(directions, turned / turned.norm(dim=-1, keepdim=True))
    close(origins, cameras.position[:, :, None, None].expand_as(directions))
    points = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(3))
    pixels, depth = cameras.project(points, height, width)
    seen = (points[:, None] - cameras.position[:, :, None]) @ cameras.camera_to_world[..., :3, :3]
    per_unit = height / (2 * torch.tan(cameras.fovy / 2))[..., None]
    close(depth, -seen[..., 2])
    close(pixels[..., 0], width / 2 + per_unit * seen[..., 0] / depth)
    close(pixels[..., 1], height / 2 - per_unit * seen[..., 1] / depth)
    matrix = cameras.projection(1.4, 0.5, 9.0)
    close(matrix[..., 1, 1], 1 / torch.tan(cameras.fovy / 2))
    assert bool((matrix[..., 3, 2] == -1).all())


def test_orthographic_images_do_not_depend_on_the_distance() -> None:
    """Their rays are parallel, unit long and as far apart at any distance, if the relative distance is the same."""
    near, far = (
        CamerasConfig(
            views=3, azimuths=(0.0, 45.0, 270.0), elevation=(10, 10), relative_distance=(1.1, 1.1), fovy=fovy,
            projection="orthographic",
        ).sample(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))
        for fovy in (60.0, 20.0)
    )  # fmt: skip
    assert near.orthographic and float(far.distance.min()) > 2 * float(near.distance.max())
    torch.testing.assert_close(torch.rad2deg(near.azimuth) % 360, torch.tensor([[0.0, 45, 270]]).expand(2, -1))
    origins, directions = near.rays(4, 4)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 3, 4, 4))
    assert bool((directions == directions[:, :, :1, :1]).all())
    steps = origins.diff(dim=2).norm(dim=-1)  # of 4 pixels, 2.2 scene units together
    torch.testing.assert_close(steps, torch.full_like(steps, 2.2 / 4))
    points = 0.5 * torch.eye(3).expand(2, -1, -1)
    torch.testing.assert_close(near.project(points, 32, 32)[0], far.project(points, 32, 32)[0], rtol=0, atol=1e-4)


def test_orthographic_cameras_stay_so() -> None:
    cameras = orbit_cameras(torch.zeros(2, 3), torch.arange(6.0).view(2, 3), 2.0, 50.0, orthographic=True)
    others = [*cameras.chunk(2), cameras.select(torch.tensor([[1], [0]])), cameras.to(torch.float64)]
    assert all(other.orthographic for other in others)


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
    [
        {"views": 0},
        {"elevation": (30, 0)},
        {"elevation": (-90, 0)},
        {"relative_distance": (0, 1)},
        {"fovy": 180},
        {"azimuths": (0, 90)},
        {"projection": "isometric"},
    ],
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
