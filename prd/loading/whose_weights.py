"""Say whose weights a state dict of published weights holds, by its keys and shapes."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prd.loading.latent_diffusion import UNET

ADAPTER = "geometry.space_generator."
PROJECTION = f"{UNET}middle_block.1.proj_in.weight"  # linear of Stable Diffusion 2's family, a convolution of 1's
CONVERT = "python -m prd.teachers.convert"
REMEDIES = {
    "MVDream": f"give it to `{CONVERT} mvdream`",
    "RichDreamer": f"give it to `{CONVERT} richdreamer`",
    "TriplaneTurbo": "give it to `prd convert`",
    "Stable Diffusion": "it needs no conversion: give it as --base or model.base",
    "Stable Diffusion XL": "as a base it is read from a folder in diffusers' layout alone",
    "a LoRA": "merge it into its base first",
}


def whose_weights(state: Mapping[str, Tensor]) -> str | None:
    """Return the model that a state dict is of, a key of `REMEDIES`; None if its keys do not tell."""
    if any(key.startswith(ADAPTER) for key in state):
        return "TriplaneTurbo"
    if any(key.startswith(("conditioner.embedders.", f"{UNET}label_emb.")) for key in state):
        return "Stable Diffusion XL"
    if any(key.startswith(UNET) for key in state):
        if not any(key.startswith(f"{UNET}camera_embed.") for key in state):
            return "Stable Diffusion"
        projection = state.get(PROJECTION)
        return None if projection is None else "MVDream" if projection.ndim == 2 else "RichDreamer"
    return "a LoRA" if any(".lora_" in key or key.startswith("lora_") for key in state) else None


def other_model(state: Mapping[str, Tensor], expected: str) -> str:
    """Return "holds MVDream's weights; give it to ..." for a state dict of another model than `expected`, "" else."""
    found = whose_weights(state)
    if found in (None, expected):
        return ""
    owner = found if found == "a LoRA" else f"{found}'s weights"
    return f"holds {owner}, not {expected}'s; {REMEDIES[found]}"


def other_file(path: Path, expected: str) -> str:
    """Return what `other_model` says of a file of tensors, with or without a "state_dict"; "" if it is no such file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError):
        return ""
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return other_model(tensors, expected)
