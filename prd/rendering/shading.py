"""Shading of finished renderings by a point light, so that geometry is not painted on (DreamFusion, section 3.1).

AToM and ATT3D train on white ("textureless"), lit ("diffuse") and plain renders by turns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.rendering.views import Views, background_like


def shade_views(
    views: Views, light: Tensor, ambient: Tensor, background: float | Tensor, *, textureless: Tensor, diffuse: Tensor
) -> Views:
    """Views whose colours are those under a light, for the prompts that ask for it.

    light        [B, V, 3]  direction from the origin towards the light, world axes
    ambient      [B]        share of the light that comes from everywhere, in [0, 1]; the rest is Lambert's
    background   what the views were composited over
    textureless  [B] bool   white in the place of the colour, lit
    diffuse      [B] bool   the colour, lit; the others stay as they are

    rgb = colour (ambient + (1 - ambient) max(normal . light, 0)), composited; normals and the rest are left alone.
    """
    lit = textureless | diffuse
    if not bool(lit.any()):
        return views
    opacity = views.opacity
    back = (1 - opacity) * background_like(background, views.rgb)
    normal = F.normalize(views.normal, dim=-1, eps=1e-6)
    direction = F.normalize(light, dim=-1)[:, :, None, None]
    facing = (normal * direction).sum(-1, keepdim=True).clamp(min=0)
    share = ambient.view(-1, 1, 1, 1, 1)
    shade = share + (1 - share) * facing
    colour = torch.where(_rows(textureless), opacity.expand_as(views.rgb), views.rgb - back)
    return replace(views, rgb=torch.where(_rows(lit), colour * shade + back, views.rgb))


def _rows(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1, 1)
