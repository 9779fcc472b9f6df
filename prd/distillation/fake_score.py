"""Fake scores: noise predictors of the renderings themselves, which VSD and DMD set against the teachers.

    VSD   ProlificDreamer, Wang et al. 2023, arXiv:2305.16213, Algorithm 1
    DMD   Distribution Matching Distillation, Yin et al. 2023, arXiv:2311.18828, section 3.2

A fake score is a teacher's U-Net with a LoRA of its own. The loss notes the renderings that it is asked about; after
the student's update the LoRA is trained to denoise them, by timesteps and noises of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pydantic
import torch
from torch import Tensor, nn

from prd.distillation.draws import draw_normal, draw_uniform
from prd.distillation.timesteps import last_timestep, sample_timesteps
from prd.teachers.base import Condition, UNetTeacher, target_of
from prd.teachers.offload import resident
from prd.utils.checked_types import CHECKS, Count, PositiveSchedule

BACKWARD = 2  # passes that the backward pass of an image costs


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKS)
class FakeScoreConfig:
    """Settings of the fake scores, one for each teacher; asked for by `reference: fake`."""

    rank: Count = 16  # of the LoRA on the U-Net's attention
    lr: PositiveSchedule = 1e-3  # of its AdamW
    updates_per_step: Count = 1  # each on all renderings of the step, with new timesteps and noises
    teachers: tuple[str, ...] | None = None  # that have one, null: all; the others' reference is "shifted"

    @pydantic.field_validator("teachers")
    @classmethod
    def _some(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names == ():
            raise ValueError("teachers=[]: must name at least one teacher, or be null for all")
        return names


@dataclass(frozen=True)
class Seen:
    """Renderings that a fake score is to be trained on.

    x          [n, C, h, w] without gradient, n = B * num_views
    condition  of the n images
    draws      one generator per prompt, or one for all; every use draws on
    """

    x: Tensor
    condition: Condition
    draws: Sequence[torch.Generator]


@dataclass
class FakeScore:
    """Noise predictor of the renderings that a teacher is shown.

    teacher  stays as it is
    unet     the teacher's U-Net with trainable weights beside the frozen ones, which are shared with it
    """

    teacher: UNetTeacher
    unet: nn.Module
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.teacher.with_unet(self.unet)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable weights by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def squared_error(self, seen: Seen) -> Tensor:
        """Squared error [n, C, h, w] of the prediction at random timesteps, one per prompt, in what the U-Net predicts.

        Timesteps are uniform over all that have a signal. Differentiable in the trainable weights.
        """
        x, model = seen.x, self.model
        t = sample_timesteps(draw_uniform((len(x) // model.num_views,), seen.draws), 0, last_timestep(model) + 1)
        t = t.repeat_interleave(model.num_views).to(x.device)
        noise = draw_normal(x.shape, seen.draws).to(x.device)
        alpha_bar = model.alphas_cumprod.to(x.device)[t]
        a = alpha_bar.view(-1, 1, 1, 1)
        predicted = model.predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, seen.condition)
        return (predicted - target_of(x, noise, alpha_bar, model.prediction_type)).square()

    def accumulate(self) -> float:
        """Set the gradient of the mean squared error over all renderings seen; returns that mean.

        The graph of one call of the loss exists at a time. It is the sum whose gradient goes through the U-Net: that of
        the mean is too small for half precision.
        """
        parameters, total = self.named_parameters().values(), 0.0
        for parameter in parameters:
            parameter.grad = None
        with resident(self.teacher, self.seen[0].x.device):
            for seen in self.seen:
                error = self.squared_error(seen).sum()
                error.backward()
                total += float(error.detach())
                self.model.passes += BACKWARD * len(seen.x)
        count = sum(seen.x.numel() for seen in self.seen)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= count
        return total / count


@dataclass(frozen=True)
class FakeReference:
    """A fake score for one call of the loss; `draws` are for its training on what this call shows it."""

    score: FakeScore
    draws: Sequence[torch.Generator]

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon [n, C, h, w], float32, without gradient, for x_t at timesteps t [n]."""
        return self.score.model.predict_noise(x_t, t, condition)

    def observe(self, x: Tensor, condition: Condition) -> None:
        """Note renderings x [n, C, h, w] and their condition, to be trained on after the step."""
        self.score.seen.append(Seen(x.detach(), condition, self.draws))
