"""The two sizes of the journey. They differ in widths and in what is rendered, in no class and no number of levels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import CLIPTextConfig

from prd.training.estimate.architectures import Architecture, published

ONE_PROMPT = ("--train_batch_size", "1")


@dataclass(frozen=True)
class Size:
    """A size of all models, and the words that its commands have besides the pages'.

    sd21, sd15  of the bases, with their VAE and text encoder
    widths      of the published adapter's tensors, for those of Stable Diffusion 2.1
    words       of a command, by its stage
    """

    name: str
    sd21: Architecture
    sd15: Architecture
    widths: dict[int, int] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)


FULL = Size("full", published(1024), published(768), words={"generate": ("--dtype", "bfloat16"), "train": ONE_PROMPT})

UNET = {"block_out_channels": (32, 64, 128, 128), "sample_size": 8}  # a tenth
VAE = {"block_out_channels": (32, 64, 128, 128)}  # a quarter
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 49408}


def _tiny(of: Architecture, context: int, heads: int | tuple[int, ...]) -> Architecture:
    unet = {**of.unet, **UNET, "attention_head_dim": heads, "cross_attention_dim": context}
    text = CLIPTextConfig(hidden_size=context, intermediate_size=2 * context, **TEXT)
    return replace(of, unet=unet, vae={**of.vae, **VAE}, text=text)


TINY = Size(
    "tiny",
    _tiny(published(1024), 48, (2, 4, 8, 8)),
    _tiny(published(768), 32, 4),
    widths={320: 32, 640: 64, 960: 96, 1280: 128, 1920: 192, 2560: 256, 1024: 48, 128: 32, 256: 64, 512: 128},
    words={
        "convert mvdream": ("--head-channels", "16"),
        "convert richdreamer": ("--heads", "4"),
        "generate": ("--resolution", "24", "--faces", "500"),
        "train": (
            *ONE_PROMPT,
            *("--model.latent_size", "8", "--renderers.volume.height", "32", "--renderers.volume.width", "32"),
            *("--renderers.volume.patch", "12", "--renderers.volume.num_samples", "8"),
            *("--renderers.volume.num_importance_samples", "8", "--renderers.surface.grid_resolution", "16"),
            *("--renderers.surface.height", "64", "--renderers.surface.width", "64", "--num_denoising_steps", "2"),
        ),
    },
)
SIZES: dict[str, Any] = {size.name: size for size in (FULL, TINY)}
