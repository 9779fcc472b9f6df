"""What renderers draw of one scene, against stored pictures; and that a wrong sign or axis would be noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prd.cameras import Cameras
from prd.rendering.views import Views
from tests.golden.pictures import RENDERERS, Scene, load, render, scene_cameras, sheet

TOLERANCE = 0.003  # mean difference of channels in [0, 1]; storing 8 bits alone makes up to 0.002

every = pytest.mark.parametrize("name", RENDERERS)


def difference(views: Views, name: str) -> float:
    """Mean over all pixels of a sheet, and over those of its worst third (colour, normal or disparity)."""
    error = (sheet(views) - load(name)).abs()
    return max(float(part.mean()) for part in error.chunk(3, dim=1))


@every
def test_the_picture_is_the_stored_one(name: str) -> None:
    assert difference(render(name), name) < TOLERANCE


AXES = torch.eye(3)
WRONG: dict[str, Callable[[str], Views]] = {
    "x mirrored": lambda name: render(name, Scene(torch.diag(torch.tensor([-1.0, 1, 1])))),
    "y mirrored": lambda name: render(name, Scene(torch.diag(torch.tensor([1.0, -1, 1])))),
    "z mirrored": lambda name: render(name, Scene(torch.diag(torch.tensor([1.0, 1, -1])))),
    "x and y exchanged": lambda name: render(name, Scene(AXES[[1, 0, 2]])),
    "x and z exchanged": lambda name: render(name, Scene(AXES[[2, 1, 0]])),
    "y and z exchanged": lambda name: render(name, Scene(AXES[[0, 2, 1]])),
    "normals inwards": lambda name: _changed(name, lambda views: replace(views, normal=-views.normal)),
    "one normal axis": lambda name: _changed(
        name, lambda views: replace(views, normal=views.normal * torch.tensor([1.0, -1, 1]))
    ),
    "normals of the camera": lambda name: _changed(name, lambda views: replace(views, normal=views.camera_normal())),
    "depth for disparity": lambda name: _changed(
        name, lambda views: replace(views, disparity=(1 - views.disparity) * views.opacity)
    ),
    "columns mirrored": lambda name: _changed(name, lambda views: replace(views, rgb=views.rgb.flip(3))),
    "rows from below": lambda name: _changed(name, lambda views: replace(views, rgb=views.rgb.flip(2))),
    "channels exchanged": lambda name: _changed(name, lambda views: replace(views, rgb=views.rgb.flip(4))),
    "a wider view": lambda name: render(name, cameras=_wider(scene_cameras())),
    "half a pixel aside": lambda name: _changed(
        name, lambda views: replace(views, rgb=(views.rgb + views.rgb.roll(1, 3)) / 2)
    ),
    "a dark background": lambda name: _changed(
        name, lambda views: replace(views, rgb=views.rgb - 0.1 * (1 - views.opacity))
    ),
}


def _changed(name: str, change: Callable[[Views], Views]) -> Views:
    return change(render(name))


def _wider(cameras: Cameras) -> Cameras:
    return Cameras(cameras.camera_to_world, cameras.fovy * 1.05)


@every
@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_would_be_noticed(name: str, wrong: str) -> None:
    assert difference(WRONG[wrong](name), name) > 1.5 * TOLERANCE
