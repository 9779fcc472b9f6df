"""MVDream as a teacher: four views per prompt together, each with its camera (arXiv 2308.16512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.teachers.base import TeacherConfig, TeacherOptions
from prd.teachers.loading import load_vae_encoder, read_config, shared_folder
from prd.teachers.multiview import CameraEncoding, camera_vector, check_settings, set_joint_attention
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS
from prd.utils.dtypes import accepts_torch_dtype

NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)  # of the published recipe, for MVDream and RichDreamer


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class MVDreamTeacherConfig(TeacherConfig):
    """Settings of MVDream as a teacher: all views of a prompt jointly, RGB."""


@dataclass(frozen=True)
class MVDreamConfig:
    """Settings of a multi-view colour model, in `teacher_config.json`; the defaults are MVDream's."""

    num_views: int = 4  # views that attend to each other
    camera_encoding: CameraEncoding = "mvdream"  # how a camera becomes the U-Net's class_labels
    base: str | None = None  # the Stable Diffusion whose text encoder it shares: "../folder" or Hub id, None its own
    shares_vae: bool = False  # whether the VAE is that of `base` too

    def __post_init__(self) -> None:
        check_settings(self.num_views, self.camera_encoding, self.base)
        if not isinstance(self.shares_vae, bool) or (self.shares_vae and self.base is None):
            raise ValueError(
                f"shares_vae={self.shares_vae!r}, base={self.base!r}: must be a boolean, false without base"
            )


class MVDreamTeacher(StableDiffusionTeacher):
    """A Stable Diffusion whose self-attention spans `num_views` views and whose U-Net takes each view's camera.

    x is the VAE latents of the colours [B*V, 4, h, w] (256 pixels, 32 latents for MVDream).
    """

    name = "mvdream"
    config_class: ClassVar[type[TeacherConfig]] = MVDreamTeacherConfig
    takes_cameras = True

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        config: MVDreamConfig,
        *,
        checkpoint_vae: bool = False,
    ) -> None:
        super().__init__(unet, vae, scheduler, tokenizer, text_encoder, checkpoint_vae=checkpoint_vae)
        self.config, self.num_views = config, config.num_views
        set_joint_attention(unet, config.num_views)

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> MVDreamTeacher:
        """Load a `MVDreamTeacherConfig`."""
        return cls.from_pretrained(config.path, dtype=dtype, checkpoint_vae=options.checkpoint_vae)

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint_vae: bool = False,
        config: MVDreamConfig | None = None,
    ) -> MVDreamTeacher:
        """Load a folder or Hub id in the diffusers layout with a `teacher_config.json` (or `config` in its place)."""
        config = config or read_config(expanded(folder), MVDreamConfig)
        base = shared_folder(expanded(folder), config.base)
        parts = cls.load_parts(expanded(folder), dtype, base)
        vae = load_vae_encoder(base if base and config.shares_vae else expanded(folder), dtype)
        return cls(vae=vae, config=config, checkpoint_vae=checkpoint_vae, **parts)

    def camera_input(self, cameras: Cameras) -> Tensor:
        """Camera vectors [B*V, 16]."""
        return camera_vector(cameras, self.config.camera_encoding)
