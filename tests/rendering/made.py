"""Renderers of a few settings, for tests: uniform samples, and the whole gradient of the mesh renderer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from prd.rendering.alpha import AlphaModel
from prd.rendering.patch import PatchConfig, PatchRenderer
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer

R = TypeVar("R", VolumeRenderer, SurfaceRenderer, PatchRenderer)


def volume_renderer(alpha: AlphaModel | None = None, **settings: Any) -> VolumeRenderer:
    return VolumeRenderer(VolumeConfig(**{"num_importance_samples": 0, **settings}), alpha)


def patch_renderer(**settings: Any) -> PatchRenderer:
    return PatchRenderer(PatchConfig(**{"num_importance_samples": 0, **settings}))


def surface_renderer(*, on_empty: Any = "raise", **settings: Any) -> SurfaceRenderer:
    whole = {"sdf_gradient_scale": 1.0, "deformation_gradient_scale": 1.0}
    return SurfaceRenderer(SurfaceConfig(**{**whole, **settings}), on_empty=on_empty)


def changed(renderer: R, **settings: Any) -> R:
    """The renderer with some other settings."""
    return replace(renderer, config=replace(renderer.config, **settings))
