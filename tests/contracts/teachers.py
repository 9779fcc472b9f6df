"""The teachers that keep the contract of `Teacher`, each saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from examples.custom_teacher import ColourTeacher
from prd.cameras import Cameras
from prd.rendering.views import Views
from prd.teachers import (
    Condition,
    DeepFloydTeacher,
    MVAdapterTeacher,
    MVAdapterXLTeacher,
    MVDreamTeacher,
    PixArtTeacher,
    RichDreamerTeacher,
    StableDiffusion3Teacher,
    StableDiffusionTeacher,
    StableDiffusionXLTeacher,
    TeacherConfig,
    TeacherOptions,
)
from prd.teachers.base import to_images
from prd.teachers.multiview import own_cameras
from prd.utils.checked_types import CHECKS, Positive
from tests.teachers.tiny import random_views, save_controlnet, save_deepfloyd, save_teacher
from tests.teachers.tiny_large import save_pixart, save_sd3, save_sdxl
from tests.teachers.tiny_mv_adapter import save_mv_adapter, save_mv_adapter_xl

B, V, T = 2, 4, 1000
PROMPTS = ["a red b", "c blue"]


@settings(frozen=True, kw_only=True, config=CHECKS)
class GreyConfig(TeacherConfig):
    """Settings of `GreyTeacher`."""

    brightness: Positive = 0.05  # of the grey per letter of a prompt


class GreyTeacher:
    """A teacher of one's own without a network: the exact denoiser of images of one grey, told by the prompt.

    Viewed from above the grey is brighter.
    """

    config_class: ClassVar[type] = GreyConfig
    name, num_views, input_shape = "grey", 1, (3, 4, 4)

    def __init__(self, brightness: float) -> None:
        self.brightness = brightness
        self.alphas_cumprod = torch.linspace(0.999, 0.001, T)

    @classmethod
    def from_config(cls, config: GreyConfig, *, options: TeacherOptions, dtype: torch.dtype) -> GreyTeacher:
        return cls(config.brightness)

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        if views.cameras.views != 1:
            raise ValueError(f"views={views.cameras.views}: grey sees 1 view of a prompt; select it")
        return to_images(views.rgb.float(), 4) * 2 - 1

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        text = torch.tensor([[[self.brightness * len(prompt)]] for prompt in [*prompts, negative_prompt]])
        return Condition(text[:-1], text[-1:].expand(len(prompts), -1, -1), cameras.elevation.reshape(-1, 1))

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        assert condition.camera is not None
        grey = condition.prompt_embeds.view(-1, 1, 1, 1) + 0.1 * condition.camera.view(-1, 1, 1, 1)
        return ((x_t - a.sqrt() * grey) / (1 - a).sqrt()).detach().float()


def _depth_control(folder: Path) -> dict[str, Any]:
    save_teacher(folder / "sd", "stable_diffusion")
    control = save_controlnet(folder / "control", folder / "sd" / "unet")
    return {"path": str(folder / "sd"), "controlnet": str(control)}


@dataclass(frozen=True)
class Member:
    """One teacher: its class, its settings for files saved in a folder, and what it looks at.

    pulls    the renderings that it is differentiable in
    bounded  x lies in [-1, 1]
    cameras  its prediction depends on the camera
    """

    kind: type[Any]
    save: Callable[[Path], dict[str, Any]]
    pulls: tuple[str, ...] = ("rgb",)
    bounded: bool = False
    cameras: bool = False


def _saved(kind: str, prediction: str = "epsilon", **others: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"path": str(save_teacher(folder, kind, prediction)), **others}


MEMBERS: dict[str, Member] = {
    "stable_diffusion": Member(StableDiffusionTeacher, _saved("stable_diffusion")),
    "stable_diffusion_v": Member(StableDiffusionTeacher, _saved("stable_diffusion", "v_prediction")),
    "stable_diffusion_sample": Member(StableDiffusionTeacher, _saved("stable_diffusion", "sample")),
    "stable_diffusion_sides": Member(
        StableDiffusionTeacher, _saved("stable_diffusion", view_dependent_prompts=True), cameras=True
    ),
    "depth_control": Member(StableDiffusionTeacher, _depth_control),
    "mvdream": Member(MVDreamTeacher, _saved("mvdream"), cameras=True),
    "richdreamer": Member(
        RichDreamerTeacher,
        _saved("richdreamer"),
        pulls=("disparity", "normal", "opacity"),
        bounded=True,
        cameras=True,
    ),
    "deepfloyd": Member(DeepFloydTeacher, lambda folder: {"path": str(save_deepfloyd(folder))}, bounded=True),
    "stable_diffusion_xl": Member(StableDiffusionXLTeacher, lambda folder: {"path": str(save_sdxl(folder))}),
    "stable_diffusion_3": Member(StableDiffusion3Teacher, lambda folder: {"path": str(save_sd3(folder))}),
    "pixart": Member(PixArtTeacher, lambda folder: {"path": str(save_pixart(folder))}),
    "mv_adapter": Member(MVAdapterTeacher, save_mv_adapter, cameras=True),
    "mv_adapter_xl": Member(MVAdapterXLTeacher, save_mv_adapter_xl, cameras=True),
    "own": Member(GreyTeacher, lambda folder: {"brightness": 0.1}, bounded=True, cameras=True),
    "custom": Member(ColourTeacher, lambda folder: {"spread": 0.2}, bounded=True),
}


@dataclass(frozen=True)
class Made:
    """A teacher with how it was made."""

    member: Member
    config: TeacherConfig
    teacher: Any

    def again(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """The same teacher anew."""
        return self.member.kind.from_config(self.config, options=TeacherOptions(**options), dtype=dtype)

    def condition(self, views: Views, prompts: Sequence[str] = PROMPTS, negative: str = "d") -> Condition:
        """Its condition, with what it takes from the views."""
        condition = self.teacher.condition(prompts, views.cameras, negative)
        return self.teacher.condition_on(condition, views) if hasattr(self.teacher, "condition_on") else condition

    def views(self, batch: int = B, **kinds: Any) -> Views:
        """Renderings of as many views as it sees together, from its own cameras if it has some."""
        views = random_views(batch, self.teacher.num_views, **kinds)
        cameras = own_cameras(self.teacher)
        return views if cameras is None else replace(views, cameras=cameras.sample(torch.zeros(batch, 3)))

    def rendered(self) -> Views:
        """Renderings as training has them: of several views, also for a teacher of one."""
        return random_views(B, V) if own_cameras(self.teacher) is None else self.views()

    def noisy(self, batch: int = B, seed: int = 0) -> Tensor:
        """A standard normal x_t."""
        shape = (batch * self.teacher.num_views, *self.teacher.input_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
