"""A field of the wrong size, shape or numbers is named by every renderer; it is never drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.fields.fast import evaluate_grid
from prd.fields.grid import GridField
from prd.fields.protocol import AutogradGradient, Field
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.isosurface.extract import extract_isosurface
from tests.rendering.made import changed, surface_renderer, volume_renderer

VOLUME, SURFACE = volume_renderer(num_samples=8), surface_renderer(grid_resolution=8)


def cameras(batch: int = 1, dtype: torch.dtype = torch.float32) -> Cameras:
    return orbit_cameras(torch.full((batch, 2), 10.0, dtype=dtype), torch.zeros(batch, 2, dtype=dtype), 2.4, 50.0)


def triplane(batch: int) -> TriplaneField:
    torch.manual_seed(0)
    return TriplaneField(0.1 * torch.randn(batch, 6, 4, 8, 8), TriplaneHeads(4, 8))


class Balls(AutogradGradient):
    """Balls of radius 0.5, as many as asked for; one method may answer something else."""

    def __init__(self, **answers: object) -> None:
        for name, answer in answers.items():
            setattr(self, name, lambda points, answer=answer: answer)

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - 0.5

    def rgb(self, points: Tensor) -> Tensor:
        return 0.5 * points + 0.5


def volume(field: Field, batch: int = 1) -> object:
    return VOLUME(field, cameras(batch), height=6, width=6)


def surface(field: Field, batch: int = 1) -> object:
    return SURFACE(field, cameras(batch), height=6, width=6)


def grid(field: Field, batch: int = 1) -> object:
    return evaluate_grid(field, 8, batch)


def isosurface(field: Field, batch: int = 1) -> object:
    return extract_isosurface(field, 8, batch=batch)


@pytest.mark.parametrize("evaluate", [grid, isosurface])
def test_a_batch_that_the_field_does_not_hold_is_refused(evaluate: Callable) -> None:
    for held, asked in ((1, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"batch={asked}"):
            evaluate(triplane(held), asked)
    evaluate(triplane(2), 2)


@pytest.mark.parametrize("answer", [None, torch.zeros(2, 4), torch.zeros(1, 512, 1), (torch.zeros(1, 5, 1), None)])
@pytest.mark.parametrize("evaluate", [grid, isosurface, surface])
def test_a_wrong_geometry_is_named(evaluate: Callable, answer: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"field[.:] ?sdf_and_deformation"):
        evaluate(Balls(sdf_and_deformation=answer))
    for name in ("grid", "geometry_grid"):
        field = Balls()
        setattr(field, name, lambda *which: answer)
        with pytest.raises((ValueError, TypeError), match=r"field.*grid"):
            evaluate(field)


@pytest.mark.parametrize("answer", [None, torch.zeros(2, 4), torch.zeros(1, 5, 3)])
@pytest.mark.parametrize("name", ["sdf", "sdf_and_gradient", "rgb", "sample"])
def test_a_wrong_answer_along_rays_is_named(name: str, answer: object) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"field\.{name} returned"):
        volume(Balls(**{name: answer}))
    if name == "rgb":
        with pytest.raises((ValueError, TypeError), match=r"field\.rgb returned"):
            surface(Balls(rgb=answer))
        with pytest.raises((ValueError, TypeError), match=r"field\.rgb returned"):
            GridField(Balls(rgb=answer), 8)


@pytest.mark.parametrize("cull_below", [0.0, 1e-4])
@pytest.mark.parametrize("importance", [0, 8])
def test_a_distance_that_is_no_number_is_refused(cull_below: float, importance: int) -> None:
    class Diverged(Balls):
        def sdf(self, points: Tensor) -> Tensor:
            return torch.where(points[..., :1] > 0.3, torch.nan, super().sdf(points))

    renderer = volume_renderer(num_samples=8, num_importance_samples=importance, cull_below=cull_below)
    with pytest.raises(ValueError, match=r"field\.sdf.*NaN"):
        renderer(Diverged(), cameras(), height=6, width=6)


def test_cameras_of_float64_follow_the_mesh_or_are_refused() -> None:
    wide = cameras(dtype=torch.float64)
    views = SURFACE(triplane(1), wide, height=6, width=6)
    torch.testing.assert_close(views.rgb, SURFACE(triplane(1), cameras(), height=6, width=6).rgb)
    for field in (triplane(1), GridField(triplane(1), 8)):
        with pytest.raises(TypeError, match=r"float64.*cameras\.to\(torch\.float32\)"):
            changed(VOLUME, cull_below=0.0)(field, wide, height=6, width=6)
        VOLUME(field, wide.to(torch.float32), height=6, width=6)
    assert VOLUME(Balls(), wide, height=6, width=6).rgb.dtype == torch.float64
