"""The rollout and its draws: a sample is drawn and judged the same whatever its company."""

from __future__ import annotations

import pytest
import torch

from prd.cameras import CameraSampling
from prd.distillation.asd import Guidance, leaf_views, rendering_gradient
from prd.distillation.draws import draw_normal, draw_uniform, sample_generator
from prd.distillation.progressive import distill_samples, rollout
from prd.rendering.views import Views
from prd.teachers import MVDreamTeacher, RichDreamerTeacher, StableDiffusionTeacher

PROMPTS = ["a red cube", "a blue cone", "a green mug"]
GUIDANCE = Guidance(guidance_scale=3.0, t_min=20, eta=0.1)


def generators(*samples: int) -> list[torch.Generator]:
    return [sample_generator(3, 7, sample, 4) for sample in samples]


def test_a_draw_is_its_samples_own_whatever_the_batch():
    for draw in (draw_normal, draw_uniform):
        together = draw((6, 5), generators(0, 1, 2))
        torch.testing.assert_close(together[2:4], draw((2, 5), generators(1)), rtol=0, atol=0)
        with pytest.raises(ValueError, match="must be a multiple"):
            draw((4, 5), generators(0, 1, 2))


def test_no_two_keys_draw_the_same():
    keys = [
        (seed, step, sample, stream)
        for seed in (0, 1)
        for step in range(20)
        for sample in range(8)
        for stream in range(5)
    ]
    assert len({float(torch.rand((), dtype=torch.float64, generator=sample_generator(*key))) for key in keys}) == len(
        keys
    )


def views_of(count: int) -> Views:
    """Random pictures of `count` prompts, the first ones the same for every count."""
    cameras = CameraSampling(4, (-30, 60), (1.12, 1.12), 50).sample(draw_uniform((count, 3), generators(*range(count))))
    channels = (3, 3, 1, 1, 1)
    images = [draw_uniform((count, 4, 32, 32, c), generators(*range(c, c + count))) for c in channels]
    return Views(*images, cameras=cameras)


@pytest.mark.parametrize("teacher_class", [StableDiffusionTeacher, MVDreamTeacher, RichDreamerTeacher])
def test_a_prompt_is_judged_the_same_alone_and_in_a_batch(random_toybox, teacher_class):
    teacher = teacher_class.from_pretrained(str(random_toybox / teacher_class.name))

    def ask(count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        leaves = leaf_views(views_of(count))
        result = distill_samples(teacher, leaves, PROMPTS[:count], GUIDANCE, generators(*range(10, 10 + count)))
        return result.loss.detach(), rendering_gradient(result.loss.sum(), leaves)

    (alone, own), (together, shared) = ask(1), ask(3)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    assert own.keys() == shared.keys() and max(float(gradient.abs().max()) for gradient in own.values()) > 0
    for name, gradient in own.items():
        torch.testing.assert_close(shared[name][:1], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    with pytest.raises(ValueError, match="one for each"):
        distill_samples(teacher, leaf_views(views_of(2)), PROMPTS[:2], GUIDANCE, generators(0))


def test_the_rollout_is_algorithm_1():
    """Every step starts from the one before, noised to a lower timestep, and no gradient flows between them."""
    asked: list[tuple[int, float]] = []
    weight = torch.tensor(2.0, requires_grad=True)

    class Student:
        def add_noise(self, x0, noise, timestep):
            return x0 + noise

        def denoise(self, latents, timestep, prompt_embeds):
            asked.append((timestep, float(latents.detach())))
            return weight * latents

        def decode(self, latents):
            return latents

    rollout(
        Student(),
        lambda k, field: field.sum(),
        lambda loss: loss.backward(),
        prompt_embeds=torch.zeros(1, 1, 1),
        timesteps=[999, 499],
        noise=lambda k: torch.tensor([float(k)]),
    )
    assert asked == [(999, 1.0), (499, 4.0)]  # 0 + 1; 2 * 1 + 2
    assert float(weight.grad) == (1.0 + 4.0) / 2  # a mean over the estimates; 2 more each if z0 were not cut off
