"""DeepFloyd IF, its first stage, as a teacher: 64 x 64 pixels and a T5 text encoder (the prior of AToM)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from prd.rendering.views import Views
from prd.teachers.base import TeacherConfig, TeacherOptions, UNetTeacher, to_images
from prd.text.encoders import T5PromptEncoder
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Place, Schedule
from prd.utils.dtypes import accepts_torch_dtype


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class DeepFloydTeacherConfig(TeacherConfig):
    """Settings of DeepFloyd IF's first stage, the prior of AToM and ATT3D-IF; not one of the paper's teachers."""

    enabled: bool = False  # True: loaded
    path: Place = "DeepFloyd/IF-I-XL-v1.0"  # Hub id or folder in diffusers' layout
    guidance_scale: Schedule = 20.0  # classifier-free guidance
    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"


class DeepFloydTeacher(UNetTeacher):
    """IF-I-M, -L or -XL in the diffusers layout: one view per prompt, as pixels.

    x is the rendering's colours in [-1, 1], [B, 3, 64, 64]: there is no VAE. The U-Net puts out epsilon and a learned
    variance in 6 channels; score distillation needs the first three.
    """

    name = "deepfloyd"
    num_views = 1
    config_class: ClassVar[type[TeacherConfig]] = DeepFloydTeacherConfig
    tokenizer_class = AutoTokenizer
    text_encoder_class = T5EncoderModel
    prompt_encoder_class = T5PromptEncoder

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> DeepFloydTeacher:
        """Load a `DeepFloydTeacherConfig`."""
        return cls.from_pretrained(config.path, dtype=dtype, view_dependent=config.view_dependent_prompts)

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(
        cls, folder: str, *, dtype: torch.dtype = torch.float32, view_dependent: bool = False
    ) -> DeepFloydTeacher:
        """Load a folder or Hub id such as DeepFloyd/IF-I-XL-v1.0 (its licence must be accepted there)."""
        return cls(view_dependent=view_dependent, **cls.load_parts(expanded(folder), dtype))

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        """Pixels [B*V, 3, h, w] in [-1, 1]; deterministic, `noise` is ignored."""
        self.check_views(views.cameras.views)
        return to_images(views.rgb.float(), self.image_size, "area") * 2 - 1
