"""Teachers from folders and Hub ids in the diffusers layout: strictly, or not at all."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download

CONFIG_NAME = "teacher_config.json"
Settings = TypeVar("Settings")


class CheckpointError(ValueError):
    """A checkpoint that is not the model it is said to be."""


def load_strict(model_class: Any, folder: str, subfolder: str | None, dtype: torch.dtype) -> Any:
    """A diffusers or transformers model whose file (safetensors) holds each of its tensors and no other.

    The libraries themselves fill a missing tensor with random numbers and drop one too many, with a warning at most.
    Raises CheckpointError for another class of model, and for a key that is missing, left over or of another shape.
    """
    place = f"{folder}/{subfolder}" if subfolder else folder
    if issubclass(model_class, ModelMixin):
        found = model_class.load_config(folder, subfolder=subfolder).get("_class_name", model_class.__name__)
        if found != model_class.__name__:
            raise CheckpointError(
                f"{place}: holds a {found}, not a {model_class.__name__}; convert it once: python -m "
                "prd.teachers.convert --help"
            )
    try:
        model, info = model_class.from_pretrained(
            folder, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{place}: is not the model its config.json describes ({error})") from error
    for kind in ("missing", "unexpected", "mismatched"):
        keys = [str(key) for key in info[f"{kind}_keys"] if not str(key).endswith("position_ids")]  # of old CLIP files
        if keys:
            raise CheckpointError(f"{place}: {len(keys)} {kind} tensors, {min(keys)} among them; get the file anew")
    return model


def shared_folder(folder: str, base: str | None) -> str | None:
    """Where a teacher's shared parts are: `base` beside its folder ("../stable_diffusion"), or `base` as a Hub id."""
    return str(Path(folder, base)) if base is not None and base.startswith(".") else base


def read_config(folder: str, settings: type[Settings]) -> Settings:
    """The settings (a dataclass) in the teacher's `teacher_config.json`, beside its U-Net, of a folder or Hub id.

    Raises FileNotFoundError (or the Hub's own) if there is none, since a guess would teach the wrong cameras in
    silence, and ValueError for a key that is not a setting.
    """
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        path = Path(hf_hub_download(folder, CONFIG_NAME))
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: not found; pass config=... or write the teacher's settings there")
    values = json.loads(path.read_text())
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)} is no setting of this teacher; it has {', '.join(known)}")
    return settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
