"""The contract of a base: what Algorithm 1 and PETA ask of every kind of network that a student is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.adapters import backbone_of
from prd.adapters.precision import keep_in_half
from prd.generators import TriplaneTurboModel
from prd.generators.adapter_files import base_hash
from prd.loading.weight_hashes import backbone_weights, weights_hash
from tests.adapters.tiny import adapted, tiny_base
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny_large import make_pixart, make_sd3, make_sdxl

TOKENS = 6
Parts = tuple[Any, Any, Any]  # network, VAE, scheduler


def _of(make: Callable[[Path], Any]) -> Callable[[Path], Parts]:
    def parts(folder: Path) -> Parts:
        pipeline = make(folder)
        network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        return network, pipeline.vae, pipeline.scheduler

    return parts


MEMBERS: dict[str, Callable[[Path], Parts]] = {
    "sd": lambda folder: tiny_base(),
    "sd v": lambda folder: tiny_base(prediction_type="v_prediction"),
    "lcm": lambda folder: tiny_base(time_cond_proj_dim=10),
    "sdxl": _of(make_sdxl),
    "pixart": _of(make_pixart),
    "sd3": _of(make_sd3),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    return {name: make(tmp_path_factory.mktemp("base")) for name, make in MEMBERS.items()}


@pytest.fixture(params=MEMBERS)
def parts(request: pytest.FixtureRequest, made: dict[str, Parts]) -> Parts:
    network, vae, scheduler = made[request.param]
    return network.float(), vae.float(), scheduler


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_of(model: TriplaneTurboModel) -> Tensor:
    """Embeddings of two prompts; where their last row is a mask, it keeps every token but the first."""
    text = noise(2, TOKENS + 1, model.backbone.text_width, seed=5)
    if model.backbone.network_name == "transformer":
        text[:, -1] = 1
        text[:, -1, 0] = 0
    return text


@torch.no_grad()
def test_a_fresh_adapter_changes_no_prediction(parts: Parts) -> None:
    model = adapted(*parts, trained=False)
    plain = backbone_of(parts[0], parts[1], model.peta, parts[2])
    x, t, text = noise(2, *model.latent_shape), torch.tensor([900, 30]), text_of(model)
    assert relative_difference(model.predict(x, t, text), plain.predict(x, t, text)) <= ROUNDING
    assert relative_difference(model.denoise(x, t, text), plain.predict_x0(x, t, text)) <= ROUNDING


def test_what_is_adapted_is_of_its_own_layers(parts: Parts) -> None:
    """Every listed layer, no other, and those of the planes with a pair of factors per plane."""
    model = adapted(*parts)
    found = {name: module for name, module in model.backbone.named_modules() if hasattr(module, "lora_A")}
    groups = model.backbone.layers()
    assert set(found) == {name for names in groups.values() for name in names}
    plane_wise = {name for name, module in found.items() if len(module.lora_A["default"].weight) == 6}
    assert plane_wise == model.backbone.plane_wise_layers() >= set(groups["self_attention"])
    shared = adapted(*parts, plane_wise=False)
    assert not [
        n for n, m in shared.backbone.named_modules() if hasattr(m, "lora_A") and m.lora_A["default"].weight.ndim == 3
    ]
    pattern = model.backbone.self_attention
    assert {name for name in found if pattern.fullmatch(name)} == set(groups["self_attention"])


def test_the_base_is_shared_and_stays_as_it_is(parts: Parts) -> None:
    names, hashes = set(dict(parts[0].named_modules())), weights_hash(backbone_weights(parts[0], parts[1]))
    model = adapted(*parts)
    assert set(dict(parts[0].named_modules())) == names
    assert base_hash(model.backbone) == hashes == weights_hash(backbone_weights(parts[0], parts[1]))
    own = {id(parameter) for parameter in parts[0].parameters()}
    frozen = [p for n, p in model.backbone.network.named_parameters() if not p.requires_grad]
    assert {id(parameter) for parameter in frozen} == own


@torch.no_grad()
def test_planes_of_a_sample_see_each_other_and_no_other_sample(parts: Parts) -> None:
    model = adapted(*parts)
    x, t, text = noise(2, *model.latent_shape), torch.tensor([900, 30]), text_of(model)
    before = model.denoise(x, t, text)
    x[0, 3] += 1
    changed = (model.denoise(x, t, text) - before).flatten(2).abs().amax(2) > 1e-5
    assert changed.tolist() == [[True] * 6, [False] * 6]
    assert relative_difference(model.denoise(x[1:], t[1:], text[1:]), before[1:]) <= ROUNDING
    assert relative_difference(model.denoise(x[1:], 30, text[1:]), before[1:]) <= ROUNDING
    other = text.clone()
    other[0, 1] += 1
    changed = (model.denoise(x, t, other) - model.denoise(x, t, text)).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, False]


@torch.no_grad()
def test_noise_and_x0_are_two_ends_of_one_line(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the exact answer, x0 is what was noised, and a step goes to the same noise at the lower level."""
    model = adapted(*parts)
    levels, text = model.backbone.levels, text_of(model)
    x0, drawn, t = noise(2, *model.latent_shape), noise(2, *model.latent_shape, seed=3), torch.tensor([900, 30])
    noisy = model.add_noise(x0, drawn, t)
    alpha, sigma = levels.alpha_sigma(t, noisy)
    answers = {"epsilon": drawn, "v_prediction": alpha * drawn - sigma * x0, "flow": drawn - x0}
    monkeypatch.setattr(model.backbone, "predict", lambda *_: answers[model.prediction_type])
    torch.testing.assert_close(model.denoise(noisy, t, text), x0, atol=1e-4, rtol=1e-4)
    first, second = model.timesteps(4)[1:3]
    stepped = model.ddim_step(model.add_noise(x0, drawn, first), x0, first, second)
    torch.testing.assert_close(stepped, model.add_noise(x0, drawn, second), atol=1e-4, rtol=1e-4)
    assert model.timesteps(4) == [999, 749, 499, 249]
    alphas, sigmas = levels.alpha_sigma(torch.arange(len(levels)), x0)
    assert bool((alphas.diff(dim=0) < 0).all() and (sigmas.diff(dim=0) > 0).all())


@torch.no_grad()
def test_a_fused_model_predicts_the_same(parts: Parts) -> None:
    model = adapted(*parts)
    x, text = noise(2, *model.latent_shape), text_of(model)
    x0 = model.denoise(x, 500, text)
    planes = model.decode_planes(x0)
    model.fuse()
    assert relative_difference(model.denoise(x, 500, text), x0) <= ROUNDING
    assert relative_difference(model.decode_planes(x0), planes) <= ROUNDING


def test_all_that_is_trained_is_reached_by_the_gradient(parts: Parts) -> None:
    """With and without gradient checkpointing, to the same gradient."""
    found = []
    for again in (False, True):
        model = adapted(*parts)
        if again:
            model.gradient_checkpointing = True
            model.backbone.network.enable_gradient_checkpointing()
        planes = model.decode_planes(model.denoise(noise(2, *model.latent_shape), 700, text_of(model)))
        planes.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and not n.startswith("heads.")}
        assert [n for n, gradient in gradients.items() if gradient is None or not gradient.any()] == []
        found.append(torch.cat([gradient.flatten() for gradient in gradients.values() if gradient is not None]))
    assert relative_difference(*found) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kept", ["autocast", "bfloat16"])
def test_half_precision_is_near(parts: Parts, kept: str) -> None:
    exact = adapted(*parts)
    x, text = noise(2, *exact.latent_shape), text_of(exact)
    expected = exact.denoise(x, 200, text)
    model = adapted(*parts)
    if kept == "bfloat16":
        model.to(torch.bfloat16)
    else:
        keep_in_half(model.backbone, torch.bfloat16)
    assert model.backbone.levels.levels.dtype == torch.float32
    assert 0 < relative_difference(model.denoise(x, 200, text), expected) < 0.05
