"""Diffusion transformers as published, and their text encoders, without memory: for a base that is not here yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from prd.loading.strict import build
from prd.loading.transformer_bases import PIXART, SD3, T5_END, TransformerKind, text_ends, transformer_kind
from prd.loading.weights import read_object
from prd.text.encoders import t5_tokens
from prd.text.pixart import TOKENS
from prd.text.sd3 import T5_TOKENS, ThreeTextEncoders

T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SIGMA = {  # transformer/config.json of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
    "use_additional_conditions": False,
}
MEDIUM = {  # of stabilityai/stable-diffusion-3-medium-diffusers
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
MEDIUM_3_5 = {  # of stabilityai/stable-diffusion-3.5-medium
    **MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE_3_5 = {  # of stabilityai/stable-diffusion-3.5-large
    **MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
VAE_16 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}


def published_transformer(name: str) -> tuple[TransformerKind, dict[str, Any]] | None:
    """The kind and the config of a published transformer by the name of its place; None for another base."""
    name = name.lower()
    if "pixart" in name:
        return PIXART, SIGMA
    if "stable-diffusion-3.5" in name:
        return SD3, LARGE_3_5 if "large" in name else MEDIUM_3_5
    return (SD3, MEDIUM) if "stable-diffusion-3-" in name or "sd3" in name else None


def transformer_in(folder: Path) -> TransformerKind | None:
    """The kind of transformer in a folder; None where there is none, or a U-Net."""
    place = folder / "transformer/config.json"
    return transformer_kind(read_object(place)) if place.is_file() and not (folder / "unet").is_dir() else None


def texts_in(kind: TransformerKind, folder: Path) -> tuple[Any, ...]:
    """The folders of a base's text encoders; None for Stable Diffusion 3's T5 where a folder has none."""
    there = text_ends(kind, folder)
    return tuple(folder / f"text_encoder{end}" if end in there else None for end in kind.text_ends)


def published_texts(kind: TransformerKind, clips: tuple[Any, Any]) -> tuple[Any, ...]:
    """The configs of a published base's text encoders; `clips` those of Stable Diffusion XL, which 3 has too."""
    t5 = T5Config(feed_forward_proj="gated-gelu", **T5_XXL)
    return (*clips, t5) if T5_END in kind.text_ends else (t5,)


def meta_texts(texts: tuple[Any, ...], width: int) -> Any:
    """The text encoders of configs or folders, as one module without memory; `width` of an embedding."""
    if len(texts) == 1:
        return build(T5EncoderModel, texts[0])
    first, second = (build(CLIPTextModelWithProjection, text) for text in texts[:2])
    return ThreeTextEncoders(first, second, None if texts[2] is None else build(T5EncoderModel, texts[2]), width)


def rows_and_width(text: Any) -> tuple[int, int] | None:
    """Rows and channels of a prompt's embedding by `meta_texts`; None for another text encoder."""
    if isinstance(text, ThreeTextEncoders):
        tokens = T5_TOKENS if text.third is None else t5_tokens(text.third.config, T5_TOKENS)
        return text.config.max_position_embeddings + tokens + 1, text.width
    if isinstance(text, T5EncoderModel):
        return t5_tokens(text.config, TOKENS) + 1, text.config.d_model
    return None
