"""Prompt interpolation: training the shapes between two prompts (ATT3D, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import pydantic
import torch
from torch import Tensor

from prd.distillation.asd import AsdResult
from prd.teachers.base import Condition
from prd.utils.checked_types import CHECKS, Fraction, Positive

Over = Literal["embeddings", "guidance", "losses"]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKS)
class InterpolationConfig:
    """Settings of prompt interpolation: m((1 - a) c1 + a c2) for a share a of the second prompt.

    The shares (1 - a, a) are drawn from a Dirichlet distribution. The teachers' text embeddings, their guidance (the
    two predictions) or their losses (one for each prompt) are interpolated.
    """

    probability: Fraction = 0.0  # of pairing a prompt with another one
    over: Over = "embeddings"  # what is interpolated at the teachers
    concentration: Positive = 1.0  # of the Dirichlet distribution: 1 uniform, below 1 near the two prompts


@dataclass(frozen=True)
class PromptInterpolation:
    """A second prompt for each of B prompts, and its share.

    prompts  [B] the second ones
    share    [B] in [0, 1], of the second; at 0 and 1 the loss is that of one of the two alone
    over     what is interpolated: text "embeddings", "guidance" (the noise predictions), or "losses" (two losses, each
             with a timestep and a noise of its own)

    Raises ValueError for a share out of range and an unknown `over`.
    """

    prompts: Sequence[str]
    share: Tensor
    over: Over = "embeddings"

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise ValueError(f"over={self.over!r}: must be one of {', '.join(map(repr, get_args(Over)))}")
        if self.share.shape != (len(self.prompts),) or not bool(((self.share >= 0) & (self.share <= 1)).all()):
            raise ValueError(
                f"share={self.share.tolist()}: must lie in 0..1, one for each of {len(self.prompts)} prompts"
            )

    def repeat(self, count: int) -> PromptInterpolation:
        """Return the same for `count` estimates of the prompts, one after the other."""
        return PromptInterpolation(list(self.prompts) * count, self.share.repeat(count), self.over)


class ConditionLoss(Protocol):
    """Loss of a teacher for a condition, and for a second one with its share [n]; draws anew at every call."""

    def __call__(self, condition: Condition, other: tuple[Condition, Tensor] | None = None) -> AsdResult: ...


def interpolated_loss(
    interpolation: PromptInterpolation, num_views: int, first: Condition, second: Condition, loss: ConditionLoss
) -> AsdResult:
    """Loss between two conditions of n = B * num_views images, as `interpolation.over` says."""
    share = interpolation.share.to(first.prompt_embeds.device).repeat_interleave(num_views)  # [n]
    if interpolation.over == "guidance":
        return loss(first, (second, share))
    if interpolation.over == "embeddings":
        rows = share.view(-1, 1, 1).to(first.prompt_embeds)
        return loss(replace(first, prompt_embeds=torch.lerp(first.prompt_embeds, second.prompt_embeds, rows)))
    one, two = loss(first), loss(second)
    per_prompt, per_image = interpolation.share.to(one.loss), share.to(one.gradient).view(-1, 1, 1, 1)
    return AsdResult(
        torch.lerp(one.loss, two.loss, per_prompt),
        torch.lerp(one.gradient, two.gradient, per_image),
        torch.lerp(one.weight, two.weight, share.to(one.weight)),
    )
