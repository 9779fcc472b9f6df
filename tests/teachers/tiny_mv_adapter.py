"""A tiny MV-Adapter on a tiny Stable Diffusion, with weights and inputs that are computed: no recording holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tests.teachers.tiny import TEXT_WIDTH, save_teacher
from tests.teachers.tiny_large import POOLED, make_sdxl

VIEWS = 6
ATTENTION = {
    "to_q_mv.weight": 2,
    "to_k_mv.weight": 2,
    "to_v_mv.weight": 2,
    "to_out_mv.0.weight": 2,
    "to_out_mv.0.bias": 1,
}
XL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16 + 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}


def numbers(shape: Iterable[int], seed: int) -> Tensor:
    """Numbers in [-1, 1] that look random and are exactly the same anywhere: integers modulo a prime."""
    size = tuple(shape)
    i = torch.arange(math.prod(size), dtype=torch.int64) + 7919 * seed
    return ((i * i * 31 + i * 17 + 5) % 10007).float().view(size) / 5003 - 1


def computed(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Weights for the names and shapes of a state dict."""
    made = {}
    for seed, name in enumerate(sorted(shapes)):
        value = numbers(shapes[name], seed)
        if value.ndim > 1:
            made[name] = value * (3 / value[0].numel()) ** 0.5  # keeps the variance
        else:
            made[name] = 0.2 * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return made


def adapter_shapes(unet: UNet2DConditionModel, encoder: T2IAdapter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's file for a U-Net."""
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            shapes |= {f"{name}.{key}": (width,) * axes for key, axes in ATTENTION.items()}
    return shapes


def _with_computed_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.load_state_dict(computed({name: value.shape for name, value in unet.state_dict().items()}))
    return unet


def save_mv_adapter(folder: Path) -> dict[str, Any]:
    """Save a base like Stable Diffusion 2.1 and an adapter for it; returns where, by the teacher's settings."""
    base = save_teacher(folder / "base", "stable_diffusion")
    unet = _with_computed_weights(UNet2DConditionModel.from_pretrained(base / "unet"))
    unet.save_pretrained(base / "unet")
    encoder = T2IAdapter(6, list(unet.config.block_out_channels), 1, 8)
    file = folder / "mvadapter_t2mv_sd21.safetensors"
    save_file(computed(adapter_shapes(unet, encoder)), file)
    return {"path": str(base), "adapter": str(file)}


def save_mv_adapter_xl(folder: Path) -> dict[str, Any]:
    """Save a base like Stable Diffusion XL and an adapter for it; returns where, by the teacher's settings."""
    pipeline = make_sdxl(folder)
    pipeline.unet = _with_computed_weights(UNet2DConditionModel(**XL_UNET))
    pipeline.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline.save_pretrained(folder / "base")
    encoder = T2IAdapter(6, [8, 16, 16, 16], 1, 16, "full_adapter_xl")
    file = folder / "mvadapter_t2mv_sdxl.safetensors"
    save_file(computed(adapter_shapes(pipeline.unet, encoder)), file)
    return {"path": str(folder / "base"), "adapter": str(file), "pixels": 16}


def inputs(xl: bool = False) -> dict[str, Tensor]:
    """x_t, t and text of two prompts' views, as they were recorded: text [B*6, L, Ct], XL's last row the pooled one."""
    width = XL_UNET["cross_attention_dim"] if xl else TEXT_WIDTH
    text = numbers((2, 8 + xl, width), 3)
    if xl:
        text[:, -1, POOLED:] = 0
    return {
        "x_t": 1.5 * numbers((2 * VIEWS, 4, 8, 8), 1),
        "t": torch.tensor([300, 700]).repeat_interleave(VIEWS),
        "text": text.repeat_interleave(VIEWS, dim=0),
    }
