"""Stable Diffusion as a teacher: one view per prompt, as an RGB image."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.rendering.views import Views
from prd.teachers.base import TeacherConfig, TeacherOptions, UNetTeacher, to_images
from prd.teachers.loading import load_vae_encoder
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Place, Positive
from prd.utils.dtypes import accepts_torch_dtype


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class StableDiffusionTeacherConfig(TeacherConfig):
    """Settings of Stable Diffusion as a teacher: one view per prompt, optionally with a depth ControlNet."""

    view_dependent_prompts: bool = False  # append "front view", "side view", "back view" or "overhead view"
    controlnet: Place | None = None  # Hub id or folder of a depth ControlNet made for it; null: none
    controlnet_scale: Positive = 1.0  # of what the ControlNet adds


class StableDiffusionTeacher(UNetTeacher):
    """Any Stable Diffusion in the diffusers layout, epsilon or v prediction.

    x is the VAE latent of the rendering's colours, [B, 4, h, w], times the VAE's scaling factor; renderings are resized
    bilinearly to the size that the VAE encodes to the U-Net's latents (512 for Stable Diffusion 2.1-base).
    `checkpoint_vae` recomputes the encoder in the backward pass instead of keeping its activations; `view_dependent`
    appends the side from which the rendering is seen to its prompt.
    """

    name = "stable_diffusion"
    num_views = 1
    own_settings: ClassVar[tuple[str, ...]] = ()  # of its config that `from_pretrained` takes under their names
    exact_vae: ClassVar[bool] = False  # a VAE whose config says `force_upcast` stays float32 in a float16 teacher
    shown_pixels: int | None = None  # of the images it is shown, where they are not of the size it was trained with
    config_class: ClassVar[type[TeacherConfig]] = StableDiffusionTeacherConfig

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        *,
        checkpoint_vae: bool = False,
        view_dependent: bool = False,
    ) -> None:
        super().__init__(unet, scheduler, tokenizer, text_encoder, view_dependent=view_dependent)
        if vae.config.latent_channels != unet.config.in_channels:
            raise ValueError(
                f"vae: its {vae.config.latent_channels} latent channels are not the U-Net's "
                f"{unet.config.in_channels} input channels; load both from the same folder"
            )
        self.vae = vae
        if checkpoint_vae:
            vae.enable_gradient_checkpointing()  # of every block on its own, so that one block's activations live
        self.freeze()

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> StableDiffusionTeacher:
        """Load a `StableDiffusionTeacherConfig`, a `DepthControlTeacher` if it names a ControlNet."""
        settings = {
            "dtype": dtype,
            "checkpoint_vae": options.checkpoint_vae,
            "view_dependent": config.view_dependent_prompts,
            **{name: getattr(config, name) for name in cls.own_settings},
        }
        if getattr(config, "controlnet", None) is None:
            return cls.from_pretrained(config.path, **settings)
        from prd.teachers.depth_control import DepthControlTeacher  # which derives from this class

        return DepthControlTeacher.from_pretrained(
            config.path, controlnet=config.controlnet, controlnet_scale=config.controlnet_scale, **settings
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
        **own: Any,
    ) -> Self:
        """Load a pipeline's folder or Hub id; pixels: as for `show`; own: further arguments of `load_parts`."""
        place = expanded(folder)
        parts = cls.load_parts(place, dtype, **own)
        vae = load_vae_encoder(place, dtype)
        if cls.exact_vae and dtype == torch.float16 and vae.config.force_upcast:
            vae.float()
        teacher = cls(vae=vae, checkpoint_vae=checkpoint_vae, view_dependent=view_dependent, **parts)
        teacher.show(pixels)
        return teacher

    def show(self, pixels: int | None) -> None:
        """Show it images of this height and width, None: as trained; ValueError for a size that it cannot take."""
        self.shown_pixels = None
        step = self.latent_step * self.scale
        if pixels is not None and (pixels % step or pixels > self.pixels):
            raise ValueError(f"pixels={pixels}: {self.name} takes a multiple of {step} up to {self.pixels}")
        self.shown_pixels = pixels

    @property
    def latent_step(self) -> int:
        """Number of which the height of a latent must be a multiple."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def scale(self) -> int:
        """Pixels of an image beside each pixel of its latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Height and width of x."""
        return super().image_size if self.shown_pixels is None else self.shown_pixels // self.scale

    @property
    def pixels(self) -> int:
        """Height and width in pixels of the images that the VAE encodes to the U-Net's latents."""
        return self.image_size * self.scale

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        """Latents [B*V, 4, h, w] of the colours; see `Teacher.encode`."""
        self.check_views(views.cameras.views)
        images = to_images(views.rgb, self.pixels) * 2 - 1
        return encode_latents(self.vae, images, noise=noise)


def encode_latents(vae: AutoencoderKL, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Scaled latents [n, C, h, w], float32, of images [n, 3, H, W] in [-1, 1], differentiable in the images.

    A sample of the posterior with `noise` (standard normal [n, C, h, w]), its mean without. Raises ValueError for noise
    of another shape.
    """
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    if noise is not None:
        if noise.shape != mean.shape:
            raise ValueError(f"noise={tuple(noise.shape)}: must have the latents' shape {tuple(mean.shape)}")
        mean = mean + std * noise.to(mean)
    if vae.config.shift_factor is not None:
        mean = mean - vae.config.shift_factor
    return mean * vae.config.scaling_factor
