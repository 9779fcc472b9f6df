"""The toy box's CLIP: its sizes, its words, and those of a camera's side (`examples/train_toyclip.py` trains it)."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.evaluation.protocols import VIEW_WORDS
from prd.toybox.models import IMAGE_SIZE, make_tokenizer

TEXT_LENGTH = 24
WORDS = ("photo", "depicts", "front", "back", "left", "right", "side", "view", "of")  # beside those of the world
TEXTS = (  # as the protocols of `prd evaluate` write a caption, with and without the space that one of them lacks
    "{caption}",
    "a photo depicts {caption}",
    "a photo depicts{caption}",
    "{view} view of {caption}",
    "{view} view of {caption}",
)


def make_clip_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer with one token for every word of the world and of the protocols."""
    return make_tokenizer(WORDS, TEXT_LENGTH)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make a CLIP of 0.4 million parameters on pictures [B, 3, 32, 32] and texts of up to 24 tokens."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def view_words(cameras: Cameras) -> list[list[str]]:
    """Return the words of the side that each camera [B, V] looks at."""
    position = cameras.camera_to_world[..., :3, 3]
    azimuth = torch.rad2deg(torch.atan2(position[..., 1], position[..., 0]))
    sides = (azimuth / 90).round().long() % 4
    return [[VIEW_WORDS[i] for i in row] for row in sides.tolist()]
