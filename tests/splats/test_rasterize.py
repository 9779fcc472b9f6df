"""Projection and compositing of Gaussians: against closed forms, between backends, forward and backward."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.cameras import Cameras
from prd.splats.project import LOW_PASS, intrinsics, project, rotation_matrices
from prd.splats.rasterize import Backend, _gsplat, front_to_back, rasterize_splats
from prd.splats.splats import Splats, quaternion_product
from tests.splats.made import random_splats, two_views

SIZE = (18, 23)  # height and width
CPU: tuple[Backend, ...] = ("torch", "numba")

each = pytest.mark.parametrize("backend", CPU)
projections = pytest.mark.parametrize("orthographic", [False, True])


def parts(splats: Splats) -> tuple[Tensor, ...]:
    return tuple(getattr(splats, part.name) for part in fields(splats))


def draw(
    splats: Splats,
    backend: Backend,
    cameras: Cameras | None = None,
    size: tuple[int, int] = SIZE,
    *,
    antialias: bool = False,
) -> Tensor:
    """[V, H, W, 4]: colours and opacity."""
    cameras = two_views() if cameras is None else cameras
    drawn = rasterize_splats(splats, splats.colors, cameras, *size, antialias=antialias, backend=backend)
    return torch.cat(drawn, dim=-1)


def one(mean: tuple[float, float, float], sigma: float, opacity: float = 0.8) -> Splats:
    row = torch.tensor([mean], dtype=torch.float64)
    return Splats(
        row,
        torch.full_like(row, sigma),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
        torch.tensor([opacity], dtype=torch.float64),
        torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64),
    )


def ahead() -> Cameras:
    """One camera on +X at a distance of 2 that looks at the origin, +Z up, with 90 degrees from top to bottom."""
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    pose[0, 3] = 2.0
    return Cameras(pose[None, None], torch.tensor([[math.pi / 2]], dtype=torch.float64))


@each
def test_a_ball_before_the_camera_is_its_closed_form(backend: Backend) -> None:
    """On the axis a ball of deviation s at depth z is round, of variance (f s / z)^2 + 0.3 pixels squared."""
    sigma, opacity = 0.25, 0.8
    image = draw(one((0.0, 0.0, 0.0), sigma, opacity), backend, ahead())[0]
    focal = SIZE[0] / 2
    variance = (focal * sigma / 2) ** 2 + LOW_PASS
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in SIZE)
    alpha = opacity * torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * variance))
    alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
    torch.testing.assert_close(image[..., 3], alpha)
    torch.testing.assert_close(image[..., :3], alpha[..., None] * torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))


@each
def test_right_is_right_and_up_is_up(backend: Backend) -> None:
    """A camera on +X has +Y to its right and +Z at its top."""
    image = draw(one((0.0, 0.8, 1.0), 0.1), backend, ahead())[0, ..., 3]
    row, column = divmod(int(image.argmax()), SIZE[1])
    assert row == int(SIZE[0] / 2 - 9 * 0.5) and column == int(SIZE[1] / 2 + 9 * 0.4)


@projections
def test_the_ellipse_is_that_of_samples_seen_through_the_camera(orthographic: bool) -> None:
    """Points of a small Gaussian, projected one by one, have the mean and the covariance of the ellipse."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([[0.02, 0.004, 0.01]], dtype=torch.float64)
    rotation = torch.tensor([[0.8, -0.3, 0.5, 0.2]], dtype=torch.float64)
    mean = torch.tensor([[0.5, -0.4, 0.3]], dtype=torch.float64)
    noise = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    points = mean + (noise * scales) @ rotation_matrices(rotation)[0].T
    height, width = 480, 640
    cameras = two_views(orthographic=orthographic)
    pixels, depth = cameras.project(points[None], height, width)
    found = project(mean, scales, rotation, torch.ones(1, dtype=torch.float64), cameras, height, width)
    for view in range(2):
        a, b, c = found.conics[view, 0]
        covariance = torch.linalg.inv(torch.stack([torch.stack([a, b]), torch.stack([b, c])]))
        covariance = covariance - LOW_PASS * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(torch.cov(pixels[0, view].T), covariance, rtol=0.02, atol=0.02)
        torch.testing.assert_close(pixels[0, view].mean(0), found.centres[view, 0], rtol=0, atol=0.02)
        torch.testing.assert_close(depth[0, view].mean(), found.depths[view, 0], rtol=1e-3, atol=0)


@each
def test_the_nearer_hides_the_farther(backend: Backend) -> None:
    """Two on one axis: the first's alpha, then the second's times what the first lets through."""
    near, far = one((0.5, 0.0, 0.0), 0.3, 0.6), one((-0.5, 0.0, 0.0), 0.3, 0.9)
    alone = [draw(splats, backend, ahead())[0, ..., 3] for splats in (near, far)]
    both = Splats(*(torch.cat(pair) for pair in zip(parts(far), parts(near), strict=True)))
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    image, opacity = rasterize_splats(both, features, ahead(), *SIZE, backend=backend)
    torch.testing.assert_close(image[0, ..., 0], alone[0])
    torch.testing.assert_close(image[0, ..., 1], (1 - alone[0]) * alone[1])
    torch.testing.assert_close(opacity[0, ..., 0], image[0].sum(-1))


@each
def test_what_is_behind_the_camera_or_beside_the_image_is_not_drawn(backend: Backend) -> None:
    behind = Splats(*(torch.cat([a, b]) for a, b in zip(parts(one((2.5, 0, 0), 0.2)), parts(one((0, 9, 0), 0.2)),
                                                        strict=True)))  # fmt: skip
    assert float(draw(behind, backend, ahead()).abs().max()) == 0
    empty = Splats(*(part[:0] for part in parts(behind)))
    image = draw(empty, backend, ahead())
    assert image.shape == (1, *SIZE, 4) and float(image.abs().max()) == 0


def test_a_turn_is_that_of_its_quaternion() -> None:
    first, second = (torch.nn.functional.normalize(random_splats(5, seed).rotations, dim=-1) for seed in (1, 2))
    product = rotation_matrices(quaternion_product(first, second))
    torch.testing.assert_close(product, rotation_matrices(first) @ rotation_matrices(second))
    quarter = torch.tensor([[0.5**0.5, 0.0, 0.0, 0.5**0.5]], dtype=torch.float64)  # about z: x to y
    expected = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(rotation_matrices(3 * quarter), expected)


@each
@projections
@pytest.mark.parametrize("antialias", [False, True])
def test_gradients_are_those_of_finite_differences(backend: Backend, orthographic: bool, antialias: bool) -> None:
    cameras = two_views(orthographic=orthographic)
    splats = random_splats(5, seed=3)
    inputs = tuple(part.clone().requires_grad_() for part in parts(splats))

    def render(*tensors: Tensor) -> Tensor:
        return draw(Splats(*tensors), backend, cameras, size=(6, 8), antialias=antialias)

    assert torch.autograd.gradcheck(render, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("antialias", [False, True])
def test_backends_agree_forward_and_backward(antialias: bool) -> None:
    """Many Gaussians, some of them nearly opaque, so that pixels are closed before the last."""
    splats = random_splats(150, seed=4)
    splats = replace(splats, opacities=torch.where(splats.opacities > 0.5, 0.9995, splats.opacities))
    pull = torch.rand(2, *SIZE, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    images, grads = [], []
    for backend in CPU:
        inputs = tuple(part.clone().requires_grad_() for part in parts(splats))
        image = draw(Splats(*inputs), backend, antialias=antialias)
        images.append(image.detach())
        grads.append(torch.autograd.grad((image * pull).sum(), inputs))
    torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)
    assert 0.99 < float(images[0][..., 3].max()) <= 1
    for reference, fast in zip(*grads, strict=True):
        assert float(reference.abs().max()) > 0
        torch.testing.assert_close(fast, reference, rtol=1e-7, atol=1e-7)


def test_threads_change_nothing() -> None:
    splats, threads = random_splats(40), torch.get_num_threads()
    try:
        images = []
        for count in (1, 2):
            torch.set_num_threads(count)
            images.append(draw(splats, "numba"))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*images, rtol=0, atol=1e-12)


def test_a_single_precision_scene_is_drawn_in_its_type() -> None:
    single = random_splats(20, dtype=torch.float32)
    image, opacity = rasterize_splats(single, single.colors, two_views(torch.float32), *SIZE)
    assert image.dtype == opacity.dtype == torch.float32
    torch.testing.assert_close(image.double(), draw(single.to(torch.float64), "torch")[..., :3], rtol=1e-4, atol=1e-4)


def test_the_filter_keeps_what_a_small_gaussian_covers() -> None:
    """Below a pixel: with `antialias` the sum over the pixels is that of the Gaussian, without it larger by the 0.3."""
    tiny, variance = one((0.0, 0.0, 0.0), 0.06, 0.9), (SIZE[0] / 2 * 0.06 / 2) ** 2
    kept, enlarged = (float(draw(tiny, "numba", ahead(), antialias=on)[..., 3].sum()) for on in (True, False))
    assert kept == pytest.approx(2 * math.pi * 0.9 * variance, rel=0.05)
    assert enlarged == pytest.approx(2 * math.pi * 0.9 * (variance + LOW_PASS), rel=0.05)


def test_equally_near_ones_are_drawn_in_their_order() -> None:
    pair = Splats(*(torch.cat([part, part]) for part in parts(one((0.0, 0.0, 0.0), 0.3))))
    ellipses = project(pair.means, pair.scales, pair.rotations, pair.opacities, ahead(), *SIZE)
    assert front_to_back(ellipses, 0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "cuda"}, "backend='cuda': must be one of 'auto', 'torch'"),
        ({"backend": "gsplat"}, "backend='gsplat' draws on CUDA"),
        ({"features": torch.zeros(11, 3)}, r"features=\(11, 3\)"),
        ({"features": torch.zeros(3, 12, 3)}, r"features=\(3, 12, 3\)"),
        ({"height": 1}, "height=1"),
        ({"cameras": Cameras(two_views().camera_to_world.expand(2, -1, -1, -1), two_views().fovy.expand(2, -1))},
         "cameras: of 2 samples"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    splats = random_splats()
    arguments = {"features": splats.colors, "cameras": two_views(), "height": 18, "width": 23, **change}
    with pytest.raises(ValueError, match=named):
        rasterize_splats(splats, **arguments)


@projections
def test_opencv_matrices_project_as_the_cameras_do(orthographic: bool) -> None:
    splats, (height, width) = random_splats(30), SIZE
    cameras = two_views(orthographic=orthographic)
    world_to_camera, matrices = intrinsics(cameras, height, width)
    local = splats.means @ world_to_camera[:, :3, :3].transpose(1, 2) + world_to_camera[:, None, :3, 3]
    plane = torch.ones_like(local[..., 2:]) if orthographic else local[..., 2:]
    pixels = torch.cat([local[..., :2] / plane, torch.ones_like(plane)], dim=-1) @ matrices.transpose(1, 2)
    expected, depth = cameras.project(splats.means[None], height, width)
    torch.testing.assert_close(pixels[..., :2], expected[0])
    torch.testing.assert_close(local[..., 2], depth[0])


@projections
def test_gsplat_is_asked_in_its_own_order(monkeypatch: pytest.MonkeyPatch, orthographic: bool) -> None:
    """Its function's arguments by name, as its documentation has them, whatever is installed here."""
    asked: dict[str, Any] = {}

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
        asked.update(locals())
        return colors.new_ones(2, height, width, 3), colors.new_ones(2, height, width, 1), {}

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    splats, cameras = random_splats(7), two_views(orthographic=orthographic)
    images, opacity = _gsplat(splats, splats.colors.expand(2, -1, -1), cameras, *SIZE, True)
    assert images.shape == (2, *SIZE, 3) and opacity.shape == (2, *SIZE, 1) and images.dtype == torch.float64
    assert (asked["height"], asked["width"]) == SIZE
    for name, value in (("means", splats.means), ("quats", splats.rotations), ("scales", splats.scales)):
        assert torch.equal(asked[name], value.float()), name
    assert (
        asked["colors"].shape == (2, 7, 3) and asked["viewmats"].shape == (2, 4, 4) and asked["Ks"].shape == (2, 3, 3)
    )
    assert asked["options"]["camera_model"] == ("ortho" if orthographic else "pinhole")
    assert asked["options"]["rasterize_mode"] == "antialiased" and asked["options"]["eps2d"] == LOW_PASS


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("gsplat") is None, reason="gsplat is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("antialias", [False, True])
def test_gsplat_agrees_forward_and_backward(antialias: bool) -> None:
    splats, size = random_splats(200, seed=6, dtype=torch.float32), (64, 80)
    pull = torch.rand(2, *size, 4, generator=torch.Generator().manual_seed(7)).cuda()
    images, grads = [], []
    backends: tuple[Backend, ...] = ("torch", "gsplat")
    for backend in backends:
        inputs = tuple(part.cuda().requires_grad_() for part in parts(splats))
        own, seen = Splats(*inputs), two_views(torch.float32).to("cuda")
        drawn = rasterize_splats(own, own.colors, seen, *size, antialias=antialias, backend=backend)
        image = torch.cat(drawn, dim=-1)
        images.append(image.detach())
        grads.append(torch.autograd.grad((image * pull).sum(), inputs))
    assert float((images[0] - images[1]).abs().mean()) < 1e-4
    for reference, fast in zip(*grads, strict=True):
        assert float((fast - reference).norm() / reference.norm()) < 1e-2
