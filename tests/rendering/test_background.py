"""The background made from the text, and how it is composited."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.fields.protocol import AutogradGradient
from prd.rendering.background import HARMONICS, HyperHead, TextBackground, spherical_harmonics
from prd.rendering.protocol import Renderer
from tests.rendering.made import surface_renderer, volume_renderer


class Ball(AutogradGradient):
    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - 0.4

    def rgb(self, points: Tensor) -> Tensor:
        return torch.ones_like(points)


def test_harmonics_are_orthonormal_on_the_sphere() -> None:
    # Gauss-Legendre in z and equal steps in azimuth integrate products of degree 3 exactly
    nodes = torch.linalg.eigh(torch.diag(torch.arange(1, 8) / (4 * torch.arange(1, 8) ** 2 - 1.0) ** 0.5, 1).double().T)
    z, weight = nodes.eigenvalues, 2 * nodes.eigenvectors[0] ** 2
    angle = torch.arange(16, dtype=torch.float64) * torch.pi / 8
    r = (1 - z**2).sqrt()
    points = torch.stack([r[:, None] * angle.cos(), r[:, None] * angle.sin(), z[:, None].expand(-1, 16)], dim=-1)
    basis = spherical_harmonics(points).flatten(0, 1)
    products = basis.T @ (basis * (weight[:, None] * torch.pi / 8).expand(-1, 16).reshape(-1, 1))
    torch.testing.assert_close(products, torch.eye(HARMONICS, dtype=torch.float64), rtol=0, atol=1e-6)


def test_each_prompt_has_its_own_smooth_environment() -> None:
    torch.manual_seed(0)
    background, text = TextBackground(12), torch.randn(2, 12)
    directions = torch.nn.functional.normalize(torch.randn(2, 3, 4, 5, 3), dim=-1)
    colours = background(directions, text)
    assert colours.shape == directions.shape and colours.min() >= 0 and colours.max() <= 1
    assert (background(directions[:1], text[:1]) - colours[:1]).abs().max() < 1e-6  # prompts do not mix
    assert (background(directions, text.flip(0)) - colours).abs().max() > 0.01
    assert (background(-directions, text) - colours).abs().max() > 0.01
    torch.testing.assert_close(background(directions[:, 0, 0, 0], text), colours[:, 0, 0, 0])


@pytest.mark.parametrize("renderer", [volume_renderer(num_samples=32), surface_renderer(grid_resolution=16)])
def test_it_is_seen_behind_the_object_and_learns_there(renderer: Renderer) -> None:
    torch.manual_seed(0)
    background, text = TextBackground(12), torch.randn(1, 12, requires_grad=True)
    cameras = orbit_cameras(torch.zeros(1, 2), torch.tensor([[0.0, 90.0]]), 2.4, 50.0)
    image = background.image(cameras, 8, 8, text)
    views = renderer(Ball(), cameras, height=8, width=8, background=image)
    torch.testing.assert_close(views.rgb[:, :, 0], image[:, :, 0], rtol=0, atol=1e-5)  # nothing in the first row
    assert views.rgb[0, 0, 4, 4].min() > 0.99  # the ball is white whatever lies behind
    views.rgb.sum().backward()
    for parameter in (*background.parameters(), text):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_the_head_has_the_gradient_of_its_finite_differences() -> None:
    torch.manual_seed(0)
    head = HyperHead(text_dim=3, features=4, width=5, hidden=6).double()
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (features, text))


def test_bad_input_is_refused() -> None:
    background = TextBackground(12)
    for directions, text, named in (
        (torch.ones(1, 4, 2), torch.ones(1, 12), "directions"),
        (torch.ones(2, 4, 3), torch.ones(1, 12), "text"),
        (torch.ones(1, 4, 3), torch.ones(1, 11), "text"),
    ):
        with pytest.raises(ValueError, match=named):
            background(directions, text)
    with pytest.raises(ValueError, match="features"):
        background.head(torch.ones(1, 4, 15), torch.ones(1, 12))
    with pytest.raises(ValueError, match="width"):
        TextBackground(12, width=0)
