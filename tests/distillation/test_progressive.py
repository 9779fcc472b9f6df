"""The rollout and its draws: a sample is drawn and judged the same whatever its company."""

from __future__ import annotations

import pytest
import torch

from prd.cameras import CamerasConfig
from prd.distillation.asd import Guidance, leaf_views, rendering_gradient
from prd.distillation.draws import draw_normal, draw_uniform, sample_generator
from prd.distillation.progressive import JudgeLog, WeightedTeacher, distill_samples, judge_views, rollout
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
        (seed, step, sample, stream, *estimate)
        for seed in (0, 1)
        for step in range(20)
        for sample in range(8)
        for stream in range(5)
        for estimate in ((), (0,), (1,))
    ]
    assert len({float(torch.rand((), dtype=torch.float64, generator=sample_generator(*key))) for key in keys}) == len(
        keys
    )


def views_of(count: int) -> Views:
    """Random pictures of `count` prompts, the first ones the same for every count."""
    recipe = CamerasConfig(views=4, elevation=(-30, 60), relative_distance=(1.12, 1.12), fovy=50)
    cameras = recipe.sample(draw_uniform((count, 3), generators(*range(count))))
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


class Doubling:
    """A student of one trained number: z_0 = 2 z_t, and the field is z_0 itself."""

    def __init__(self) -> None:
        self.weight = torch.tensor(2.0, requires_grad=True)
        self.asked: list[tuple[int, float]] = []

    def add_noise(self, x0, noise, timestep):
        return x0 + noise

    def denoise(self, latents, timestep, prompt_embeds):
        self.asked.append((timestep, float(latents.detach())))
        return self.weight * latents

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("at_once, groups", [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]])])
def test_the_rollout_is_algorithm_1(at_once, groups):
    """Every step starts from the one before, noised to a lower timestep, and no gradient flows between them."""
    student, judged = Doubling(), []

    for ks, field in rollout(
        student,
        prompt_embeds=torch.zeros(1, 1, 1),
        timesteps=[999, 499, 249],
        noise=lambda k: torch.tensor([float(k)]),
        batch_size=at_once,
    ):
        judged.append(list(ks))
        assert len(field) == len(ks)
        (field.sum() / 3).backward()
    assert student.asked == [(999, 1.0), (499, 4.0), (249, 11.0)]  # 0 + 1; 2 * 1 + 2; 2 * 4 + 3
    assert judged == groups
    mean = (1.0 + 4.0 + 11.0) / 3  # over the estimates; more if z0 were not cut off
    assert float(student.weight.grad) == pytest.approx(mean)


def test_estimates_are_judged_together_as_one_by_one(random_toybox):
    kinds = (StableDiffusionTeacher, MVDreamTeacher)
    judges = [WeightedTeacher(kind.from_pretrained(str(random_toybox / kind.name)), 0.5, GUIDANCE) for kind in kinds]

    def judge(views: Views, estimates: range) -> tuple[torch.Tensor, JudgeLog]:
        leaves, log = leaf_views(views), JudgeLog()
        draws = [sample_generator(3, 7, sample, 4, k) for k in estimates for sample in range(2)]
        judge_views(leaves, judges, PROMPTS[:2] * len(estimates), draws, log, "volume", len(estimates)).backward()
        return leaves.rgb.grad, log

    whole = views_of(4)  # two prompts at two estimates
    one_by_one, logs = zip(*(judge(part_of(whole, k), range(k, k + 1)) for k in range(2)), strict=True)
    together, log = judge(whole, range(2))
    expected = torch.cat(one_by_one)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    first, second = (own.means() for own in logs)
    assert log.means() == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, rel=1e-4)
    assert "cosine/stable_diffusion-mvdream/volume" in first


def part_of(views: Views, k: int) -> Views:
    """Estimate k of views that hold two estimates of two prompts."""
    rows = slice(2 * k, 2 * k + 2)
    names = ("rgb", "normal", "depth", "disparity", "opacity")
    return Views(*(getattr(views, name)[rows] for name in names), cameras=views.cameras.chunk(2)[k])
