"""Teachers from folders and Hub ids in the diffusers layout: strictly, or not at all."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from prd.errors import CheckpointError as CheckpointError

CONFIG_NAME = "teacher_config.json"
Settings = TypeVar("Settings")


def load_strict(model_class: Any, folder: str, subfolder: str | None, dtype: torch.dtype, **hub: Any) -> Any:
    """A diffusers or transformers model whose file (safetensors) holds each of its tensors and no other.

    hub: `token`, `cache_dir` and `local_files_only` of the Hub.

    The libraries themselves fill a missing tensor with random numbers and drop one too many, with a warning at most.
    Raises CheckpointError for another class of model, and for a key that is missing, left over or of another shape.
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
            raise CheckpointError(
                f"{place}: holds a {found}, not a {model_class.__name__}; convert it once: python -m "
                "prd.teachers.convert --help"
            )
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


def load_vae_encoder(folder: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a folder or Hub id without its decoder, which no teacher asks and holds most of its weights."""
    vae = load_strict(AutoencoderKL, folder, "vae", dtype)
    vae.decoder = vae.post_quant_conv = None
    return vae


PREDICTIONS = ("epsilon", "v_prediction", "sample")


def load_schedule(folder: str) -> DDPMScheduler:
    """The noise schedule of a folder or Hub id, whatever sampler its scheduler is saved for.

    Raises CheckpointError if it is not described by betas (flow matching, EDM), or predicts what no teacher knows.
    """
    place = f"{folder}/scheduler"
    try:
        config = DDPMScheduler.load_config(folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: has no readable scheduler_config.json ({error})") from error
    name = config.get("_class_name", "DDPMScheduler")
    flow = "Flow" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or not {"beta_schedule", "trained_betas"} & config.keys():
        raise CheckpointError(f"{place}: {name} has no schedule of betas; teachers are diffusion models, not flows")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise CheckpointError(f"{place}: prediction_type={prediction!r}; must be one of {', '.join(PREDICTIONS)}")
    try:
        schedule = DDPMScheduler.from_config(config)
        valid = bool(((schedule.betas > 0) & (schedule.betas <= 1)).all())
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{place}: its betas cannot be made ({error})") from error
    if not valid:
        raise CheckpointError(f"{place}: its betas lie outside ]0, 1]")
    return schedule


def shared_folder(folder: str, base: str | None) -> str | None:
    """Where a teacher's shared parts are: `base` beside its folder ("../stable_diffusion"), or `base` as a Hub id."""
    return str(Path(folder, base)) if base is not None and base.startswith(".") else base


def read_config(folder: str, settings: type[Settings]) -> Settings:
    """The settings (a dataclass) in the teacher's `teacher_config.json`, beside its U-Net, of a folder or Hub id.

    Raises FileNotFoundError (or the Hub's own) if there is none, since a guess would teach the wrong cameras in
    silence, and CheckpointError for broken JSON, a key that is not a setting, or a value that it cannot have.
    """
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        path = Path(hf_hub_download(folder, CONFIG_NAME))
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: not found; pass config=... or write the teacher's settings there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object of settings, not a {type(values).__name__}")
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CheckpointError(f"{path}: {', '.join(unknown)} is no setting of this teacher; it has {', '.join(known)}")
    try:
        return settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
