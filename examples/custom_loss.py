"""Write a distillation loss of your own: regression to the image that the teacher would rather see.

python examples/custom_loss.py                          # three steps on the toy box
PYTHONPATH=examples prd train --distillation "{class: custom_loss.RegressionLoss, delta: 0.5}"
# the last line names it by its import path, as `distillation: {class: ...}` of a recipe does
"""

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass as settings

from prd.distillation.asd import AsdResult
from prd.distillation.distill import condition_views, select_views
from prd.distillation.draws import draw_normal, draw_uniform
from prd.rendering.views import Views
from prd.teachers.base import Condition, Teacher, TeacherConfig
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.checked_types import CHECKS, Positive, PositiveSchedule, number


@settings(frozen=True, kw_only=True, config=CHECKS)
class RegressionConfig:
    """Settings of `RegressionLoss`."""

    t_min: PositiveSchedule = (500.0, 20.0)  # smallest teacher timestep; the largest is 979 of 1000
    delta: Positive = 1.0  # Huber's: a value of x that is further away pulls no harder


class RegressionLoss:
    """Huber loss between the encoded renderings and the teacher's guided estimate of the clean image."""

    config_class: ClassVar[Any] = RegressionConfig

    @classmethod
    def from_config(cls, config: RegressionConfig) -> "RegressionLoss":
        return cls()  # every call is given the settings again, with the numbers of its step

    def __call__(
        self,
        teacher: Teacher,
        views: Views,
        prompts: Sequence[str],
        *,
        settings: TeacherConfig,
        config: RegressionConfig,
        generator: torch.Generator | Sequence[torch.Generator],
        interpolation: object = None,
    ) -> AsdResult:
        if interpolation is not None or settings.eta > 0:
            raise ValueError(f"eta={settings.eta}: must be 0, and interpolation off: RegressionLoss has neither")
        draws = [generator] if isinstance(generator, torch.Generator) else generator
        count, views_each, device = len(prompts), teacher.num_views, views.rgb.device
        if views_each == 1:  # one random view per prompt
            views = select_views(views, (draw_uniform((count, 1), draws).to(device) * views.cameras.views).long())
        x = teacher.encode(views, noise=draw_normal((count * views_each, *teacher.input_shape), draws).to(device))
        with torch.no_grad():
            t = number(config.t_min) + draw_uniform((count,), draws) * (980 - number(config.t_min))
            t = t.long().to(device).repeat_interleave(views_each)  # [n], as x is [n, C, h, w]
            a = teacher.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * x + (1 - a).sqrt() * draw_normal(x.shape, draws).to(device)
            asked = condition_views(teacher, prompts, views, settings.negative_prompt)
            both = x_t.repeat(2, 1, 1, 1), t.repeat(2), Condition.cat([asked, asked.negative()])
            text, empty = teacher.predict_noise(*both).chunk(2)
            target = (x_t - (1 - a).sqrt() * torch.lerp(empty, text, number(settings.guidance_scale))) / a.sqrt()
            gradient = (x - target).clamp(-config.delta, config.delta) / views_each
        loss = F.huber_loss(x, target, reduction="none", delta=config.delta).reshape(count, -1).sum(1) / views_each
        return AsdResult(loss, gradient, weight=(x - target).detach().abs().flatten(1).mean(1))


if __name__ == "__main__":
    few = ["--output_dir", "runs/custom_loss", "--max_train_steps", "3", *sys.argv[1:]]
    config = load_config("toybox", ["--distillation.class", "custom_loss.RegressionLoss", *few])
    Trainer(config, build_parts(config, loss=RegressionLoss())).train()
