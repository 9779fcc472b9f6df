"""Write a renderer of your own: soft silhouettes, which see where each ray comes nearest to the object, or deepest in.

    python examples/custom_renderer.py                      # three steps on the toy box
    PYTHONPATH=examples prd train --renderers.soft "{class: custom_renderer.SilhouetteRenderer, sharpness: [10, 40]}"

The last line names it by its import path, as `renderers: {soft: {class: ...}}` of a recipe does.
"""

import sys

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.cameras import Cameras
from prd.fields.fast import sample, sdf_along
from prd.fields.protocol import Field
from prd.rendering.protocol import Draws, GradientSamples, Rendered, Renderer
from prd.rendering.rays import cube_near_far
from prd.rendering.views import Views, background_like, check_image_size, disparity_from_depth
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.checked_types import CHECKS, PositiveSchedule, Size, number


@settings(frozen=True, kw_only=True, config=CHECKS)
class SilhouetteConfig:
    """Settings of `SilhouetteRenderer`."""

    height: Size = 32  # image height, pixels
    width: Size = 32  # image width, pixels
    num_samples: Size = 32  # points per ray at which the nearest is looked for
    sharpness: PositiveSchedule = (10.0, 40.0)  # s: 1 / s is the width of the outline, scene units


class SilhouetteRenderer(Renderer):
    """Opacity sigmoid(-s min_t sdf) of each ray, and the field's colour and normal at that point."""

    config_class = SilhouetteConfig

    def __init__(self, config: SilhouetteConfig) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: SilhouetteConfig) -> "SilhouetteRenderer":
        return cls(config)

    def render(
        self,
        field: Field,
        cameras: Cameras,
        size: tuple[int, int],
        background: float | Tensor,
        draws: Draws | None = None,
    ) -> Rendered:
        check_image_size(*size)
        o, d = (x.flatten(1, 3) for x in cameras.rays(*size))  # origins, directions [B, M, 3]; M = V * H * W
        with torch.no_grad():
            near, far = cube_near_far(o, d)
            t = near + (far - near) * torch.linspace(0, 1, self.config.num_samples).to(o)  # [B, M, S]
            t = t.gather(-1, sdf_along(field, o, d, t).argmin(dim=-1, keepdim=True))  # [B, M, 1]
        found = *sample(field, o + t * d), t, d  # once more at that point alone, now with gradient
        sdf, gradient, colour, t, d = (x.view(cameras.batch, cameras.views, *size, -1) for x in found)
        opacity = torch.sigmoid(-number(self.config.sharpness) * sdf)
        cosine = -(d * cameras.camera_to_world[:, :, None, None, :3, 2]).sum(-1, keepdim=True)  # to the view axis
        depth = opacity * t * cosine + (1 - opacity) * cameras.near_far[1][:, :, None, None, None]
        rgb = opacity * colour + (1 - opacity) * background_like(background, colour)
        normal, disparity = F.normalize(gradient, dim=-1) * opacity, disparity_from_depth(depth, cameras)
        views = Views(rgb, normal, depth, disparity, opacity, cameras)
        return Rendered(views, GradientSamples(gradient, None), stats={"opacity": opacity.detach().mean()})


if __name__ == "__main__":
    config = load_config("toybox", ["--output_dir", "runs/custom_renderer", "--max_train_steps", "3", *sys.argv[1:]])
    Trainer(config, build_parts(config, renderers={"soft": SilhouetteRenderer(SilhouetteConfig())})).train()
