"""Diffusion transformers as bases, in diffusers' layout: PixArt-Sigma, and Stable Diffusion 3 and 3.5.

As of a U-Net, what a folder holds is read off its configs before any weight is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import AutoTokenizer, T5EncoderModel

from prd.loading.strict import load_strict, load_tokenizer
from prd.text.encoders import PromptEncoder
from prd.text.pixart import MaskedT5PromptEncoder
from prd.text.sd3 import load_sd3_encoder

PART = "transformer"  # subfolder
T5_END = "_3"  # of the text encoder that Stable Diffusion 3 can do without


@dataclass(frozen=True)
class TransformerKind:
    """A kind of transformer that is a base.

    title         for messages
    channels      of its latents, and of its prediction: more are a learned variance
    text_width    key of its config that says how wide a prompt's embedding is
    text_ends     of its text encoders' and tokenizers' subfolders
    """

    title: str
    network: Any
    scheduler: Any
    channels: int
    predicts: tuple[int, ...]
    text_width: str
    text_ends: tuple[str, ...]


PIXART = TransformerKind("PixArt-Sigma", PixArtTransformer2DModel, DDIMScheduler, 4, (4, 8), "caption_channels", ("",))
SD3 = TransformerKind(
    "Stable Diffusion 3",
    SD3Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    16,
    (16,),
    "joint_attention_dim",
    ("", "_2", T5_END),
)
KINDS = {kind.network.__name__: kind for kind in (PIXART, SD3)}


def transformer_kind(transformer: Mapping[str, Any]) -> TransformerKind | None:
    """The kind of base that a transformer's config is of; None for a class that PETA is not made for."""
    return KINDS.get(str(transformer.get("_class_name")))


def foreign_transformer(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> list[str]:
    """List what in the configs of a folder is not of a base that PETA adapts; empty if all is."""
    kind = transformer_kind(transformer)
    if kind is None:
        return [f"transformer {transformer.get('_class_name')}"]
    if not vae:
        return ["no vae/config.json"]
    given = {
        "transformer in_channels": (transformer.get("in_channels"), (kind.channels,)),
        "transformer out_channels": (transformer.get("out_channels") or kind.channels, kind.predicts),
        "vae": (vae.get("_class_name"), ("AutoencoderKL",)),
        "vae latent_channels": (vae.get("latent_channels"), (kind.channels,)),
    }
    wrong = [f"{name} {value!r}" for name, (value, allowed) in given.items() if value not in allowed]
    for key in (kind.text_width, "num_attention_heads", "attention_head_dim", "patch_size"):
        if type(transformer.get(key)) is not int:
            wrong.append(f"transformer {key} {transformer.get(key)!r}")
    if kind is PIXART and _is_told_sizes(transformer):
        wrong.append("a transformer that is told sizes, as PixArt-alpha's is")
    if not wrong and scheduler:
        wrong += _foreign_scheduler(kind, scheduler)
    return wrong


def _is_told_sizes(transformer: Mapping[str, Any]) -> bool:
    told = transformer.get("use_additional_conditions")
    return transformer.get("sample_size") == 128 if told is None else bool(told)  # as diffusers reads it


def _foreign_scheduler(kind: TransformerKind, scheduler: Mapping[str, Any]) -> list[str]:
    name = scheduler.get("_class_name")
    if kind is SD3:
        fits = isinstance(scheduler.get("shift"), int | float) and not scheduler.get("use_dynamic_shifting")
        return [] if fits else [f"a {name}, which is no flow with noise levels of one shift"]
    if "beta_schedule" not in scheduler:
        return [f"its scheduler is {name}, without betas"]
    predicts = scheduler.get("prediction_type", "epsilon")
    return [] if predicts == "epsilon" else [f"a scheduler that says it predicts {predicts}"]


def inner_width(transformer: Mapping[str, Any]) -> int:
    """Channels of the transformer's tokens."""
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]


def text_ends(kind: TransformerKind, folder: Path) -> tuple[str, ...]:
    """Ends of the text encoders' subfolders that are used: without Stable Diffusion 3's T5 where a folder has none."""
    has_t5 = (folder / f"text_encoder{T5_END}/config.json").is_file()
    return tuple(end for end in kind.text_ends if end != T5_END or has_t5)


def load_text(kind: TransformerKind, folder: Path, transformer: Mapping[str, Any]) -> PromptEncoder:
    """The text encoders and tokenizers of a folder as one encoder, as stored; errors of `load_strict`."""
    place, width = str(folder), transformer[kind.text_width]
    if kind is SD3:
        encoder = load_sd3_encoder(place, width, t5=T5_END in text_ends(kind, folder))
        pooled = sum(config.projection_dim for config in encoder.configs[:2])
        if pooled != (wanted := transformer.get("pooled_projection_dim")):
            raise ValueError(f"{place}: a transformer for a pooled embedding of {wanted} beside two CLIPs of {pooled}")
        return encoder
    model = load_strict(T5EncoderModel, place, "text_encoder", None)
    if model.config.d_model != width:
        raise ValueError(f"{place}: its text_encoder is {model.config.d_model} wide, its transformer takes {width}")
    return MaskedT5PromptEncoder(load_tokenizer(AutoTokenizer, place), model)
