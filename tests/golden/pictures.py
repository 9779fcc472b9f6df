"""Draw the golden pictures: colour, normal and disparity of a stack from two sides, by each renderer.

python -m tests.golden.pictures            # draw them anew; look at them before you commit them
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.fields.protocol import AutogradGradient, Field
from prd.rendering.protocol import Renderer
from prd.rendering.sphere_trace import SphereTracer
from prd.rendering.views import Views
from prd.toybox.world import ExactField
from tests.rendering.made import patch_renderer, surface_renderer, volume_renderer

FOLDER = Path(__file__).parent
CAPTION = "a red arrow on a blue cube"
SIZE = 32
RENDERERS: dict[str, Renderer | SphereTracer] = {
    "volume": volume_renderer(num_samples=96, inv_std=150.0),
    "volsdf": volume_renderer(num_samples=96, density="volsdf", beta=0.01),
    "surface": surface_renderer(grid_resolution=48),
    "tetrahedra": surface_renderer(grid_resolution=40, isosurface="tetrahedra"),
    "patch": patch_renderer(num_samples=96, inv_std=150.0, patch=16, downsample=2, height=SIZE, width=SIZE),
    "sphere_tracer": SphereTracer(),
}


class Scene(AutogradGradient):
    """The toy box's stack, turned so that no mirror or exchange of axes maps it to itself.

    mapping [3, 3]: applied to the points beforehand; the identity gives the scene of the stored pictures
    """

    def __init__(self, mapping: Tensor | None = None) -> None:
        self.exact = ExactField([CAPTION])
        x, y, z = 0.3, 0.45, 0.6  # radians, about each axis
        turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]]))
        self.mapping = turn if mapping is None else mapping @ turn

    def sdf(self, points: Tensor) -> Tensor:
        return self.exact.sdf(points @ self.mapping)

    def rgb(self, points: Tensor) -> Tensor:
        return self.exact.rgb(points @ self.mapping)


def scene_cameras() -> Cameras:
    return orbit_cameras(torch.tensor([[30.0, -20.0]]), torch.tensor([[35.0, 160.0]]), 2.4, 50.0)


@torch.no_grad()
def render(name: str, field: Field | None = None, cameras: Cameras | None = None) -> Views:
    """Views [1, 2, 32, 32, .] over light grey, without anything random."""
    return RENDERERS[name](field or Scene(), cameras or scene_cameras(), height=SIZE, width=SIZE, background=0.8)


def sheet(views: Views) -> Tensor:
    """Colour, world normal and disparity side by side, one row per view: [2 * 32, 3 * 32, 3] in [0, 1]."""
    parts = [views.rgb, (views.normal + 1) / 2, views.disparity.expand_as(views.rgb)]
    return torch.cat(parts, dim=3)[0].flatten(0, 1).clamp(0, 1)


def load(name: str) -> Tensor:
    """The stored sheet [64, 96, 3] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(FOLDER / f"{name}.png").convert("RGB"))).float() / 255


def main() -> None:
    for name in RENDERERS:
        pixels = (sheet(render(name)) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(FOLDER / f"{name}.png", optimize=True)
        print(FOLDER / f"{name}.png", (FOLDER / f"{name}.png").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
