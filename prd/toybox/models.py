"""Networks of the toy box: each of the class that the real model has, small.

A tiny Stable Diffusion (CLIP text encoder, autoencoder of factor 4, U-Net on 8x8 latents), its depth ControlNet, a
four-view MVDream of the same U-Net with cameras, and a four-view RichDreamer on 16x16 normal and disparity images.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prd.teachers.multiview import CAMERA_DIMENSIONS
from prd.toybox.world import ANY_SHAPE, COLORS, SHAPES

IMAGE_SIZE = 32
TEXT_LENGTH = 16
TEXT_WIDTH = 64
NORMAL_SIZE = 16


def make_tokenizer(words: Sequence[str] = (), length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """Make CLIP's byte-level BPE with one token for every word of the world and of `words`; others fall apart.

    length  tokens of a text, at most
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in ("a", "on", *COLORS, *SHAPES, "an", ANY_SHAPE, *words):
        symbols = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # those of the words before come first: "green" merges the "re" of "red"
            symbols = _merged(symbols, *merge)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            tokens.append(symbols[0] + symbols[1])
            symbols = _merged(symbols, *merges[-1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = {"vocab.json": json.dumps({token: i for i, token in enumerate(tokens)})}
        files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n"
        files["tokenizer_config.json"] = json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": "<|endoftext|>"}
        )
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def _merged(symbols: list[str], first: str, second: str) -> list[str]:
    """Symbols in which every `first` that a `second` follows is one with it."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == (first, second):
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make a CLIP text encoder with two layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae(channels: int = 4) -> AutoencoderKL:
    """Make an autoencoder between images [B, 3, 32, 32] in [-1, 1] and latents [B, channels, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def make_unet(*, cameras: bool) -> UNet2DConditionModel:
    """Make the U-Net of Stable Diffusion, or with `cameras` of MVDream, on latents [B, 4, 8, 8]."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        **_camera_embedding(cameras),
    )


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Make the ControlNet of a U-Net on latents: a copy of its encoder, with ends that are zero before training.

    Three widths of the embedding are two halvings: control images [B, 3, 32, 32] arrive at latents [B, 4, 8, 8].
    """
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))


def make_normal_unet() -> UNet2DConditionModel:
    """Make the U-Net of RichDreamer: normals and disparity [B, 4, 16, 16] in [-1, 1], with cameras."""
    return UNet2DConditionModel(
        sample_size=NORMAL_SIZE,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        **_camera_embedding(True),
    )


def _camera_embedding(cameras: bool) -> dict:
    return (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_DIMENSIONS}
        if cameras
        else {}
    )


def make_scheduler() -> DDIMScheduler:
    """Make Stable Diffusion's noise schedule, which predicts the noise, as Stable Diffusion 2.1 base does."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
