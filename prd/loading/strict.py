"""Weights of diffusers and transformers models: loaded strictly, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from prd.errors import CheckpointError


def load_strict(
    model_class: Any,
    folder: str,
    subfolder: str | None,
    dtype: torch.dtype,
    *,
    remedy: str = "give a folder that holds one",
    **hub: Any,
) -> Any:
    """A diffusers or transformers model whose file (safetensors) holds each of its tensors and no other.

    folder  folder or Hub id in the diffusers layout; `subfolder` of it, None for the folder itself
    dtype   of the weights
    remedy  what to do about another class of model, the end of the error
    hub     `token`, `cache_dir` and `local_files_only` of the Hub

    The libraries themselves fill a missing tensor with random numbers and drop an unexpected one, with a warning at
    most. Raises CheckpointError for another class of model, and for a key that is missing, left over or of another
    shape; OSError if the Hub gives no access.
    """
    place = f"{folder}/{subfolder}" if subfolder else folder
    if Path(folder).exists() and not Path(folder, subfolder or "").is_dir():
        raise CheckpointError(f"{place}: no such folder; a folder in the diffusers layout holds one for each part")
    if issubclass(model_class, ModelMixin):
        try:
            described = model_class.load_config(folder, subfolder=subfolder, **hub)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{place}: has no readable config.json ({error})") from error
        found = described.get("_class_name", model_class.__name__)
        if found != model_class.__name__:
            raise CheckpointError(f"{place}: holds a {found}, not a {model_class.__name__}; {remedy}")
    try:
        model, info = model_class.from_pretrained(
            folder, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub
        )
    except (RuntimeError, ValueError, TypeError, SafetensorError, OSError) as error:
        if isinstance(error, OSError) and not Path(folder).exists():  # of the Hub: no access, no connection
            raise
        raise CheckpointError(f"{place}: is not the model its config.json describes ({error})") from error
    for kind in ("missing", "unexpected", "mismatched"):
        keys = [str(key) for key in info[f"{kind}_keys"] if not str(key).endswith("position_ids")]  # of old CLIP files
        if keys:
            raise CheckpointError(f"{place}: {len(keys)} {kind} tensors, {min(keys)} among them; get the file anew")
    return model
