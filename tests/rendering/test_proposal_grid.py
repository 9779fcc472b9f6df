from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prd import TriplaneTurbo
from prd.cameras import orbit_cameras
from prd.fields.grid import GridField
from prd.rendering.alpha import DensityAlpha
from prd.rendering.volume import VolumeRenderer
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import volume_renderer


class Counted:
    """A field, and at how many points it is asked for the signed distance alone."""

    def __init__(self, field: Any) -> None:
        self.field, self.points = field, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.field, name)

    def sdf(self, points: Tensor) -> Tensor:
        self.points += points.shape[1]
        return self.field.sdf(points)


def made() -> Any:
    """Two objects of the toy student, whose signed distance has slopes up to 7."""
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipe = TriplaneTurbo.from_pretrained("toybox")
    made: Any = pipe(["a red cube", "a blue mug"], generator=draws, output_type="field")
    return made.field


@torch.no_grad()
def images(field: Any, **settings: Any) -> Tensor:
    cameras = orbit_cameras(torch.tensor([[20.0, -35.0]] * 2), torch.tensor([[0.0, 110.0]] * 2), 2.4, 50.0)
    views = volume_renderer(num_samples=40, inv_std=64.0, **settings)(field, cameras, height=24, width=24)
    return torch.cat([views.rgb, views.normal, views.opacity], dim=-1)


def test_a_grid_that_says_where_to_sample_changes_next_to_nothing() -> None:
    field = made()
    direct, guided = Counted(field), Counted(field)
    difference = (images(guided, proposal_grid=32) - images(direct)).abs()
    assert difference.max() < 5e-3 and difference.mean() < 1e-5
    assert direct.points == 40 * 2 * 24**2 and guided.points == 0


def test_a_grid_proposes_as_well_as_the_field() -> None:
    field = made()
    exact = images(field, num_importance_samples=300)
    errors = [
        float((images(field, num_importance_samples=24, proposal_grid=nodes) - exact).abs().mean())
        for nodes in (None, 32)
    ]
    assert errors[1] < 1.5 * errors[0] < 0.02


def test_a_field_that_is_a_grid_already_is_its_own_guide() -> None:
    field = GridField(made(), 24)
    assert relative_difference(images(field, proposal_grid=32), images(field)) <= ROUNDING


def test_a_density_is_refused() -> None:
    renderer: VolumeRenderer = volume_renderer(proposal_grid=8)
    with pytest.raises(ValueError, match="proposal_grid=8: must be null with alpha=DensityAlpha"):
        renderer.with_config(renderer.config, DensityAlpha(17.0))


def test_chunks_are_guided_alike_and_give_the_same_gradients() -> None:
    def gradient(**settings: Any) -> Tensor:
        field = made()
        planes = field.planes.detach().requires_grad_()
        field = type(field)(planes, field.heads, field.bias_radius)
        renderer = volume_renderer(num_samples=12, num_importance_samples=12, proposal_grid=24, **settings)
        cameras = orbit_cameras(torch.tensor([[20.0]] * 2), torch.tensor([[110.0]] * 2), 2.4, 50.0)
        views = renderer(field, cameras, height=8, width=8)
        return torch.autograd.grad(views.rgb.square().sum() + views.normal.sum(), planes)[0]

    assert relative_difference(gradient(max_rays=13), gradient()) <= 10 * ROUNDING
