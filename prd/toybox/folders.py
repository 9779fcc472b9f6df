"""The toy box's models in folders: diffusers' layout, fp16 safetensors, below one folder of assets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from prd.errors import ConfigError
from prd.toybox.models import make_scheduler
from prd.utils.files import write_atomic


def load_vae(assets: Path, device: str, base: str = "stable_diffusion") -> AutoencoderKL:
    """Load the frozen autoencoder of a base in float32."""
    vae = AutoencoderKL.from_pretrained(assets / base, subfolder="vae", dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_stable_diffusion(
    assets: Path, device: str
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTokenizer, CLIPTextModel]:
    """Load the Stable Diffusion's frozen parts in float32: autoencoder, U-Net, tokenizer and text encoder.

    Raises ConfigError if its U-Net predicts something else than what the toy box's models are trained to.
    """
    folder, wanted = assets / "stable_diffusion", make_scheduler().config.prediction_type
    found = DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.prediction_type
    if found != wanted:
        raise ConfigError(f"{folder}: its U-Net predicts {found!r}, not {wanted!r}; train stage stable_diffusion first")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    unet, encoder = (module.to(device).eval().requires_grad_(False) for module in (unet, encoder))
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return load_vae(assets, device), unet, tokenizer, encoder


def save_stable_diffusion(
    assets: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Save a Stable Diffusion as its pipeline; the modules are in half precision afterwards."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(assets / "stable_diffusion")
    for config in (assets / "stable_diffusion").glob("*/config.json"):
        _forget_place(config)


def save_mvdream(assets: Path, unet: UNet2DConditionModel) -> None:
    """Save an MVDream, which shares the Stable Diffusion's autoencoder and text encoder."""
    shared = {"base": "../stable_diffusion", "shares_vae": True}
    _save(assets / "mvdream", {"unet": unet}, {"num_views": 4, "camera_encoding": "fourier", **shared})


def save_richdreamer(
    assets: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Save a RichDreamer with its own text encoder."""
    images = {"image_range": [-1.0, 1.0], "normal_background": [0.5, 0.5, 0.5], "resize": "area"}
    settings = {"num_views": 4, "camera_encoding": "fourier", **images}
    _save(assets / "richdreamer", {"unet": unet, "text_encoder": text_encoder}, settings)
    tokenizer.save_pretrained(assets / "richdreamer" / "tokenizer")


def _forget_place(config: Path) -> None:
    """Take the folder that a model was loaded from out of its config: it is of one machine."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    write_atomic(config, json.dumps(values, indent=2) + "\n")


def _save(folder: Path, modules: dict[str, ModelMixin | PreTrainedModel], settings: dict) -> None:
    """A teacher's modules, which are in half precision afterwards, its noise schedule and teacher_config.json."""
    for name, module in modules.items():
        module.half().save_pretrained(folder / name)
    make_scheduler().save_pretrained(folder / "scheduler")
    (folder / "teacher_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
