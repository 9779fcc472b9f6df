"""The diffusion of the toy box's teachers: a loss that the exact prediction brings to zero, and samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prd.toybox.diffusion import GREATEST_WEIGHT, decode_images, diffusion_loss, encode_images, plain, sample
from prd.toybox.models import (
    IMAGE_SIZE,
    TEXT_LENGTH,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)
from prd.toybox.world import ANY_SHAPE, COLORS, SHAPES, all_captions, open_captions
from tests.compare import ROUNDING


def test_the_exact_prediction_has_no_loss() -> None:
    tokenizer = make_tokenizer()
    text_encoder, x = make_text_encoder(tokenizer).eval(), torch.randn(4, 4, 8, 8)
    alphas = make_scheduler().alphas_cumprod
    seen: list[Tensor] = []

    def exact(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert text.shape == (4, 16, 64) and t[0] == t[1] and t[2] == t[3]  # the views of a set share t and text
        torch.testing.assert_close(text[0], text[1])
        seen.append(t)
        a = alphas[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x) / (1 - a).sqrt()

    given = text_encoder, tokenizer, x, ["a red cube", "a blue mug"]
    loss = diffusion_loss(exact, *given, torch.Generator().manual_seed(0), views=2)
    assert float(loss) < 100 * ROUNDING and len(seen) == 1
    assert float(diffusion_loss(lambda x_t, t, text: x_t, *given, torch.Generator().manual_seed(0), views=2)) > 0.1


def test_images_become_latents_and_captions_samples() -> None:
    tokenizer, vae = make_tokenizer(), make_vae().eval()
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    latents = encode_images(vae, images, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 8) and decode_images(vae, latents).shape == images.shape
    unet, text_encoder = make_unet(cameras=False).eval(), make_text_encoder(tokenizer).eval()
    found = sample(plain(unet), text_encoder, tokenizer, ["a red cube"] * 2, size=8, seed=3)
    assert found.shape == (2, 4, 8, 8) and found.isfinite().all()


def test_the_weight_makes_it_the_error_of_v_where_it_is_not_clamped() -> None:
    """v = sqrt(a) noise - sqrt(1 - a) x, where both the noise and x are as a prediction of the noise has them."""
    tokenizer, alphas = make_tokenizer(), make_scheduler().alphas_cumprod
    text_encoder, x = make_text_encoder(tokenizer).eval(), torch.randn(2, 4, 8, 8)
    seen: list[tuple[Tensor, Tensor]] = []

    def wrong(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append((x_t, alphas[t].view(-1, 1, 1, 1)))
        return 0.9 * x_t

    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        loss = diffusion_loss(wrong, text_encoder, tokenizer, x, ["a red cube", "a toy"], generator)
        x_t, a = seen[-1]
        noise, guess = (x_t - a.sqrt() * x) / (1 - a).sqrt(), 0.9 * x_t
        x_guess = (x_t - (1 - a).sqrt() * guess) / a.sqrt()
        error = ((a.sqrt() * (guess - noise) - (1 - a).sqrt() * (x_guess - x)).square()).mean(dim=(1, 2, 3))
        weight = (1 / a).clamp(max=GREATEST_WEIGHT)[:, 0, 0, 0]
        torch.testing.assert_close(loss, (error * a[:, 0, 0, 0] * weight).mean(), rtol=1e-3, atol=0)
    assert any(bool((a > 1 / GREATEST_WEIGHT).all()) for _, a in seen)


def test_no_caption_is_cut() -> None:
    tokenizer = make_tokenizer()
    assert max(len(tokenizer(c.text).input_ids) for c in (*all_captions(), *open_captions())) <= TEXT_LENGTH


@pytest.mark.parametrize("word", ("a", "an", "on", ANY_SHAPE, *COLORS, *SHAPES))
def test_every_word_of_the_world_is_one_token(word: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.tokenize(f"{word} {word}") == [f"{word}</w>"] * 2
    assert len(tokenizer.tokenize("zebra")) > 1
