"""The toy box's other bases: trained as their students call them, saved, and opened as bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.adapters.diffusion_transformers import backbone_of
from prd.loading.stable_diffusion import load_base
from prd.toybox.bases import BASES, ToyBase, base_loss, sample_base
from prd.toybox.diffusion import GREATEST_WEIGHT
from prd.toybox.models import make_vae
from tests.compare import ROUNDING, relative_difference

CHANNELS = {"sdxl": 4, "pixart": 4, "sd3": 16}
CAPTIONS = ["a red cube", "a blue mug"]


@pytest.fixture(scope="module", params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str) -> ToyBase:
    torch.manual_seed(0)
    made = BASES[kind](make_vae(CHANNELS[kind]))
    for module in (*made.trained, made.pipeline.vae):
        module.eval()
    return made


def test_the_exact_prediction_has_no_loss(base: ToyBase, kind: str) -> None:
    x = torch.randn(2, CHANNELS[kind], 8, 8)
    weights: list[Tensor] = []

    def exact(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert text.ndim == 3 and len(text) == 2 and not torch.equal(text[0], text[1])
        if base.flow:
            s = (t / 1000).view(-1, 1, 1, 1)
            weights.append(torch.ones_like(s))
            return (x_t - x) / s  # noise - x
        a = base.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        weights.append((1 / a).clamp(max=GREATEST_WEIGHT))
        return (x_t - a.sqrt() * x) / (1 - a).sqrt()

    generator = torch.Generator().manual_seed(1)
    assert float(base_loss(replace(base, predict=exact), x, CAPTIONS, generator)) < 1e4 * ROUNDING
    generator.manual_seed(1)
    one_off = replace(base, predict=lambda *given: exact(*given) + 1)
    expected = weights[0].mean()
    torch.testing.assert_close(base_loss(one_off, x, CAPTIONS, generator), expected, rtol=1e-3, atol=1e-3)


def test_every_part_is_trained(base: ToyBase, kind: str) -> None:
    parameters = [p for module in base.trained for p in module.parameters()]
    loss = base_loss(base, torch.randn(2, CHANNELS[kind], 8, 8), CAPTIONS, torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    reached = sum(p.numel() for p, g in zip(parameters, gradients, strict=True) if g is not None)
    # The last layers of CLIPs whose states but one are read, and zeros in the adaptive norms, wait for others.
    assert reached > 0.8 * sum(p.numel() for p in parameters) and loss.isfinite()


def test_samples_are_latents_of_their_captions(base: ToyBase, kind: str) -> None:
    found = sample_base(base, CAPTIONS, seed=3, steps=2)
    assert found.shape == (2, CHANNELS[kind], 8, 8) and found.isfinite().all()
    assert relative_difference(sample_base(base, CAPTIONS, seed=3, steps=2), found) <= ROUNDING
    assert relative_difference(sample_base(base, CAPTIONS, seed=4, steps=2), found) > 0.1


def test_a_saved_one_is_a_base_that_predicts_as_it_was_trained(base: ToyBase, kind: str, tmp_path: Path) -> None:
    base.pipeline.save_pretrained(tmp_path)
    opened = load_base(tmp_path)
    assert opened.encoder is not None
    text = base.encoder.encode(CAPTIONS)
    torch.testing.assert_close(opened.encoder(CAPTIONS), text)
    one: Any = SimpleNamespace(num_planes=1, plane_channels=4)  # a student of one plane is the base itself
    backbone = backbone_of(opened.unet, opened.vae, one, opened.scheduler)
    x = torch.randn(2, 1, CHANNELS[kind], 8, 8)
    told = backbone.levels.told(torch.tensor([600, 600]))
    found = backbone.predict(x, 600, text)
    torch.testing.assert_close(found[:, 0], base.predict(x[:, 0], told, text), rtol=1e-3, atol=1e-3)
