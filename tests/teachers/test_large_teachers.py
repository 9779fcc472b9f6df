"""Stable Diffusion XL and 3 and PixArt-Sigma as teachers, against diffusers' own pipelines on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prd.data.embeddings import Embeddings, embed
from prd.errors import ConfigError
from prd.teachers import PixArtTeacher, StableDiffusion3Teacher, StableDiffusionTeacher, StableDiffusionXLTeacher
from prd.teachers.base import epsilon_from, target_of
from prd.teachers.stable_diffusion_3 import FlowSchedule
from prd.text.loading import encoder_digest, load_encoder
from prd.training.recipes import load_config
from prd.training.run.models import model_faults
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny import random_views
from tests.teachers.tiny_large import POOLED, make_pixart, make_sd3, make_sdxl

PROMPTS = ["a cat bad", "c dog"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("xl")
    pipeline = make_sdxl(folder)
    pipeline.save_pretrained(folder / "saved")
    return pipeline, folder / "saved"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sd3")
    pipeline = make_sd3(folder)
    pipeline.save_pretrained(folder / "saved")
    return pipeline, folder / "saved"


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def test_sdxl_predicts_what_its_unet_does(sdxl) -> None:
    pipeline, folder = sdxl
    teacher = StableDiffusionXLTeacher.from_pretrained(str(folder))
    assert teacher.pixels == 16
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    sizes = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, POOLED).expand(2, -1)
    x_t, t = noise(2, 4, 8, 8), torch.tensor([300, 700])
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = pipeline.unet(x_t, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
    views = random_views(2, 1)
    condition = teacher.condition(PROMPTS, views.cameras)
    assert relative_difference(teacher.predict_noise(x_t, t, condition), expected) <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "bad"])
def test_sdxl_moves_away_from_what_its_pipeline_does(sdxl, negative: str, tmp_path: Path) -> None:
    """An empty negative prompt is zeros, unless the pipeline's model_index.json says that it is text."""
    pipeline, folder = sdxl
    cameras = random_views(2, 1).cameras
    _, tokens, _, pooled = pipeline.encode_prompt(PROMPTS, device="cpu", negative_prompt=negative or None)
    teacher = StableDiffusionXLTeacher.from_pretrained(str(folder))
    found = teacher.condition(PROMPTS, cameras, negative).negative_prompt_embeds
    torch.testing.assert_close(found[:, :-1], tokens.expand(2, -1, -1))
    torch.testing.assert_close(found[:, -1, :POOLED], pooled.expand(2, -1))
    teacher.zeros_for_empty = False
    as_text = teacher.condition(PROMPTS, cameras, negative).negative_prompt_embeds
    assert bool(as_text.any()) and torch.equal(as_text, found) == bool(negative)


@pytest.mark.parametrize("make", [make_sdxl, make_sd3, make_pixart], ids=["sdxl", "sd3", "pixart"])
def test_text_is_embedded_beforehand_as_the_teacher_does(make, tmp_path: Path) -> None:
    """What `prd embed` loads is the teacher's own encoder; what it stores is looked up with all that goes with it."""
    make(tmp_path).save_pretrained(tmp_path / "saved")
    place = str(tmp_path / "saved")
    kinds: dict[Any, Any] = {
        make_sdxl: StableDiffusionXLTeacher,
        make_sd3: StableDiffusion3Teacher,
        make_pixart: PixArtTeacher,
    }
    own, encoder = kinds[make].from_pretrained(place).prompt_encoder, load_encoder(place)
    assert encoder_digest(encoder) == encoder_digest(own)
    embed(PROMPTS, encoder, tmp_path / "stored", name=place)
    stored = Embeddings(tmp_path / "stored").encoder(own, "teacher")
    embeds = stored(PROMPTS)
    assert relative_difference(embeds, own(PROMPTS)) <= ROUNDING
    assert torch.equal(stored.pooled(PROMPTS, embeds), own.pooled(PROMPTS, embeds))
    assert (stored.length, stored.configs) == (own.length, own.configs)


@torch.no_grad()
@pytest.mark.parametrize("t5", [True, False])
def test_sd3_denoises_as_its_flow_does(sd3, t5: bool) -> None:
    """Its estimate of x from the diffusion's noise is y - s u, the flow's own."""
    pipeline, folder = sd3
    teacher = StableDiffusion3Teacher.from_pretrained(str(folder), t5=t5)
    if not t5:
        pipeline = pipeline.__class__(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False)
    condition = teacher.condition(PROMPTS, random_views(2, 1).cameras)
    assert relative_difference(condition.prompt_embeds[:, :-1], text) <= ROUNDING
    x, drawn, t = noise(2, 16, 8, 8), noise(2, 16, 8, 8, seed=1), torch.tensor([300, 700])
    s = ((t + 1) / 1000).view(-1, 1, 1, 1)
    y = (1 - s) * x + s * drawn
    flow = pipeline.transformer(y, text, pooled, t + 1.0).sample
    a = teacher.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x + (1 - a).sqrt() * drawn
    epsilon = teacher.predict_noise(x_t, t, condition)
    assert relative_difference((x_t - (1 - a).sqrt() * epsilon) / a.sqrt(), y - s * flow) <= 10 * ROUNDING


@torch.no_grad()
def test_sd3_encodes_with_the_shift_of_its_vae(sd3) -> None:
    pipeline, folder = sd3
    views = random_views(2, 1)
    images = views.rgb[:, 0].permute(0, 3, 1, 2) * 2 - 1
    expected = (pipeline.vae.encode(images).latent_dist.mean - 0.06) * 1.5
    assert relative_difference(StableDiffusion3Teacher.from_pretrained(str(folder)).encode(views), expected) <= ROUNDING


@torch.no_grad()
def test_pixart_predicts_what_its_transformer_does(tmp_path: Path) -> None:
    """Prompts of other lengths, whose padding it must not see; the learned variance is dropped."""
    pipeline = make_pixart(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    teacher = PixArtTeacher.from_pretrained(str(tmp_path / "saved"))
    text, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device="cpu")
    x_t, t = noise(2, 4, 8, 8), torch.tensor([300, 700])
    sizes = {"resolution": None, "aspect_ratio": None}
    expected = pipeline.transformer(x_t, text, t, added_cond_kwargs=sizes, encoder_attention_mask=mask).sample
    condition = teacher.condition(PROMPTS, random_views(2, 1).cameras)
    assert relative_difference(teacher.predict_noise(x_t, t, condition), expected[:, :4]) <= ROUNDING
    assert expected.shape[1] == 8
    pipeline.transformer.register_to_config(use_additional_conditions=True)
    with pytest.raises(ValueError, match="give PixArt-Sigma"):
        PixArtTeacher(pipeline.transformer, pipeline.vae, None, None, None)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_a_diffusion(shift: float) -> None:
    """In double precision: the exact flow of x and noise gives that noise back, at every level but the last."""
    a = FlowSchedule.even(shift).alphas_cumprod[:-1]
    x, drawn = noise(999, 3, 2, 2, dtype=torch.float64), noise(999, 3, 2, 2, seed=1, dtype=torch.float64)
    root, rest = a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
    flow = target_of(x, drawn, a, "flow_prediction")
    found = epsilon_from(flow, root * x + rest * drawn, a, "flow_prediction")
    assert relative_difference(found, drawn) < 1e-12
    assert bool((a[1:] < a[:-1]).all()) and 0 < a[-1] < a[0] < 1


def test_sizes_that_cannot_be_shown_are_named(sdxl, sd3) -> None:
    small = StableDiffusionXLTeacher.from_pretrained(str(sdxl[1]), pixels=8)
    assert small.input_shape == (4, 4, 4) and small.encode(random_views(1, 1)).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="pixels=9: stable_diffusion_xl takes a multiple of 4 up to 16"):
        StableDiffusionXLTeacher.from_pretrained(str(sdxl[1]), pixels=9)
    with pytest.raises(ValueError, match="pixels=24: stable_diffusion_3 takes a multiple of 8 up to 16"):
        StableDiffusion3Teacher.from_pretrained(str(sd3[1]), pixels=24)


def test_one_in_the_place_of_another_is_named(sdxl) -> None:
    folder = str(sdxl[1])
    given = load_config("toybox", [f"--teachers.stable_diffusion.path={folder}"])
    message = "|".join(str(fault) for fault in model_faults(given))
    assert "holds Stable Diffusion XL's model, not Stable Diffusion's" in message
    right = load_config("toybox", [f"--teachers.stable_diffusion_xl.path={folder}"])
    assert not list(model_faults(right))
    with pytest.raises(ValueError, match="its width"):
        StableDiffusionTeacher.from_pretrained(folder)
    with pytest.raises(ConfigError, match="takes none here"):
        load_config("toybox", [f"--teachers.stable_diffusion_xl={{path: {folder}, controlnet: x}}"])
