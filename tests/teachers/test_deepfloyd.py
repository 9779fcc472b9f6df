"""DeepFloyd IF's first stage on a tiny random instance: pixels, T5, a learned variance."""

import pytest
import torch

from prd.teachers import CheckpointError, DeepFloydTeacher, StableDiffusionTeacher
from tests.teachers.tiny import random_views, save_deepfloyd, save_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_deepfloyd(tmp_path_factory.mktemp("if"))


@pytest.fixture
def teacher(folder):
    return DeepFloydTeacher.from_pretrained(folder)


def test_x_is_the_pixels_averaged(teacher):
    views = random_views(2, 1, size=32)
    x = teacher.encode(views)
    assert x.shape == (2, 3, 16, 16) and x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x[0, :, 0, 0], 2 * views.rgb[0, 0, :2, :2].mean((0, 1)) - 1)


def test_epsilon_is_the_first_half_of_the_output(teacher):
    views = random_views(2, 1)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 900])
    condition = teacher.condition(["A cat", "dog"], views.cameras, "bad")
    epsilon = teacher.predict_noise(x, t, condition)
    both = teacher.unet(x, t, encoder_hidden_states=condition.prompt_embeds).sample
    assert both.shape == (2, 6, 16, 16)
    torch.testing.assert_close(epsilon, both[:, :3], atol=0, rtol=0)
    assert not torch.allclose(epsilon, both[:, 3:])


def test_text_is_lower_cased_and_padding_is_masked_inside_t5(teacher):
    embeds = teacher.prompt_encoder(["A Cat ", "a cat", "dog"])
    assert embeds.shape == (3, 77, 16)
    torch.testing.assert_close(embeds[0], embeds[1])
    ids = teacher.prompt_encoder.tokenizer("a cat", return_tensors="pt").input_ids
    alone = teacher.text_encoder(ids).last_hidden_state[0]
    torch.testing.assert_close(embeds[1, : len(alone)], alone)
    assert not torch.allclose(embeds[1], embeds[2])


def test_sides_are_told(folder):
    teacher = DeepFloydTeacher.from_pretrained(folder, view_dependent=True)
    views = random_views(1, 1)
    seen = teacher.condition(["a cat"], views.cameras).prompt_embeds
    torch.testing.assert_close(seen, teacher.prompt_encoder(["a cat, front view"]))


def test_the_pixel_model_is_no_latent_model(folder, tmp_path):
    with pytest.raises(CheckpointError, match="text_encoder|vae"):
        StableDiffusionTeacher.from_pretrained(folder)
    with pytest.raises((CheckpointError, ValueError, OSError)):
        DeepFloydTeacher.from_pretrained(save_teacher(tmp_path, "stable_diffusion"))
