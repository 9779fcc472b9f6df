"""Renderers of a few settings and random triangles, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from prd.rendering.alpha import AlphaModel
from prd.rendering.patch import PatchConfig, PatchRenderer
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.splats.renderer import SplatConfig, SplatRenderer

R = TypeVar("R", VolumeRenderer, SurfaceRenderer, PatchRenderer)


def volume_renderer(alpha: AlphaModel | None = None, **settings: Any) -> VolumeRenderer:
    """Uniform samples unless a proposal is asked for."""
    return VolumeRenderer(VolumeConfig(**{"num_importance_samples": 0, **settings}), alpha)


def patch_renderer(**settings: Any) -> PatchRenderer:
    """Uniform samples unless a proposal is asked for."""
    return PatchRenderer(PatchConfig(**{"num_importance_samples": 0, **settings}))


def surface_renderer(*, on_empty: Any = "raise", **settings: Any) -> SurfaceRenderer:
    """With the whole gradient, where the recipe takes a thousandth."""
    whole: dict[str, Any] = {"sdf_gradient_scale": 1.0, "deformation_gradient_scale": 1.0}
    return SurfaceRenderer(SurfaceConfig(**{**whole, **settings}), on_empty=on_empty)


def splat_renderer(*, on_empty: Any = "raise", **settings: Any) -> SplatRenderer:
    """With the whole gradient, where the recipe takes a thousandth."""
    whole: dict[str, Any] = {"sdf_gradient_scale": 1.0, "deformation_gradient_scale": 1.0}
    return SplatRenderer(SplatConfig(**{**whole, **settings}), on_empty=on_empty)


def changed(renderer: R, **settings: Any) -> R:
    """The renderer with some other settings."""
    return replace(renderer, config=replace(renderer.config, **settings))


def soup(seed: int, count: int = 60, views: int = 2, behind: bool = False) -> tuple[Tensor, Tensor]:
    """Random triangles in perspective clip space, [V, 3 F, 4] and faces; with `behind` some cross the near plane."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(views, count, 1, 3, generator=generator) * 2 - 1
    corners = centre + 0.4 * torch.randn(views, count, 3, 3, generator=generator)
    depth = corners[..., 2:] * (1.5 if behind else 0.3) + 1.5
    far, near = 10.0, 0.1
    z = (far + near) / (far - near) * depth - 2 * far * near / (far - near)
    clip = torch.cat([corners[..., :2] * 1.2, z, depth], dim=-1).view(views, -1, 4)
    return clip, torch.arange(3 * count).view(-1, 3)
