"""Stable Diffusion held to the rendering's depth by a ControlNet: LATTE3D's second stage (arXiv 2403.15385)."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.loading.strict import load_strict
from prd.rendering.views import Views
from prd.teachers.base import Condition, to_images
from prd.teachers.loading import load_vae_encoder
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.utils.arguments import expanded
from prd.utils.dtypes import accepts_torch_dtype


class DepthControlTeacher(StableDiffusionTeacher):
    """A Stable Diffusion that takes the rendering's depth through a ControlNet in every pass (arXiv 2302.05543).

    The control image is the disparity, stretched to [0, 1] in each image (near is bright, the furthest pixel 0), at
    the pixels of the VAE; no gradient flows through it. `Views.disparity` is linear in depth; depth ControlNets were
    trained on estimates of inverse depth, which order pixels alike but curve otherwise.

    controlnet_scale  factor of what the ControlNet adds to the U-Net
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        controlnet: ControlNetModel,
        *,
        controlnet_scale: float = 1.0,
        checkpoint_vae: bool = False,
        view_dependent: bool = False,
    ) -> None:
        super().__init__(
            unet,
            vae,
            scheduler,
            tokenizer,
            text_encoder,
            checkpoint_vae=checkpoint_vae,
            view_dependent=view_dependent,
        )
        for key in ("cross_attention_dim", "block_out_channels", "in_channels"):
            theirs, ours = controlnet.config[key], unet.config[key]
            if (tuple(theirs) if isinstance(theirs, list | tuple) else theirs) != (
                tuple(ours) if isinstance(ours, list | tuple) else ours
            ):
                raise ValueError(f"controlnet: its {key} {theirs} is not the U-Net's {ours}; it is of another base")
        self.controlnet, self.controlnet_scale = controlnet, controlnet_scale
        self.freeze()

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str,
        *,
        controlnet: str,
        controlnet_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        checkpoint_vae: bool = False,
        view_dependent: bool = False,
    ) -> DepthControlTeacher:
        """Load a Stable Diffusion and the depth ControlNet made for it, each a folder or Hub id."""
        return cls(
            vae=load_vae_encoder(expanded(folder), dtype),
            controlnet=load_strict(ControlNetModel, expanded(controlnet), None, dtype),
            controlnet_scale=controlnet_scale,
            checkpoint_vae=checkpoint_vae,
            view_dependent=view_dependent,
            **cls.load_parts(expanded(folder), dtype),
        )

    @torch.no_grad()
    def condition_on(self, condition: Condition, views: Views) -> Condition:
        """Return `condition` with the renderings' depth as the ControlNet's image [n, 3, H, W] in [0, 1]."""
        return replace(condition, control=control_images(to_images(views.disparity, self.pixels)))

    def run_unet(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The U-Net's output with the ControlNet's residuals; ValueError without a control image."""
        if condition.control is None:
            raise ValueError("condition: has no control image; give the renderings to condition_on(condition, views)")
        text, control = condition.prompt_embeds.to(x_t.dtype), condition.control.to(x_t)
        return run_controlled(self.unet, self.controlnet, x_t, t, text, control, self.controlnet_scale)


def control_images(disparity: Tensor) -> Tensor:
    """Input images [n, 3, H, W] of a depth ControlNet from disparities [n, 1, H, W]: each stretched to [0, 1], grey."""
    disparity = disparity.float()
    low, high = disparity.amin(dim=(1, 2, 3), keepdim=True), disparity.amax(dim=(1, 2, 3), keepdim=True)
    return ((disparity - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)


def run_controlled(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    x_t: Tensor,
    t: Tensor | int,
    text: Tensor,
    control: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """The U-Net's output [n, C, h, w] with `scale` times the ControlNet's residuals (arXiv 2302.05543, Eq. 2).

    x_t [n, C, h, w], t [n] or a scalar, text [n, L, Ct], control [n, 3, H, W] in [0, 1].
    """
    down, middle = controlnet(
        x_t,
        t,
        encoder_hidden_states=text,
        controlnet_cond=control,
        conditioning_scale=scale,
        return_dict=False,
    )
    return unet(
        x_t,
        t,
        encoder_hidden_states=text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
