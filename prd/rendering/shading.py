"""Shading of finished renderings by a point light, so that geometry is not painted on (DreamFusion, section 3.1).

AToM and ATT3D train on white ("textureless"), lit ("diffuse") and plain renders by turns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.rendering.protocol import Draws
from prd.rendering.views import Views, background_like
from prd.utils.checked_types import CHECKS, Fraction, Positive


@settings(frozen=True, kw_only=True, config=CHECKS)
class ShadingConfig:
    """Shading of training renders by a random light, so that geometry is not drawn in the texture (DreamFusion, 3.1).

    The rest of the prompts, 1 - textureless - diffuse, keep their colours as they are ("shadeless").
    """

    textureless: Fraction = 0.0  # share of prompts rendered white under the light
    diffuse: Fraction = 0.0  # share of prompts whose colours are rendered under the light
    ambient: tuple[Fraction, Fraction] = (0.1, 0.4)  # range of the light from everywhere; the rest is diffuse
    light_distance: tuple[Positive, Positive] = (0.8, 1.5)  # range, over the camera's; the light is near the camera

    @model_validator(mode="after")
    def _check(self) -> ShadingConfig:
        if self.textureless + self.diffuse > 1:
            raise ValueError(f"textureless={self.textureless}, diffuse={self.diffuse}: are shares of one whole")
        return self


def shade_at_random(views: Views, config: ShadingConfig, background: float | Tensor, draws: Draws) -> Views:
    """Views under a random point light near the camera, for the share of prompts that the settings say.

    background  what the views were composited over
    draws       six numbers per sample: which shading, the light's distance, its direction from the camera's, ambience
    """
    if not config.textureless + config.diffuse:
        return views
    position = views.cameras.position
    drawn = draws.uniform((len(position), 6)).to(position.device)
    kind, low_high = drawn[:, 0], config.ambient
    near, far = config.light_distance
    distance = position.norm(dim=-1, keepdim=True) * (near + (far - near) * drawn[:, None, 1:2])
    towards = position / position.norm(dim=-1, keepdim=True) + (drawn[:, None, 2:5] * 2 - 1)
    return shade_views(
        views,
        towards / towards.norm(dim=-1, keepdim=True).clamp(min=1e-6) * distance,
        low_high[0] + (low_high[1] - low_high[0]) * drawn[:, 5],
        background,
        textureless=kind < config.textureless,
        diffuse=(kind >= config.textureless) & (kind < config.textureless + config.diffuse),
    )


def shade_views(
    views: Views, light: Tensor, ambient: Tensor, background: float | Tensor, *, textureless: Tensor, diffuse: Tensor
) -> Views:
    """Views whose colours are those under a light, for the prompts that ask for it.

    light        [B, V, 3]  where the light of each view is, scene units
    ambient      [B]        share of the light that comes from everywhere, in [0, 1]; the rest is Lambert's
    background   what the views were composited over
    textureless  [B] bool   white in the place of the colour, lit
    diffuse      [B] bool   the colour, lit; the others stay as they are

    rgb = colour (ambient + (1 - ambient) max(normal . l, 0)), l from what a pixel sees towards the light, composited;
    normals and the rest are left alone. No gradient passes through where the surface is, as l changes little with it.
    """
    lit = textureless | diffuse
    if not bool(lit.any()):
        return views
    opacity = views.opacity
    back = (1 - opacity) * background_like(background, views.rgb)
    normal = F.normalize(views.normal, dim=-1, eps=1e-6)
    direction = F.normalize(light[:, :, None, None] - surface_points(views), dim=-1, eps=1e-6)
    facing = (normal * direction).sum(-1, keepdim=True).clamp(min=0)
    share = ambient.view(-1, 1, 1, 1, 1)
    shade = share + (1 - share) * facing
    colour = torch.where(_rows(textureless), opacity.expand_as(views.rgb), views.rgb - back)
    return replace(views, rgb=torch.where(_rows(lit), colour * shade + back, views.rgb))


@torch.no_grad()
def surface_points(views: Views) -> Tensor:
    """The points [B, V, H, W, 3] that pixels see: at the mean depth of what is opaque, of the background at far."""
    height, width = views.opacity.shape[2:4]
    origins, directions = views.cameras.rays(height, width)
    forward = -views.cameras.camera_to_world[..., :3, 2][:, :, None, None]
    far = views.cameras.near_far[1][:, :, None, None, None]
    depth = far - (far - views.depth) / views.opacity.clamp(min=1e-6)
    return origins + directions * depth / (directions * forward).sum(-1, keepdim=True)


def _rows(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1, 1)
