"""PixArt-Sigma as a teacher: a diffusion transformer that predicts noise, with a T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from prd.loading.strict import load_strict, load_tokenizer
from prd.teachers.base import Condition, TeacherConfig
from prd.teachers.loading import load_schedule
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.pixart import MaskedT5PromptEncoder
from prd.utils.checked_types import CHECKS, Count, Place, Schedule


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class PixArtTeacherConfig(TeacherConfig):
    """Settings of PixArt-Sigma as a teacher; not one of the paper's teachers."""

    path: Place = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"  # Hub id or folder in diffusers' layout
    guidance_scale: Schedule = 4.5  # classifier-free guidance
    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"
    pixels: Count | None = None  # height and width of the images it is shown; null: as trained, 1024


class PixArtTeacher(StableDiffusionTeacher):
    """PixArt-Sigma in the diffusers layout; `unet` is its transformer, whose learned variance is dropped.

    x is the VAE latent of the rendering's colours, [B, 4, h, w]. Where the VAE's config says so (`force_upcast`) it
    stays in float32 in a float16 teacher. Raises ValueError for a transformer that is told sizes, as PixArt-alpha's is.
    """

    name = "pixart"
    config_class: ClassVar[Any] = PixArtTeacherConfig
    prompt_encoder_class: ClassVar[Any] = MaskedT5PromptEncoder
    own_settings = ("pixels",)
    exact_vae = True

    def __init__(
        self, unet: PixArtTransformer2DModel, vae: AutoencoderKL, scheduler: Any, *parts: Any, **options: bool
    ) -> None:
        if unet.config.use_additional_conditions:
            raise ValueError("transformer: is told sizes, as PixArt-alpha's is; give PixArt-Sigma")
        network: Any = unet
        super().__init__(network, vae, scheduler, *parts, **options)

    @staticmethod
    def text_widths(unet: Any, text_encoder: Any) -> tuple[int, int]:
        return text_encoder.config.d_model, unet.config.caption_channels

    @classmethod
    def load_parts(cls, folder: str, dtype: torch.dtype, base: str | None = None) -> dict[str, Any]:
        """Transformer, schedule, tokenizer and T5 of a folder or Hub id in the diffusers layout."""
        text = base or folder
        return {
            "unet": load_strict(PixArtTransformer2DModel, folder, "transformer", dtype),
            "scheduler": load_schedule(folder),
            "tokenizer": load_tokenizer(AutoTokenizer, text),
            "text_encoder": load_strict(T5EncoderModel, text, "text_encoder", dtype),
        }

    @property
    def latent_step(self) -> int:
        return self.unet.config.patch_size

    def run_unet(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Output of the transformer [n, 8, h, w]; the last row of the text is the mask of its tokens."""
        text = condition.prompt_embeds.to(self.unet.dtype)
        tokens, mask = text[:, :-1], text[:, -1, : text.shape[1] - 1]
        sizes = {"resolution": None, "aspect_ratio": None}
        return self.unet(
            x_t, encoder_hidden_states=tokens, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=sizes
        ).sample
