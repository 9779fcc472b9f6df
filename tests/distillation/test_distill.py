"""Draws, view and settings of `distill` reach the loss; a prompt's loss does not depend on its company."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prd.distillation.asd import AsdResult, asd_loss
from prd.distillation.distill import AsdLoss, condition_views, select_views
from prd.distillation.draws import draw_normal, draw_uniform
from prd.distillation.multi_teacher import leaf_views, rendering_gradient
from prd.distillation.protocol import DistillationLoss
from prd.distillation.timesteps import sample_timesteps, shifted_timesteps
from prd.rendering.views import Views
from prd.teachers import MVDreamTeacher, RichDreamerTeacher, StableDiffusionTeacher
from prd.teachers.base import TeacherConfig
from prd.utils.checked_types import resolved
from tests.distillation.stub import THREE, StubTeacher, ask, config_of, sample_generators, settings_of, views_of
from tests.teachers.tiny import random_views

PROMPTS = ["a red cube", "a mug"]
BASE: dict[str, Any] = {"t_min": 100, "t_max": 900}


class Draws:
    """The documented draws in their order, from one generator or one per prompt."""

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


def written_out(teacher: StubTeacher, views: Views, change: dict, draws: Draws) -> AsdResult:
    """Check what `distill` promises: view, encoder noise, timestep, shift and noise, and every setting handed on."""
    settings, config = settings_of(**change), config_of(**(BASE | change))
    if teacher.num_views == 1:
        views = select_views(views, (draws.uniform() * 4).long()[:, None])
    x = teacher.encode(views, noise=draws.normal(2 * teacher.num_views, 3, 4, 4))
    t = sample_timesteps(draws.uniform(), int(config.t_min), config.t_max)
    shifted = shifted_timesteps(t, draws.uniform(), settings.eta, int(config.t_min)) if settings.eta else None
    return asd_loss(
        teacher,
        x,
        teacher.condition(PROMPTS, views.cameras, settings.negative_prompt),
        t=t,
        t_plus=shifted,
        noise=draws.normal(*x.shape),
        guidance_scale=settings.guidance_scale,
        config=config,
    )


@pytest.mark.parametrize("each", [False, True], ids=["one generator", "one per prompt"])
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
        {"mean_over_views": False},
        {"negative_prompt": "ugly"},
    ],
    ids=lambda change: ",".join(change) or "defaults",
)
def test_every_setting_reaches_the_loss(change, views, each):
    teacher, rendered = StubTeacher(views), random_views(2, 4, size=8)
    leaves, draws = leaf_views(rendered), Draws(each)
    found = ask(teacher, leaves, PROMPTS, draws.source, **(BASE | change))
    expected = written_out(teacher, rendered, change, Draws(each))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.weight, expected.weight)
    if change and not (views == 1 and {"average_over", "mean_over_views"} & change.keys()):  # one view is its own mean
        plain = written_out(teacher, rendered, {"eta": change.get("eta", 0) if len(change) > 1 else 0}, Draws(each))
        assert not torch.allclose(expected.gradient, plain.gradient, rtol=1e-3)  # the setting matters here


@pytest.mark.parametrize("each", [False, True], ids=["one generator", "one per prompt"])
def test_a_teacher_of_single_images_sees_each_view_in_its_turn(each):
    teacher, leaves, seen = StubTeacher(1), leaf_views(random_views(2, 4, size=8)), [set(), set()]
    for seed in range(40):
        generators = [torch.Generator().manual_seed(100 * seed + i) for i in range(2)]
        result = ask(teacher, leaves, PROMPTS, generators if each else generators[0], **BASE)
        pulled = rendering_gradient(result.loss.sum(), leaves)["rgb"].abs().flatten(2).amax(2) > 0
        assert pulled.sum(1).tolist() == [1, 1]
        for prompt, view in enumerate(pulled.long().argmax(1).tolist()):
            seen[prompt].add(view)
    assert seen == [{0, 1, 2, 3}] * 2


@pytest.mark.parametrize("teacher_class", [StableDiffusionTeacher, MVDreamTeacher, RichDreamerTeacher])
def test_a_prompt_has_the_same_loss_alone_and_in_a_batch(random_toybox, teacher_class):
    teacher = teacher_class.from_pretrained(str(random_toybox / teacher_class.name))

    def loss_of(count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        leaves = leaf_views(views_of(count))
        result = ask(teacher, leaves, THREE[:count], sample_generators(*range(10, 10 + count)), eta=0.1)
        return result.loss.detach(), rendering_gradient(result.loss.sum(), leaves)

    (alone, own), (together, shared) = loss_of(1), loss_of(3)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    assert own.keys() == shared.keys() and max(float(gradient.abs().max()) for gradient in own.values()) > 0
    for name, gradient in own.items():
        torch.testing.assert_close(shared[name][:1], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    with pytest.raises(ValueError, match="one for each"):
        ask(teacher, leaf_views(views_of(2)), THREE[:2], sample_generators(0))


def test_a_schedule_must_have_been_resolved():
    teacher, leaves = StubTeacher(4), leaf_views(random_views(2, 4, size=8))
    with pytest.raises(TypeError, match=r"schedule=\[500.0, 20.0\]: still spans steps"):
        ask(teacher, leaves, PROMPTS, 5, t_min=(500, 20))
    with pytest.raises(TypeError, match=r"schedule=\[9.0, 3.0\]: still spans steps"):
        ask(teacher, leaves, PROMPTS, 5, guidance_scale=(9, 3))
    now = resolved(TeacherConfig(guidance_scale=(9.0, 3.0), eta=0.3, negative_prompt="ugly"), 5, 10)
    assert now == TeacherConfig(guidance_scale=6.0, eta=0.3, negative_prompt="ugly")


def test_asd_is_a_distillation_loss():
    loss = AsdLoss.from_config(config_of())
    assert isinstance(loss, DistillationLoss) and not isinstance(StubTeacher(1), DistillationLoss)
    teacher, leaves = StubTeacher(4), leaf_views(random_views(2, 4, size=8))
    generator = torch.Generator().manual_seed(5)
    found = loss(teacher, leaves, PROMPTS, settings=settings_of(), config=config_of(), generator=generator)
    torch.testing.assert_close(found.loss, ask(teacher, leaves, PROMPTS, 5).loss, rtol=0, atol=0)


def test_a_view_conditioned_teacher_gets_the_views():
    class Shown(StubTeacher):
        def condition_on(self, condition, views):
            return condition, views

    views = random_views(2, 4)
    condition, given = condition_views(Shown(4), PROMPTS, views, "bad")
    assert given is views and condition.negative_prompt_embeds.flatten()[0] == 3 / 20


def test_select_views_keeps_cameras_and_pixels_together():
    views = random_views(2, 4)
    chosen = select_views(views, torch.tensor([[2], [0]]))
    torch.testing.assert_close(chosen.rgb[0, 0], views.rgb[0, 2])
    torch.testing.assert_close(chosen.opacity[1, 0], views.opacity[1, 0])
    torch.testing.assert_close(chosen.cameras.azimuth[:, 0], views.cameras.azimuth[[0, 1], [2, 0]])
