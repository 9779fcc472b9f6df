"""The volume renderer against images, samples and gradients recorded from the published implementation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prd.cameras import HALF_DIAGONAL, Cameras
from prd.distillation.regularizers import eikonal_loss, sparsity_loss
from prd.distillation.schedules import LinearSchedule
from prd.fields import AutogradGradient
from prd.rendering.volume import PUBLISHED_ALPHA_FLOOR, VolumeRenderer, neus_alpha, render_weights
from tests.fixtures import OFFICIAL, needs_fixtures

pytestmark = needs_fixtures

INV_STD = 99.98298645019531  # exp(10 * 0.4605), as recorded
PUBLISHED = VolumeRenderer(
    num_samples=64,
    num_importance_samples=128,
    inv_std=INV_STD,
    near=0.1,
    far=4.0,
    alpha_floor=PUBLISHED_ALPHA_FLOOR,
    cull_below=0,
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(OFFICIAL / "render" / "io.safetensors")


class RecordedScene(AutogradGradient):
    """sdf = |p| - radius, colour = p / 2 + offset."""

    def __init__(self, radius: Tensor, offset: Tensor) -> None:
        self.radius, self.offset = radius, offset

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + self.offset


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("init", ["0.3", "0.4605", "0.6"])
def test_alpha_and_its_gradient(recorded: dict[str, Tensor], init: str) -> None:
    sdf = recorded["alpha.sdf"].clone().requires_grad_()
    cos = (recorded["alpha.dirs"] * recorded["alpha.normal"]).sum(-1, keepdim=True).clamp(max=0)
    inv_std = recorded[f"alpha.init{init}.inv_std"]
    alpha = neus_alpha(sdf, cos, recorded["alpha.dists"], inv_std, PUBLISHED_ALPHA_FLOOR)
    alpha.sum().backward()
    assert_close(alpha, recorded[f"alpha.init{init}.alpha"])
    assert sdf.grad is not None
    assert_close(sdf.grad, recorded[f"alpha.init{init}.d_sdf"], 1e-4)


def test_weights(recorded: dict[str, Tensor]) -> None:
    assert_close(render_weights(recorded["weights.alpha"]), recorded["weights.weights"])


def cameras_of(recorded: dict[str, Tensor], prefix: str, views: int) -> Cameras:
    """The first `views` cameras; their field of view is read off the first ray of the 6 x 6 images."""
    pose, corner = recorded[f"{prefix}.c2w"][:views], recorded[f"{prefix}.rays_d"][:views, 0, 0]
    local = (pose[:, :3, :3].transpose(1, 2) @ corner[..., None])[..., 0]
    return Cameras(pose[None], 2 * torch.atan(-local[None, :, 1] / local[None, :, 2] * 6 / 5))


@pytest.mark.parametrize(
    ("case", "cameras", "views", "colour_scale"),
    [("vol_train", "cam", 4, 1.0), ("vol_train_step20000", "cam", 1, 0.01), ("vol_eval", "evalcam", 2, 1.0)],
)
def test_volume_rendering(
    recorded: dict[str, Tensor], case: str, cameras: str, views: int, colour_scale: float
) -> None:
    want = {name.removeprefix(f"{case}."): x for name, x in recorded.items() if name.startswith(f"{case}.")}
    radius, offset = torch.tensor(0.5, requires_grad=True), torch.full((3,), 0.5, requires_grad=True)
    field = RecordedScene(radius, offset)
    shot = cameras_of(recorded, cameras, views)
    jitter = None
    if "jitter0" in want:
        jitter = torch.stack([want["jitter0"], want["jitter1"]]).view(2, 1, views, 6, 6)
    renderer = replace(PUBLISHED, rgb_gradient_scale=colour_scale)
    result, _ = renderer.render_with_samples(
        field, shot, height=6, width=6, background=want["comp_rgb_bg"][None], jitter=jitter
    )
    # the inverse of a nearly flat distribution amplifies rounding: samples agree less closely than what is made of them
    rays = renderer.rays(shot, 6, 6, torch.full((2, 1, views, 6, 6), 0.5) if jitter is None else jitter)
    sampled = renderer.sample_edges(field, rays)[0]
    assert_close(sampled[:, :-1], want["t_starts"], 3e-4)
    assert_close(sampled[:, 1:], want["t_ends"], 3e-4)
    edges = torch.cat([want["t_starts"], want["t_ends"][:, -1:]], dim=-1)[None]
    trace = renderer.march(field, rays, edges)
    assert_close(trace.alpha[0], want["alpha"], 1e-4)
    assert_close(trace.weights[0], want["weights"], 1e-4)
    assert_close(result.opacity[0], want["opacity"])
    assert_close(result.rgb[0], want["comp_rgb"])
    along = (trace.weights * (trace.edges[..., 1:] + trace.edges[..., :-1]) / 2).sum(-1).view(views, 6, 6, 1)
    assert_close(along, want["depth"])
    packed = result.packed_normal()[0]
    assert_close(packed, want["comp_normal_cam_vis"])
    # the published disparity: distance along the ray, its opacity counted twice
    far = shot.distance[0][:, None, None, None] + HALF_DIAGONAL
    disparity = ((far - along * result.opacity[0] - (1 - result.opacity[0]) * far) / (2 * HALF_DIAGONAL)).clamp(0, 1)
    assert_close(disparity, want["disparity"])
    loss = sum(
        (image * want[f"gradw.{name}"]).sum()
        for name, image in [
            ("comp_rgb", result.rgb[0]),
            ("disparity", disparity),
            ("comp_normal_cam_vis", packed),
            ("opacity", result.opacity[0]),
        ]
    )
    assert isinstance(loss, Tensor)
    # `along` and the images come from two marches over (nearly) equal samples: their gradients add up
    loss.backward()
    assert radius.grad is not None and offset.grad is not None
    assert_close(loss.detach()[None], want["grad.loss"], 1e-4)
    assert_close(offset.grad, want["grad.color_offset"], 1e-4)
    assert_close(radius.grad[None], want["grad.radius"], 1e-3)


def test_regularizers(recorded: dict[str, Tensor]) -> None:
    assert_close(sparsity_loss(recorded["vol_train.opacity"])[None], recorded["loss.sparsity"])
    assert_close(eikonal_loss(recorded["loss.sdf_grad"])[None], recorded["loss.eikonal"])


def test_schedules() -> None:
    table = json.loads((OFFICIAL / "guidance" / "meta.json").read_text())["schedules"]
    assert len(table) > 5
    min_step, scale = LinearSchedule(500, 20, 0, 20_000), LinearSchedule(20, 10, 0, 20_000)
    for step, want in table.items():
        assert int(min_step(int(step))) == want["mv_min_step"]
        assert scale(int(step)) == pytest.approx(want["mv_guidance_scale"], rel=1e-9)
