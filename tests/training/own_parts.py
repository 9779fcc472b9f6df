"""Parts of the user's own, named in recipes by their import paths: `tests.training.own_parts.OwnTeacher`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from prd.distillation.asd import AsdConfig
from prd.distillation.distill import AsdLoss
from prd.distillation.regularizers import RegularizerConfig
from prd.generators.atom import AtomConfig, AtomModel
from prd.rendering.protocol import Rendered, Renderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.stable_diffusion import StableDiffusionTeacher, StableDiffusionTeacherConfig
from prd.utils.checked_types import CHECKS, Positive, Schedule, number


@checked(frozen=True, kw_only=True, config=CHECKS)
class OwnTeacherConfig(StableDiffusionTeacherConfig):
    """With a strength."""

    strength: Positive = 1.0  # of the gradient at the encoder's input


class OwnTeacher(StableDiffusionTeacher):
    """Stable Diffusion, of pictures scaled in their contrast."""

    name = "own"
    config_class = OwnTeacherConfig

    @classmethod
    def from_config(cls, config: OwnTeacherConfig, *, options: Any, dtype: torch.dtype) -> OwnTeacher:
        teacher = super().from_config(config, options=options, dtype=dtype)
        teacher.strength = config.strength  # type: ignore[attr-defined]
        return teacher  # type: ignore[return-value]

    def encode(self, views: Any, **options: Any) -> Tensor:
        return super().encode(replace(views, rgb=views.rgb * self.strength), **options)  # type: ignore[operator]


@dataclass(frozen=True)
class FlatConfig:
    """Settings of `FlatRenderer`, a standard dataclass."""

    height: int = 8
    width: int = 8
    brightness: Schedule = 1.0


class FlatRenderer(Renderer):
    """The volume renderer at a size of its own, brightened."""

    config_class: ClassVar[type] = FlatConfig

    def __init__(self, config: FlatConfig) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: FlatConfig) -> FlatRenderer:
        return cls(config)

    def render(self, field: Any, cameras: Any, size: Any, background: Any, draws: Any = None) -> Rendered:
        volume = VolumeRenderer(VolumeConfig(num_samples=8, num_importance_samples=0))
        rendered = volume.render(field, cameras, size, background)
        brightness = number(self.config.brightness)
        views = replace(rendered.views, rgb=rendered.views.rgb * brightness)
        return replace(rendered, views=views, stats={"brightness": torch.tensor(brightness)})


@checked(frozen=True, kw_only=True, config=CHECKS)
class OwnLossConfig(AsdConfig):
    """With a factor that moves."""

    factor: Schedule = (1.0, 3.0)


class OwnLoss(AsdLoss):
    """`AsdLoss` times a factor."""

    config_class = OwnLossConfig

    def __call__(self, *args: Any, config: OwnLossConfig, **options: Any) -> Any:
        result = super().__call__(*args, config=config, **options)
        return replace(result, loss=number(config.factor) * result.loss)


@checked(frozen=True, kw_only=True, config=CHECKS)
class TowardsConfig(RegularizerConfig):
    """With the opacity to pull towards."""

    opacity: float = 0.5


class Towards:
    """The squared difference of the mean opacity from a number."""

    config_class = TowardsConfig

    def __init__(self, opacity: float) -> None:
        self.opacity = opacity

    @classmethod
    def from_config(cls, config: TowardsConfig) -> Towards:
        return cls(config.opacity)

    def __call__(self, rendered: Rendered) -> Tensor:
        return (rendered.views.opacity.mean() - self.opacity) ** 2


def brightest(rendered: Rendered) -> Tensor:
    """The largest value of a picture: a regulariser that is a function."""
    return rendered.views.rgb.max()


class OwnModel(AtomModel):
    """AToM by another name."""

    config_class = AtomConfig


class Half:
    """No teacher: it lacks `condition` and `predict_noise`."""

    config_class = StableDiffusionTeacherConfig

    @classmethod
    def from_config(cls, config: Any, *, options: Any, dtype: torch.dtype) -> Half:
        return cls()

    def encode(self, views: Any) -> Tensor:
        return views.rgb


class Unsettled(StableDiffusionTeacher):
    """Its settings are no teacher's."""

    config_class = FlatConfig  # type: ignore[assignment]
