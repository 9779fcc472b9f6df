"""ATT3D: spectral norms, interpolation, density as a signed distance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prd.generators.att3d import Att3dConfig, Att3dModel, threshold
from prd.rendering.alpha import DensityAlpha
from tests.generators.tiny_single_pass import ATT3D, embeddings, make, some_points


def test_both_linear_maps_have_spectral_norm_one() -> None:
    model = make("att3d")
    model.train()
    for _ in range(200):  # one step of the power iteration each
        model.generate(embeddings(1))
    model.eval()
    for layer in (model.first, model.second):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, abs=1e-3)
    assert model.second.bias is None and model.first.bias is not None
    vectors = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("_u", "_v"))}
    model.generate(embeddings(1))
    assert len(vectors) == 4  # evaluation iterates no further
    assert all(torch.equal(buffer, vectors[name]) for name, buffer in model.named_buffers() if name in vectors)


@pytest.mark.parametrize("resolutions", [(5, 9), (9, 14, 22, 36, 58)])
def test_parameters_are_as_large_as_the_vector_that_makes_them(resolutions: tuple[int, ...]) -> None:
    """At every size, so that prompts differ from the start; a gain of 1 leaves a million entries of 1e-3."""
    sizes = {"resolutions": resolutions, "text_length": 16, "text_width": 64, "hidden_width": 32}
    prompts = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Att3dModel(Att3dConfig(**sizes)).eval()
        weak = Att3dModel(Att3dConfig(**sizes, feature_gain=1.0)).eval()
    with torch.no_grad():
        v, w, small = F.silu(model.first(prompts.flatten(1))), model.mapping(prompts), weak.mapping(prompts)
    assert 0.3 < float(w.square().mean().sqrt() / v.square().mean().sqrt()) < 1.0  # 1 along the longest direction
    spread, weak_spread = (float((a - b).square().mean().sqrt()) for a, b in (w, small))
    assert spread == pytest.approx(model.feature_gain * weak_spread, rel=0.3) and spread > 0.05


def test_interpolation_is_symmetric_and_ends_at_the_prompts() -> None:
    model, (a, b), points = make("att3d"), embeddings(2), some_points(1)
    alphas = torch.linspace(0, 1, 5)
    forth, back = model.interpolate(a, b, alphas), model.interpolate(b, a, 1 - alphas)
    torch.testing.assert_close(forth.parameters, back.parameters, rtol=1e-5, atol=1e-7)
    ends = model.generate(torch.stack([a, b]))
    torch.testing.assert_close(forth.parameters[[0, -1]], ends.parameters, rtol=1e-5, atol=1e-7)
    sdf = forth.sdf(points.expand(5, -1, -1))
    assert (sdf[0] - sdf[-1]).abs().max() > 1e-3
    steps = (sdf[1:] - sdf[:-1]).abs().amax(dim=(1, 2))
    assert steps.max() < 5 * steps.min() + 1e-3  # a continuum, no jump


def test_the_density_is_the_threshold_on_the_surface_and_above_it_inside() -> None:
    model = make("att3d")
    field, level = model.generate(embeddings(1)), threshold(model.config)
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.99, 0.99, 0.99]]])
    inside, outside = field.sdf(points)[0, :, 0].tolist()
    assert inside < 0 < outside <= level
    alpha = model.alpha()
    assert isinstance(alpha, DensityAlpha) and alpha.threshold == level
    assert level == pytest.approx(ATT3D.density_scale * 0.693147, rel=1e-4)
    opacity = alpha(torch.tensor([level, 0.0]), torch.zeros(2), torch.tensor(0.1))
    assert opacity[0] == 0 and float(opacity[1]) == pytest.approx(1 - 2.718281828 ** (-level * 0.1), rel=1e-4)


@pytest.mark.parametrize("graph", [True, False])
def test_a_sample_is_what_the_single_queries_give(graph: bool) -> None:
    model, points = make("att3d"), some_points(2)
    with torch.set_grad_enabled(graph):
        field = model.generate(embeddings(2))
        together, apart = field.sample(points), (*field.sdf_and_gradient(points), field.rgb(points))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad == b.requires_grad == graph
    if graph:
        found = [
            torch.autograd.grad(sum(x.square().sum() for x in parts), list(model.parameters()), retain_graph=True)
            for parts in (together, apart)
        ]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_signed_distance_for_comparison() -> None:
    torch.manual_seed(0)
    model = Att3dModel(replace(ATT3D, representation="sdf"))
    assert model.alpha() is None
    points = some_points(1, 400)
    sdf = model.generate(embeddings(1)).sdf(points)[0, :, 0]
    radius = points[0].norm(dim=-1) - ATT3D.sphere_radius
    assert (sdf - radius).abs().max() < 1 and torch.corrcoef(torch.stack([sdf.detach(), radius]))[0, 1] > 0.95
