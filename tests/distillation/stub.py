"""A teacher whose predictions can be written down, and settings in one call, for the tests of distillation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from prd.cameras import CamerasConfig
from prd.distillation.asd import AsdConfig, AsdResult
from prd.distillation.distill import distill
from prd.distillation.draws import draw_uniform, sample_generator
from prd.distillation.multi_teacher import WeightedTeacher
from prd.rendering.views import Views
from prd.teachers.base import Condition, TeacherConfig, to_images

THREE = ["a red cube", "a blue cone", "a green mug"]
OF_TEACHER = {field.name for field in fields(TeacherConfig)}


class StubTeacher:
    """Pixels plus noise as x, and a prediction that depends on x_t, t and the text's length."""

    name = "stub"
    input_shape = (3, 4, 4)

    def __init__(self, num_views: int) -> None:
        self.num_views = num_views
        self.alphas_cumprod = torch.linspace(0.999, 0.001, 1000)

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        x = to_images(views.rgb, 4) * 2 - 1
        return x if noise is None else x + 0.1 * noise

    def condition(self, prompts, cameras, negative_prompt: str = "") -> Condition:
        text = torch.tensor([len(prompt) / 20 for prompt in prompts]).repeat_interleave(cameras.views).view(-1, 1, 1)
        return Condition(text, torch.full_like(text, len(negative_prompt) / 20))

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return x_t * condition.prompt_embeds.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


def settings_of(**changes: Any) -> TeacherConfig:
    """A teacher's settings with those of `changes` that are a teacher's; guidance scale 3."""
    return TeacherConfig(**{"guidance_scale": 3.0} | {k: v for k, v in changes.items() if k in OF_TEACHER})


def config_of(**changes: Any) -> AsdConfig:
    """The loss's settings with those of `changes` that are not a teacher's; t_min 20 throughout."""
    return AsdConfig(**{"t_min": 20} | {k: v for k, v in changes.items() if k not in OF_TEACHER})


def weighted(teacher: Any, weight: float = 1.0, **changes: Any) -> WeightedTeacher:
    """A teacher with its settings at a step."""
    return WeightedTeacher(teacher, settings_of(weight=weight, **changes))


def ask(
    teacher: Any, views: Views, prompts: list[str], generator: Any, interpolation: Any = None, **changes: Any
) -> AsdResult:
    """`distill` with the settings in `changes`; generator: an int seeds one for the batch."""
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    return distill(
        teacher,
        views,
        prompts,
        settings=settings_of(**changes),
        config=config_of(**changes),
        generator=generator,
        interpolation=interpolation,
    )


def sample_generators(*samples: int) -> list[torch.Generator]:
    """The generators of some samples of one step and stream."""
    return [sample_generator(3, 7, sample, 4) for sample in samples]


def views_of(count: int) -> Views:
    """Random pictures of `count` prompts, the first ones the same for every count."""
    cameras = CamerasConfig(elevation=(-30, 60), relative_distance=(1.12, 1.12), fovy=50).sample(
        draw_uniform((count, 3), sample_generators(*range(count)))
    )
    channels = (3, 3, 1, 1, 1)
    images = [draw_uniform((count, 4, 32, 32, c), sample_generators(*range(c, c + count))) for c in channels]
    return Views(*images, cameras=cameras)
