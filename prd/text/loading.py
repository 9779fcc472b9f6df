"""Load a text encoder from a model's folder or file, and identify it by a digest of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from prd.errors import PrdError
from prd.hub.shipped import HUB_ID, shipped
from prd.loading.download import download
from prd.loading.saved_model import read_json
from prd.loading.stable_diffusion import load_base
from prd.loading.strict import load_strict, load_tokenizer
from prd.loading.weight_hashes import TEXT, text_weights, weights_hash
from prd.text.encoders import PromptEncoder, T5PromptEncoder
from prd.text.pixart import MaskedT5PromptEncoder
from prd.text.sd3 import load_sd3_encoder
from prd.text.sdxl import load_sdxl_encoder
from prd.utils.arguments import expanded, has_suffix
from prd.utils.progress import loading

CONFIGS = ["text_encoder*/config.json", "transformer/config.json"]
INFLUENTIAL = ("model_type", "hidden_act", "num_attention_heads", "num_heads", "layer_norm_eps", "layer_norm_epsilon")


class UnknownEncoder(PrdError, ValueError):
    """A place that holds no text encoder, or one that is neither CLIP nor T5."""


def encoder_digest(encoder: PromptEncoder) -> str:
    """SHA-256 of everything that an encoder's output depends on: weights, their precision, tokenizer, activation."""
    digest = hashlib.sha256()
    for tokenizer, config in zip(encoder.tokenizers, encoder.configs, strict=True):
        plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        plain.no_padding()  # these two are as the last call left them
        plain.no_truncation()
        settings = {name: getattr(config, name, None) for name in INFLUENTIAL}
        padding = [tokenizer.pad_token_id, tokenizer.padding_side, getattr(config, "max_position_embeddings", None)]
        digest.update(f"{type(encoder).__name__} {settings} {padding} {plain.to_str()}".encode())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_hashes(encoder: PromptEncoder) -> dict[str, str]:
    """Hashes of a text encoder's weights that a model records, the same in any precision of them."""
    return weights_hash(text_weights(encoder.model), prefix=TEXT)


@loading("text encoder")
def load_encoder(
    place: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **hub: Any
) -> PromptEncoder:
    """Load a frozen text encoder and its tokenizer.

    place  a shipped name, a folder or Hub id in diffusers' layout, or a single .safetensors file
    hub: `token`, `cache_dir` and `local_files_only` of the Hub. A CLIP, a T5, or those of Stable Diffusion XL or 3.
    Raises UnknownEncoder for another model or a folder without one, OSError and CheckpointError for missing or
    foreign files.
    """
    place = str(shipped(place, "text_encoder") or expanded(place, "encoder"))
    if has_suffix(place, ".safetensors"):
        encoder = load_base(  # what its U-Net predicts is no matter; a file that says it says v
            place, dtype=dtype, text=True, prediction_type="v_prediction", **hub
        ).encoder
        assert encoder is not None  # text=True
        encoder.model.to(device)
        return encoder
    if Path(place).is_dir() or not HUB_ID.fullmatch(place):
        if not (Path(place) / "text_encoder/config.json").is_file():
            raise UnknownEncoder(
                f"encoder={place!r}: has no text_encoder/config.json; give a folder with one (of the Stable Diffusion "
                "whose text encoder it shares), a .safetensors file or a Hub id 'owner/name'"
            )
    kinds: dict[str, tuple[Any, type[PromptEncoder]]] = {
        "clip_text_model": (CLIPTextModel, PromptEncoder),
        "t5": (T5EncoderModel, T5PromptEncoder),
    }
    folder = Path(place) if Path(place).is_dir() else download(place, CONFIGS, hub)
    kind = read_json(folder / "text_encoder/config.json", "name a model with a text encoder").get("model_type")
    if kind not in kinds:
        raise UnknownEncoder(f"encoder={place!r}: its text encoder is a {kind}; must be one of {', '.join(kinds)}")
    if (flow := _transformer(folder)).get("_class_name") == "SD3Transformer2DModel":
        encoder = load_sd3_encoder(place, flow["joint_attention_dim"], dtype, **hub)
        encoder.model.to(device)
        return encoder
    if flow.get("_class_name") == "PixArtTransformer2DModel":
        kinds["t5"] = (T5EncoderModel, MaskedT5PromptEncoder)
    if kind == "clip_text_model" and (folder / "text_encoder_2/config.json").is_file():
        encoder = load_sdxl_encoder(place, dtype, **hub)
        encoder.model.to(device)
        return encoder
    model_class, encoder_class = kinds[kind]
    model = load_strict(model_class, place, "text_encoder", dtype, **hub).to(device)
    return encoder_class(load_tokenizer(AutoTokenizer, place, **hub), model)


def _transformer(folder: Path) -> dict[str, Any]:
    """The config of the transformer beside a text encoder; {} where there is none."""
    place = folder / "transformer/config.json"
    return read_json(place, "copy the folder again") if place.is_file() else {}
