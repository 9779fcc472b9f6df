"""Prompt interpolation over embeddings, guidance and losses (ATT3D, section 3.2.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prd.data.batches import draw_mixture
from prd.distillation.interpolation import InterpolationConfig, PromptInterpolation
from prd.distillation.multi_teacher import leaf_views
from prd.teachers.base import Condition
from tests.distillation.stub import StubTeacher, ask
from tests.teachers.tiny import random_views

FIRST, SECOND = ["a red cube", "a mug"], ["a very long prompt", "cup"]
KINDS = ("embeddings", "guidance", "losses")


class CurvedTeacher(StubTeacher):
    """Whose prediction is no linear function of the text, so that the three kinds differ."""

    def predict_noise(self, x_t, t, condition: Condition):
        text = condition.prompt_embeds.view(-1, 1, 1, 1)
        return x_t * text.square() + 0.3 * text


SETTINGS: dict[str, Any] = {"t_min": 100, "t_max": 900, "weighting": "sds", "reference": "noise"}


def judged(teacher, prompts, interpolation=None, **changes):
    views = leaf_views(random_views(2, 4))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return ask(teacher, views, prompts, generators, interpolation, **(SETTINGS | changes))


@pytest.mark.parametrize("over", KINDS)
@pytest.mark.parametrize("views", [1, 4])
def test_the_ends_are_the_prompts_themselves(over: str, views: int) -> None:
    teacher = CurvedTeacher(views)
    first = judged(teacher, FIRST, PromptInterpolation(SECOND, torch.zeros(2), over))
    torch.testing.assert_close(first.gradient, judged(teacher, FIRST).gradient)
    if over != "losses":  # whose second judgement has a noise of its own
        second = judged(teacher, FIRST, PromptInterpolation(SECOND, torch.ones(2), over))
        torch.testing.assert_close(second.gradient, judged(teacher, SECOND).gradient)


@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_guidance_interpolates_the_predictions_and_embeddings_the_text(eta: float) -> None:
    teacher, share = CurvedTeacher(4), torch.tensor([0.25, 0.75])
    reference = "shifted" if eta else "noise"
    changes: dict[str, Any] = {"eta": eta, "reference": reference}
    rows = share.repeat_interleave(4).view(-1, 1, 1, 1)
    between = judged(teacher, FIRST, PromptInterpolation(SECOND, share, "guidance"), **changes).gradient
    one, two = (judged(teacher, prompts, **changes).gradient for prompts in (FIRST, SECOND))
    torch.testing.assert_close(between, torch.lerp(one, two, rows))  # linear in the predictions
    embedded = judged(teacher, FIRST, PromptInterpolation(SECOND, share, "embeddings"), **changes).gradient
    assert (embedded - between).abs().max() > 1e-3
    symmetric = judged(teacher, SECOND, PromptInterpolation(FIRST, 1 - share, "embeddings"), **changes).gradient
    torch.testing.assert_close(symmetric, embedded)


def test_losses_are_two_judgements() -> None:
    teacher, share = CurvedTeacher(4), torch.tensor([0.25, 0.75])
    result = judged(teacher, FIRST, PromptInterpolation(SECOND, share, "losses"))
    one = judged(teacher, FIRST)
    two = (result.loss - (1 - share) * one.loss) / share
    assert bool((two > 0).all()) and (two - one.loss).abs().max() > 1e-3
    share_of_image = share.repeat_interleave(4).view(-1, 1, 1, 1)
    second = (result.gradient - (1 - share_of_image) * one.gradient) / share_of_image
    again = judged(teacher, FIRST, PromptInterpolation(SECOND, torch.ones(2), "losses")).gradient
    torch.testing.assert_close(again, second, rtol=1e-4, atol=1e-5)


def test_second_prompts_and_shares_are_drawn_sample_by_sample() -> None:
    prompts = [f"prompt {i}" for i in range(50)]

    def draw(config: InterpolationConfig, seeds):
        return draw_mixture(config, prompts, [torch.Generator().manual_seed(seed) for seed in seeds])

    assert draw(InterpolationConfig(), range(4)) is None
    config = InterpolationConfig(probability=0.5, over="guidance", concentration=0.5)
    many = draw(config, range(400))
    paired = many.share > 0
    assert many.over == "guidance" and float(paired.float().mean()) == pytest.approx(0.5, abs=0.08)
    assert float(many.share[paired].mean()) == pytest.approx(0.5, abs=0.06)
    near = ((many.share[paired] < 0.1) | (many.share[paired] > 0.9)).float().mean()
    uniform = draw(InterpolationConfig(probability=1.0), range(400)).share
    assert near > 0.3 and float(((uniform < 0.1) | (uniform > 0.9)).float().mean()) < 0.3
    alone = draw(config, [7])
    assert alone.prompts[0] == many.prompts[7] and alone.share[0] == many.share[7]  # whatever the company


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share=\[1.5, 0.0\]: must lie in 0..1, one for each of 2"):
        PromptInterpolation(SECOND, torch.tensor([1.5, 0.0]))
    with pytest.raises(ValueError, match="over='words': must be one of"):
        PromptInterpolation(SECOND, torch.zeros(2), "words")
