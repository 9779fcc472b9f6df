"""Write a teacher of your own: this one has no network, and pulls renderings towards the colours that a prompt names.

    python examples/custom_teacher.py                       # three steps among the toy box's teachers
    PYTHONPATH=examples prd train --teachers.mine.class custom_teacher.ColourTeacher --teachers.mine.spread 0.2

The last line names it by its import path, as a recipe does:

    teachers: {mine: {class: custom_teacher.ColourTeacher, spread: 0.2, weight: 0.5, guidance_scale: 2}}
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.cameras import Cameras
from prd.rendering.views import Views
from prd.teachers.base import Condition, TeacherConfig, TeacherOptions, to_images
from prd.toybox.world import COLORS
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.checked_types import CHECKS, Positive


@settings(frozen=True, kw_only=True, config=CHECKS)
class ColourTeacherConfig(TeacherConfig):
    """Settings of `ColourTeacher`; `path` is unused, for nothing is loaded."""

    spread: Positive = 0.3  # standard deviation of its pixels about the colour; x lies in [-1, 1]


class ColourTeacher:
    """The optimal denoiser of images whose pixels are normally distributed about the prompt's colour."""

    config_class = ColourTeacherConfig
    name, num_views, input_shape = "colour", 1, (3, 8, 8)

    def __init__(self, spread: float = 0.3) -> None:
        self.spread = spread
        self.alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    @classmethod
    def from_config(cls, config: ColourTeacherConfig, *, options: TeacherOptions, dtype: torch.dtype) -> ColourTeacher:
        return cls(config.spread)

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:  # -> x [B, 3, 8, 8] in [-1, 1]
        if views.cameras.views != 1:
            raise ValueError(f"views={views.cameras.views}: {self.name} sees 1 view of a prompt; select it")
        return to_images(views.rgb.float(), 8, "area") * 2 - 1

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        if silent := [prompt for prompt in prompts if not named_colours(prompt)]:
            raise ValueError(f"prompt={silent[0]!r}: names no colour; name one of {', '.join(COLORS)}")
        targets = [torch.tensor(named_colours(text) or [(0.5,) * 3]).mean(0) for text in [*prompts, negative_prompt]]
        text = torch.stack(targets)[:, None] * 2 - 1  # [B + 1, 1, 3]; the empty prompt is grey
        text = text.to(cameras.fovy.device)
        return Condition(text[:-1], text[-1:].expand(len(prompts), -1, -1))

    @torch.no_grad()
    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:  # E[noise | x_t], [n, 3, 8, 8]
        a = self.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1)
        colour = condition.prompt_embeds[:, 0, :, None, None]  # [n, 3, 1, 1]
        return (1 - a).sqrt() * (x_t.float() - a.sqrt() * colour) / (a * self.spread**2 + 1 - a)


def named_colours(text: str) -> list[tuple[float, float, float]]:
    return [COLORS[word] for word in text.split() if word in COLORS]


if __name__ == "__main__":
    config = load_config("toybox", ["--output_dir", "runs/custom_teacher", "--max_train_steps", "3", *sys.argv[1:]])
    parts = build_parts(config)
    parts.teachers["mine"] = ColourTeacher(spread=0.2)  # weight 1 and guidance 7.5, unless the config has teachers.mine
    Trainer(config, parts).train()
