"""Opacities: VolSDF, plain density, learned variance; each against what it is in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.fields.protocol import AutogradGradient
from prd.rendering.alpha import (
    AlphaModel,
    DensityAlpha,
    LearnedInvStd,
    NeusAlpha,
    VolSDFAlpha,
    density_alpha,
    render_weights,
    transmittance,
    volsdf_density,
)
from tests.rendering.made import volume_renderer

CAMERAS = orbit_cameras(torch.tensor([[10.0, -20.0]]), torch.tensor([[0.0, 120.0]]), 2.4, 50.0)


class Sphere(AutogradGradient):
    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - 0.6

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + 0.5


class Fog(Sphere):
    """A ball of radius 0.6 and density 2 in empty space, as 1 - density."""

    def sdf(self, points: Tensor) -> Tensor:
        inside = super().sdf(points) < 0
        return torch.where(inside, -1.0, 1.0) + 0 * points.sum(-1, keepdim=True)


def test_volsdf_density_is_the_laplace_distributions_integral() -> None:
    beta, sdf = 0.3, torch.linspace(-1, 1, 21, dtype=torch.float64)
    laplace = torch.distributions.Laplace(torch.zeros((), dtype=torch.float64), beta)
    torch.testing.assert_close(volsdf_density(sdf, beta), laplace.cdf(-sdf) / beta, rtol=1e-12, atol=1e-14)
    assert volsdf_density(torch.zeros(()), beta) == pytest.approx(0.5 / beta)
    surface = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    volsdf_density(surface, beta).sum().backward()
    assert surface.grad == pytest.approx(-0.5 / beta**2)
    wide = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64, requires_grad=True)
    volsdf_density(wide, 0.01).sum().backward()
    assert wide.grad is not None and torch.isfinite(wide.grad).all()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(volsdf_density, (torch.linspace(-0.95, 1, 8).double(), scale))


def test_density_segments_compose_to_one() -> None:
    density, dt = torch.rand(7, dtype=torch.float64) * 5, torch.rand(7, dtype=torch.float64)
    whole = 1 - torch.exp(-(density * dt).sum())
    torch.testing.assert_close(render_weights(density_alpha(density, dt)).sum(), whole)
    torch.testing.assert_close(transmittance(density_alpha(density, dt))[0], torch.ones((), dtype=torch.float64))


@torch.no_grad()
def test_fog_absorbs_by_the_length_of_the_ray_in_it() -> None:
    views = volume_renderer(num_samples=400, alpha=DensityAlpha(1.0))(Fog(), CAMERAS, height=9, width=9)
    origins, directions = CAMERAS.rays(9, 9)
    middle = (origins * directions).sum(-1, keepdim=True)
    miss2 = origins.square().sum(-1, keepdim=True) - middle.square()
    length = 2 * (0.36 - miss2).clamp(min=0).sqrt()
    assert length.max() > 1.1
    assert (views.opacity - (1 - torch.exp(-2 * length))).abs().max() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("alpha", [NeusAlpha(300.0), VolSDFAlpha(0.003), DensityAlpha(200.0)])
def test_every_model_sees_the_sphere(alpha: AlphaModel) -> None:
    field = Sphere()
    if isinstance(alpha, DensityAlpha):
        field.sdf = lambda points: alpha.threshold * (1 - (Sphere().sdf(points) < 0).float())  # type: ignore[method-assign]
        field.sdf_and_gradient = lambda points: (field.sdf(points), points)  # type: ignore[method-assign]
    sampled = volume_renderer(num_samples=64, num_importance_samples=128, alpha=alpha)
    views = sampled(field, CAMERAS, height=16, width=16)
    origins, directions = CAMERAS.rays(16, 16)
    middle = -(origins * directions).sum(-1)
    miss = (origins + middle[..., None] * directions).norm(dim=-1)
    hit = origins + (middle - (0.36 - miss**2).clamp(min=0).sqrt())[..., None] * directions
    inside, outside = miss < 0.53, miss > 0.66
    assert views.opacity[inside].min() > 0.98 and views.opacity[outside].max() < 1e-3
    assert (views.rgb[inside] - (0.5 * hit + 0.5)[inside]).abs().max() < 0.03
    assert (views.normal[inside] - (hit / 0.6)[inside]).norm(dim=-1).max() < 0.08


@pytest.mark.parametrize("slope", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [NeusAlpha(60.0), VolSDFAlpha(0.02), DensityAlpha(0.1)])
def test_no_opaque_segment_is_ruled_out(alpha: AlphaModel, slope: float) -> None:
    """Along rays on which a distance of any slope wanders, whatever the normals."""
    draw = torch.Generator().manual_seed(0)
    change, dt = torch.randn(200, 50, generator=draw).tanh(), torch.full((200, 50), 0.04)
    walk = slope * ((change * dt).cumsum(-1) + 0.2)
    opacity = alpha(walk, -torch.rand(200, 50, generator=draw), dt)
    kept = alpha.may_reach(walk, dt, 1e-3)
    assert 0.02 < kept.float().mean() < 0.99
    assert opacity[~kept].max() < 1e-3


def test_a_learned_variance_has_its_gradient_and_sharpens() -> None:
    learned = LearnedInvStd(0.3)
    assert float(learned().detach()) == pytest.approx(math.exp(3), rel=1e-6)

    def render(inv_std: float | Tensor) -> Tensor:
        renderer = volume_renderer(NeusAlpha(inv_std), num_samples=48, cull_below=0)
        return renderer(Sphere(), CAMERAS, height=6, width=6, background=0.0).rgb.square().sum()

    loss = render(learned())
    loss.backward()
    step = 1e-2
    with torch.no_grad():
        high, low = (render(math.exp(10 * (0.3 + sign * step))) for sign in (1, -1))
    assert learned.variance.grad is not None
    assert float(learned.variance.grad) == pytest.approx(float((high - low) / (2 * step)), rel=0.03)
    assert abs(float(learned.variance.grad)) > 1e-3


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, torch.tensor(-1.0), torch.ones(2)])
def test_bad_widths_are_refused(value: float | Tensor) -> None:
    with pytest.raises(ValueError, match="inv_std"):
        NeusAlpha(value)
    with pytest.raises(ValueError, match="beta"):
        VolSDFAlpha(value)
