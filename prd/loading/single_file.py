"""A Stable Diffusion in one .safetensors file, as it was first published and as fine-tunes are passed around.

The keys are those of latent-diffusion modules. What the file is, is read off its header; its tensors are then given
their diffusers names one by one, and each must find its place (`prd.loading.latent_diffusion`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from prd.errors import CheckpointError, MissingFile, PrdError
from prd.loading.latent_diffusion import UNET, VAE, convert_vae, unet_config, unet_key
from prd.loading.strict import assign, build
from prd.loading.weights import check_no_pointer, stored_dtype
from prd.utils.progress import counted

CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
CONTEXT = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
LATENTS = "decoder.conv_in.weight"
OTHERS = {  # a key that only the named model has
    "conditioner.embedders.": "Stable Diffusion XL in one file, which is read from a folder alone",
    f"{UNET}label_emb.": "a U-Net with added conditions (Stable Diffusion XL or unCLIP)",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "unet.": "a file of diffusers' layout",
}
EXPECTED = "expected Stable Diffusion 1.x or 2.x in the original layout, U-Net and VAE together"


class UnsupportedBase(PrdError, ValueError):
    """A base that PETA is not made for, or that cannot be read."""


class SingleFile:
    """The file's header and what it says; `models` and `text_encoder` read its tensors.

    context   width of the text embeddings: 768 (Stable Diffusion 1.x) or 1024 (2.x)
    width     channels of the U-Net's first level
    has_text  whether a text encoder is in it

    Raises FileNotFoundError, and UnsupportedBase for a damaged file or another model.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingFile(f"{path}: no such file; give a folder, a .safetensors file or a Hub id")
        self.path = path
        try:
            check_no_pointer(path)
        except CheckpointError as error:
            raise UnsupportedBase(str(error)) from error
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                self.shapes = {key: tuple(entry.get_shape()) for key, entry in slices.items()}
                dtypes = {entry.get_dtype() for key, entry in slices.items() if key.startswith((UNET, VAE))}
        except (SafetensorError, ValueError, KeyError) as error:
            raise UnsupportedBase(f"{path}: not a whole safetensors file ({error}); download it again") from error
        for prefix, model in OTHERS.items():
            if any(key.startswith(prefix) for key in self.shapes):
                raise UnsupportedBase(f"{path}: is {model} (it has {prefix}*); {EXPECTED}")
        for key, what in ((UNET + CONTEXT, "U-Net"), (VAE + LATENTS, "VAE")):
            if key not in self.shapes:
                raise UnsupportedBase(f"{path}: holds no {what} ({key} is missing); {EXPECTED}")
        shapes = [self.shapes.get(k, ()) for k in (UNET + CONTEXT, f"{UNET}input_blocks.0.0.weight", VAE + LATENTS)]
        if any(len(shape) < 2 for shape in shapes):
            raise UnsupportedBase(f"{path}: is no latent-diffusion model (shapes {shapes}); {EXPECTED}")
        self.context, channels, latents = (shape[1] for shape in shapes)
        self.width = shapes[1][0]
        if self.context not in (768, 1024) or channels != 4 or latents != 4:
            raise UnsupportedBase(
                f"{path}: its U-Net takes {channels} channels and text of width {self.context}, its VAE has {latents} "
                f"latent channels, not 4, 768 or 1024, and 4; {EXPECTED}"
            )
        try:
            stored_dtype(dtypes)
        except ValueError as error:
            raise UnsupportedBase(f"{path}: {error}") from error
        self.has_text = any(key.startswith((CLIP, OPEN_CLIP)) for key in self.shapes)

    def scheduler(self, prediction_type: str | None) -> DDIMScheduler:
        """The published noise schedule; 2.x exists with both kinds of prediction, so it must be said which."""
        if prediction_type == "epsilon" and "v_pred" in self.shapes:
            raise UnsupportedBase(f"{self.path}: says that it predicts v (it has v_pred), not epsilon as asked for")
        if prediction_type is None:
            if self.context == 1024 and "v_pred" not in self.shapes:
                raise UnsupportedBase(
                    f"{self.path}: does not say what a Stable Diffusion 2.x predicts; pass prediction_type='epsilon' "
                    "(2.0-base, 2.1-base: 512 pixels) or 'v_prediction' (2.0, 2.1: 768 pixels)"
                )
            prediction_type = "v_prediction" if "v_pred" in self.shapes else "epsilon"
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )

    def models(self) -> tuple[UNet2DConditionModel, AutoencoderKL]:
        """The U-Net (64 x 64 latents) and the VAE, frozen, in the precision they are stored in."""
        old = self._tensors(UNET)
        # the width of a camera embedding is what the multi-view checkpoints add to the same layout
        heads: dict[str, Any] = {"heads": 8, "head_channels": None}
        if self.context == 1024:
            heads = {"heads": None, "head_channels": 64}
        try:
            config = unet_config(
                {**old, "camera_embed.0.weight": torch.empty(1, 1, dtype=torch.float32, device="cpu")}, **heads
            )
            config = {k: v for k, v in config.items() if "class_embed" not in k}
            unet = build(UNet2DConditionModel, {"sample_size": 64, **config})
            assign(unet, {unet_key(k, config["layers_per_block"]): t for k, t in old.items()}, "U-Net")
            vae = convert_vae({VAE + k: t for k, t in self._tensors(VAE).items()}, sample_size=512)
        except (CheckpointError, KeyError, IndexError, ValueError) as error:
            raise UnsupportedBase(f"{self.path}: {error}; {EXPECTED}") from error
        return unet, vae

    def text_encoder(self) -> CLIPTextModel:
        """The CLIP text encoder in the file; 2.x stores OpenCLIP's names, and its last layer is not used."""
        open_clip = self.context == 1024
        state = self._tensors("cond_stage_model.")
        state = {f"cond_stage_model.{key}": tensor for key, tensor in state.items()}
        prefix = f"{OPEN_CLIP}transformer.resblocks." if open_clip else f"{CLIP}encoder.layers."
        embedding = f"{OPEN_CLIP}token_embedding.weight" if open_clip else f"{CLIP}embeddings.token_embedding.weight"
        widened = "mlp.c_fc.weight" if open_clip else "mlp.fc1.weight"
        if embedding not in state or f"{prefix}0.{widened}" not in state:
            raise UnsupportedBase(f"{self.path}: holds no text encoder of width {self.context}; {EXPECTED}")
        layers = 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))
        vocabulary, width = state[embedding].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=state[f"{prefix}0.{widened}"].shape[0],
            num_hidden_layers=layers - open_clip,
            num_attention_heads=max(1, width // 64),
            hidden_act="gelu" if open_clip else "quick_gelu",
        )
        model = build(CLIPTextModel, config)
        if open_clip:
            last = f"{prefix}{layers - 1}."
            kept = {key: tensor for key, tensor in state.items() if not key.startswith(last)}
            kept.pop(f"{OPEN_CLIP}text_projection", None)  # of the pooled embedding, which Stable Diffusion ignores
            new = convert_open_clip_checkpoint(model, kept)
        else:
            new = {f"text_model.{key.removeprefix(CLIP)}": tensor for key, tensor in state.items() if CLIP in key}
        own = model.state_dict().keys()
        plain = {key.removeprefix("text_model."): t for key, t in new.items() if not key.endswith("position_ids")}
        named = {f"text_model.{key}" if f"text_model.{key}" in own else key: t for key, t in plain.items()}
        try:
            return assign(model, named, "text encoder")
        except CheckpointError as error:
            raise UnsupportedBase(f"{self.path}: {error}") from error

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        try:
            with safe_open(self.path, framework="pt") as file:
                own = {key.removeprefix(prefix): file.get_tensor(key) for key in self.shapes if key.startswith(prefix)}
                return dict(counted(own))
        except SafetensorError as error:
            raise UnsupportedBase(f"{self.path}: not a whole safetensors file ({error}); download it again") from error
