"""PixArt-Sigma as a teacher: a diffusion transformer that predicts noise, with a T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from prd.loading.strict import load_strict, load_tokenizer
from prd.teachers.base import Condition, TeacherConfig, TeacherOptions
from prd.teachers.loading import load_schedule, load_vae_encoder
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.pixart import MaskedT5PromptEncoder
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Count, Place, Schedule
from prd.utils.dtypes import accepts_torch_dtype


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
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> PixArtTeacher:
        """Load a `PixArtTeacherConfig`."""
        return cls.from_pretrained(
            config.path,
            dtype=dtype,
            checkpoint_vae=options.checkpoint_vae,
            view_dependent=config.view_dependent_prompts,
            pixels=config.pixels,
        )

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(
        cls,
        folder: str,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint_vae: bool = False,
        view_dependent: bool = False,
        pixels: int | None = None,
    ) -> PixArtTeacher:
        """Load a PixArt-Sigma pipeline's folder or Hub id; arguments as the settings of the same names."""
        place = expanded(folder)
        vae = load_vae_encoder(place, dtype)
        if dtype == torch.float16 and vae.config.force_upcast:
            vae.float()
        teacher = cls(
            load_strict(PixArtTransformer2DModel, place, "transformer", dtype),
            vae,
            load_schedule(place),
            load_tokenizer(AutoTokenizer, place),
            load_strict(T5EncoderModel, place, "text_encoder", dtype),
            checkpoint_vae=checkpoint_vae,
            view_dependent=view_dependent,
        )
        teacher.show(pixels)
        return teacher

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
