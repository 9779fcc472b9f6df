"""What is built can be asked for in a recipe: every kind of renderer, density and regulariser, without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prd.cameras import orbit_cameras
from prd.distillation.regularizers import REGULARIZERS, regularize
from prd.rendering.alpha import NeusAlpha, VolSDFAlpha
from prd.rendering.patch import PatchRenderer
from prd.rendering.protocol import Rendered, Renderer, at_step
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.volume import VolumeRenderer
from prd.toybox.world import ExactField
from prd.training.parts import build_regularizers, build_renderers
from prd.training.recipes import load_config


def built(*overrides: str) -> dict[str, Renderer]:
    config = load_config("toybox", overrides)
    return build_renderers(config, [config])


def render(renderer: Renderer) -> Rendered:
    cameras = orbit_cameras(torch.tensor([[20.0]]), torch.tensor([[40.0]]), 2.4, 50.0)
    return at_step(renderer, 5, 10).render(ExactField(["a red cube"]), cameras, (16, 16), 0.5)


@pytest.mark.parametrize(
    ("name", "override", "kind"),
    [
        ("volume", "--renderers.volume.num_importance_samples=8", VolumeRenderer),
        ("volume", "--renderers.volume.near=1.0", None),
        ("volume", "--renderers.volume.cull_below=0", VolumeRenderer),
        ("volume", "--renderers.volume.density=volsdf", VolumeRenderer),
        ("volume", "--renderers.volume.inv_std=[20, 80]", VolumeRenderer),
        ("surface", "--renderers.surface.isosurface=tetrahedra", SurfaceRenderer),
        ("surface", "--renderers.surface.supersample=2", SurfaceRenderer),
        ("close", "--renderers.close={class: patch, patch: 8, downsample: 2, num_samples: 16}", PatchRenderer),
    ],
)
def test_a_recipe_reaches_every_renderer(name: str, override: str, kind: Any) -> None:
    if kind is None:
        with pytest.raises(ValueError, match="near=1.0, far=None: set both or none"):
            built(override)
        renderer = built(override, "--renderers.volume.far=4.0")[name]
        kind = VolumeRenderer
    else:
        renderer = built(override)[name]
    assert type(renderer) is kind
    assert 0.05 < float(render(renderer).views.opacity.detach().mean()) < 0.6  # the cube is seen


def test_settings_arrive_where_they_act() -> None:
    renderers = built("--renderers.volume.density=volsdf", "--renderers.volume.beta=[0.1, 0.02]")
    now = at_step(renderers["volume"], 5, 10)
    assert isinstance(now, VolumeRenderer) and isinstance(now.model, VolSDFAlpha)
    assert now.model.beta == pytest.approx(0.06)
    plain = at_step(built("--renderers.volume.inv_std=[20, 80]")["volume"], 5, 10)
    assert isinstance(plain, VolumeRenderer) and plain.model == NeusAlpha(50.0)
    learned = plain.with_config(plain.config, NeusAlpha(torch.tensor(7.0)))  # of a model that learns it
    assert isinstance(learned.model, NeusAlpha) and learned.model.inv_std == 7.0


def test_tetrahedra_cut_the_surface() -> None:
    surfaces = [
        render(built(f"--renderers.surface.isosurface={kind}")["surface"]).meshes for kind in ("cubes", "tetrahedra")
    ]
    cubes, tetrahedra = (meshes[0][1] for meshes in surfaces if meshes is not None)
    assert len(tetrahedra) > 2 * len(cubes)


def test_a_recipe_reaches_every_regularizer() -> None:
    config = load_config("toybox", [f"--regularizers.{name}=0.5" for name in REGULARIZERS])
    found = build_regularizers(config, [config])
    assert found.keys() == REGULARIZERS.keys()
    measured: set[str] = set()
    for renderer in built().values():
        rendered = render(renderer)
        total, values = regularize(rendered, {name: (loss, 0.5) for name, loss in found.items()})
        torch.testing.assert_close(total, 0.5 * sum(values.values(), torch.zeros(())))
        assert all(bool(torch.isfinite(value)) for value in values.values())
        assert not measured & values.keys()  # each belongs to one kind of render
        measured |= values.keys()
    assert measured == REGULARIZERS.keys()
