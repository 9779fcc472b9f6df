"""The base: a pretrained Stable Diffusion, taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from prd.teachers.base import PromptEncoder
from prd.toybox import asset


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion taken apart."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    encoder: PromptEncoder


def load_base(name: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None) -> Base:
    """The parts of a Stable Diffusion in diffusers' layout: a Hub id, a folder, or "toybox"."""
    path = asset("stable_diffusion") if name == "toybox" else name
    kwargs = {"revision": revision, "use_safetensors": True}
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=dtype, **kwargs)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype, **kwargs)
    scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler", revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision)
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **kwargs)
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    return Base(name, unet, vae, scheduler, PromptEncoder(tokenizer, text_encoder))
