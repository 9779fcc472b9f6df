"""Stable Diffusion XL as a teacher: one view per prompt, as an RGB image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from prd.cameras import Cameras
from prd.loading.download import download
from prd.loading.strict import load_strict
from prd.loading.weights import read_object
from prd.teachers.base import Condition
from prd.teachers.loading import CONVERT, load_schedule
from prd.teachers.stable_diffusion import StableDiffusionTeacher, StableDiffusionTeacherConfig
from prd.text.sdxl import SdxlPromptEncoder, load_sdxl_encoder
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Count, Place
from prd.utils.dtypes import accepts_torch_dtype


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class StableDiffusionXLTeacherConfig(StableDiffusionTeacherConfig):
    """Settings of Stable Diffusion XL as a teacher; not one of the paper's teachers. It takes no ControlNet."""

    path: Place = "stabilityai/stable-diffusion-xl-base-1.0"  # Hub id or folder in diffusers' layout
    pixels: Count | None = None  # height and width of the images it is shown; null: as trained, 1024

    def __post_init__(self) -> None:
        if self.controlnet is not None:
            raise ValueError(f"controlnet={self.controlnet!r}: Stable Diffusion XL takes none here; leave it out")


class StableDiffusionXLTeacher(StableDiffusionTeacher):
    """Stable Diffusion XL or a fine-tune in the diffusers layout, epsilon or v prediction.

    As `StableDiffusionTeacher`, with two text encoders (`prd.text.sdxl`) and a pooled embedding. It is told the size of
    the picture that it is shown, as a whole one of that size; `pixels` below 1024 costs less and is less than it was
    trained for. Where the VAE's config says so (`force_upcast`) it stays in float32 in a float16 teacher.
    """

    name = "stable_diffusion_xl"
    config_class: ClassVar[type[StableDiffusionXLTeacherConfig]] = StableDiffusionXLTeacherConfig
    prompt_encoder_class: ClassVar[Any] = SdxlPromptEncoder
    own_settings: ClassVar[tuple[str, ...]] = ("pixels",)
    exact_vae = True
    zeros_for_empty: bool = True  # an empty negative prompt is no text at all: zeros, as it was trained with

    @staticmethod
    def text_widths(unet: Any, text_encoder: Any) -> tuple[int, int]:
        return text_encoder.width, unet.config.cross_attention_dim

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        """Load a Stable Diffusion XL pipeline's folder or Hub id; options as for `StableDiffusionTeacher`."""
        teacher = super().from_pretrained(folder, **options)
        teacher.zeros_for_empty = _zeros_for_empty(expanded(folder))
        return teacher

    @classmethod
    def load_parts(cls, folder: str, dtype: torch.dtype, base: str | None = None) -> dict[str, Any]:
        """U-Net, scheduler, both tokenizers and both text encoders of a folder or Hub id in the diffusers layout."""
        encoder = load_sdxl_encoder(base or folder, dtype)
        return {
            "unet": load_strict(UNet2DConditionModel, folder, "unet", dtype, remedy=CONVERT),
            "scheduler": load_schedule(folder),
            "tokenizer": encoder.tokenizers,
            "text_encoder": encoder.model,
        }

    def condition(self, prompts: Sequence[str], cameras: Cameras, negative_prompt: str = "") -> Condition:
        """Text of B images; zeros where the negative prompt is empty, if its pipeline says so."""
        condition = super().condition(prompts, cameras, negative_prompt)
        if negative_prompt or not self.zeros_for_empty:
            return condition
        return replace(condition, negative_prompt_embeds=torch.zeros_like(condition.negative_prompt_embeds))

    def run_unet(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Output of the U-Net; the last row of the text is the pooled embedding."""
        text = condition.prompt_embeds.to(self.unet.dtype)
        times = 6 * self.unet.config.addition_time_embed_dim
        pooled = self.unet.config.projection_class_embeddings_input_dim - times
        size = self.pixels
        picture = torch.tensor([size, size, 0, 0, size, size], dtype=text.dtype, device=text.device)
        pair = {"text_embeds": text[:, -1, :pooled], "time_ids": picture.expand(len(text), -1)}
        added = self.added_inputs(x_t, condition)
        return self.unet(x_t, t, encoder_hidden_states=text[:, :-1], added_cond_kwargs=pair, **added).sample


def _zeros_for_empty(folder: str) -> bool:
    """Read of its pipeline's model_index.json whether empty prompts are zeros; True where it does not say."""
    place = Path(folder) if Path(folder).is_dir() else download(folder, ["model_index.json"], {})
    index = place / "model_index.json"
    return bool(read_object(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True
