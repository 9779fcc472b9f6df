"""Protocol of distillation losses; a recipe names one with `distillation: {class: my_module.MyLoss}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch

from prd.distillation.asd import AsdResult
from prd.distillation.interpolation import PromptInterpolation
from prd.rendering.views import Views
from prd.teachers.base import Teacher, TeacherConfig


@runtime_checkable
class DistillationLoss(Protocol):
    """Loss of a teacher at the renderings of B prompts. `prd.distillation.distill.AsdLoss` is the default one.

    config_class  a dataclass of its settings (pydantic or standard); fields annotated `Schedule` move with the step
    """

    config_class: ClassVar[Any]

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Make the loss once per run. `config` may still hold schedules; a call is given their values at its step."""
        ...

    def __call__(
        self,
        teacher: Teacher,
        views: Views,
        prompts: Sequence[str],
        *,
        settings: TeacherConfig,
        config: Any,
        generator: torch.Generator | Sequence[torch.Generator],
        interpolation: PromptInterpolation | None = None,
    ) -> AsdResult:
        """Loss [B], differentiable in the views, with its gradient at the teacher's input and its weight.

        settings       the teacher's at this step: guidance_scale, eta, negative_prompt (its weight is the caller's)
        config         an instance of `config_class` at this step, every schedule a number
        generator      source of all randomness: one for the batch, or one per prompt
        interpolation  second prompts; raise ValueError if the loss cannot use them
        """
        ...
