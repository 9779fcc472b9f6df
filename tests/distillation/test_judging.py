"""What a judge is told reaches the loss: every setting of `Guidance`, the draws, the view, the judge's weight."""

from dataclasses import replace

import pytest
import torch

from prd.distillation.asd import (
    AsdResult,
    Guidance,
    asd_loss,
    distill,
    leaf_views,
    rendering_gradient,
    sample_timesteps,
    select_views,
    shifted_timesteps,
)
from prd.distillation.draws import draw_normal, draw_uniform
from prd.distillation.progressive import JudgeLog, WeightedTeacher, distill_samples, judge_views
from prd.rendering.views import Views
from prd.teachers.base import Condition, to_images
from prd.training.build import guidance_at
from prd.training.config import TrainConfig
from prd.training.sections import DistillationConfig, TeacherConfig
from tests.teachers.tiny import random_views

PROMPTS = ["a red cube", "a mug"]
BASE = Guidance(guidance_scale=3.0, t_min=100, t_max=900)


class StubTeacher:
    """Pixels plus noise as x, and a prediction that depends on x_t, t and the text's length."""

    name = "stub"

    def __init__(self, num_views: int) -> None:
        self.num_views = num_views
        self.alphas_cumprod = torch.linspace(0.999, 0.001, 1000)

    def encode(self, views, *, generator=None, noise=None):
        x = to_images(views.rgb, 4) * 2 - 1
        if generator is not None:
            noise = torch.randn(x.shape, generator=generator)
        return x if noise is None else x + 0.1 * noise

    def condition(self, prompts, cameras, negative_prompt=""):
        text = torch.tensor([len(prompt) / 20 for prompt in prompts]).repeat_interleave(cameras.views).view(-1, 1, 1)
        return Condition(text, torch.full_like(text, len(negative_prompt) / 20))

    def predict_noise(self, x_t, t, condition):
        return x_t * condition.prompt_embeds.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


class Draws:
    """The documented draws in their order, from one generator or one a prompt."""

    def __init__(self, each: bool) -> None:
        seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        self.source = seeds if each else seeds[0]

    def uniform(self) -> torch.Tensor:
        if isinstance(self.source, list):
            return draw_uniform((2,), self.source)
        return torch.rand(2, generator=self.source)

    def normal(self, *shape: int) -> torch.Tensor:
        if isinstance(self.source, list):
            return draw_normal(shape, self.source)
        return torch.randn(*shape, generator=self.source)


def written_out(teacher: StubTeacher, views: Views, guidance: Guidance, draws: Draws) -> AsdResult:
    """What `distill` promises: view, encoder noise, timestep, shift and noise, and every setting handed on."""
    if teacher.num_views == 1:
        views = select_views(views, (draws.uniform() * 4).long()[:, None])
    x = teacher.encode(views, noise=draws.normal(2 * teacher.num_views, 3, 4, 4))
    t = sample_timesteps(draws.uniform(), guidance.t_min, guidance.t_max)
    shifted = shifted_timesteps(t, draws.uniform(), guidance.eta, guidance.t_min) if guidance.eta else None
    return asd_loss(
        teacher,
        x,
        teacher.condition(PROMPTS, views.cameras, guidance.negative_prompt),
        t=t,
        t_plus=shifted,
        noise=draws.normal(*x.shape),
        guidance_scale=guidance.guidance_scale,
        weighting=guidance.weighting,
        delta=guidance.delta,
        x0_from=guidance.x0_from,
        average_over=guidance.average_over,
        reference=guidance.reference,
        grad_clip=guidance.grad_clip,
    )


@pytest.mark.parametrize("each", [False, True], ids=["one generator", "one a prompt"])
@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"guidance_scale": 9.0},
        {"t_min": 600},
        {"t_max": 300},
        {"eta": 0.3},
        {"weighting": "uniform"},
        {"weighting": "sqrt"},
        {"delta": 0.7},
        {"x0_from": "clean"},
        {"average_over": "image", "eta": 0.3},
        {"reference": "noise"},
        {"grad_clip": 0.05},
        {"negative_prompt": "ugly"},
    ],
    ids=lambda change: ",".join(change) or "defaults",
)
def test_every_setting_reaches_the_loss(change, views, each):
    teacher, rendered, guidance = StubTeacher(views), random_views(2, 4, size=8), replace(BASE, **change)
    leaves, draws = leaf_views(rendered), Draws(each)
    found = (distill_samples if each else distill)(teacher, leaves, PROMPTS, guidance, draws.source)
    expected = written_out(teacher, rendered, guidance, Draws(each))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.weight, expected.weight)
    if change and not (views == 1 and "average_over" in change):  # one view is its own mean
        plain = written_out(teacher, rendered, replace(BASE, eta=guidance.eta if len(change) > 1 else 0), Draws(each))
        assert not torch.allclose(expected.gradient, plain.gradient, rtol=1e-3)  # the setting matters here


@pytest.mark.parametrize("each", [False, True], ids=["one generator", "one a prompt"])
def test_a_teacher_of_single_images_sees_each_view_in_its_turn(each):
    teacher, leaves, seen = StubTeacher(1), leaf_views(random_views(2, 4, size=8)), [set(), set()]
    for seed in range(40):
        generators = [torch.Generator().manual_seed(100 * seed + i) for i in range(2)]
        result = (
            distill_samples(teacher, leaves, PROMPTS, BASE, generators)
            if each
            else distill(teacher, leaves, PROMPTS, BASE, generators[0])
        )
        pulled = rendering_gradient(result.loss.sum(), leaves)["rgb"].abs().flatten(2).amax(2) > 0
        assert pulled.sum(1).tolist() == [1, 1]
        for prompt, view in enumerate(pulled.long().argmax(1).tolist()):
            seen[prompt].add(view)
    assert seen == [{0, 1, 2, 3}] * 2


def pulled_by(judges: list[WeightedTeacher]) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient at the colours of two prompts' renderings, and the log."""
    views, log = leaf_views(random_views(2, 4, size=8)), JudgeLog()
    judge_views(views, judges, PROMPTS, torch.Generator().manual_seed(5), log, "volume").backward()
    assert views.rgb.grad is not None
    return views.rgb.grad, log.means()


def test_a_judges_weight_scales_its_pull_and_its_guidance_is_its_own():
    teacher = StubTeacher(4)
    leaves = leaf_views(random_views(2, 4, size=8))
    result = distill(teacher, leaves, PROMPTS, BASE, torch.Generator().manual_seed(5))
    one = rendering_gradient(result.loss.mean(), leaves)["rgb"]
    found, logged = pulled_by([WeightedTeacher(teacher, 2.5, BASE)])
    torch.testing.assert_close(found, 2.5 * one)
    assert logged["gradient_norm/stub/volume"] == pytest.approx(float((2.5 * one).norm()), rel=1e-5)
    assert logged["weight/stub/volume"] == pytest.approx(float(result.weight.mean()), rel=1e-5)
    other, _ = pulled_by([WeightedTeacher(teacher, 2.5, replace(BASE, guidance_scale=9.0))])
    assert not torch.allclose(other, found, rtol=1e-3)


def test_judges_add_up():
    second = StubTeacher(1)
    second.name = "second"
    first = WeightedTeacher(StubTeacher(4), 1.0, BASE)
    together, logged = pulled_by([first, WeightedTeacher(second, 0.5, BASE)])
    generator = torch.Generator().manual_seed(5)
    expected = torch.zeros_like(together)
    for teacher, weight in ((first.teacher, 1.0), (second, 0.5)):
        leaves = leaf_views(random_views(2, 4, size=8))
        result = distill(teacher, leaves, PROMPTS, BASE, generator)
        expected += rendering_gradient(weight * result.loss.mean(), leaves)["rgb"]
    torch.testing.assert_close(together, expected)
    assert {"cosine/stub-second/volume", "gradient_norm/second/volume"} <= logged.keys()


def test_a_recipes_settings_reach_the_guidance():
    said = {"t_min": 300, "t_max": 700, "weighting": "sqrt", "delta": 0.7, "x0_from": "clean"}
    said |= {"average_over": "image", "reference": "noise", "grad_clip": 0.05}
    own = TeacherConfig(guidance_scale=(9.0, 3.0), eta=0.3, negative_prompt="ugly")
    config = TrainConfig(distillation=DistillationConfig(**said), max_train_steps=10)
    expected = Guidance(guidance_scale=6.0, eta=0.3, negative_prompt="ugly", **said)
    assert guidance_at(config, own, 5) == expected


def test_teachers_of_one_name_are_logged_apart():
    pulled, logged = pulled_by([WeightedTeacher(StubTeacher(4), 1.0, BASE), WeightedTeacher(StubTeacher(4), 2.0, BASE)])
    assert {"gradient_norm/stub/volume", "gradient_norm/stub_2/volume", "cosine/stub-stub_2/volume"} <= logged.keys()
    assert logged["gradient_norm/stub_2/volume"] != logged["gradient_norm/stub/volume"]


def test_no_judge_is_an_error():
    with pytest.raises(ValueError, match="judges: none given"):
        pulled_by([])
