"""Parts of a teacher from a folder or Hub id in the diffusers layout: VAE encoder, noise schedule, settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from huggingface_hub import hf_hub_download

from prd.errors import CheckpointError, MissingFile
from prd.loading.strict import load_strict
from prd.loading.weights import read_object

CONFIG_NAME = "teacher_config.json"
CONVERT = "convert it once: python -m prd.teachers.convert --help"  # the authors' layout of a multi-view U-Net
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
Settings = TypeVar("Settings")


def load_vae_encoder(folder: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a folder or Hub id without its decoder, which no teacher uses and which holds most of the weights."""
    vae = load_strict(AutoencoderKL, folder, "vae", dtype)
    vae.decoder = vae.post_quant_conv = None
    return vae


def load_schedule(folder: str) -> DDPMScheduler:
    """The noise schedule of a folder or Hub id, whatever sampler its scheduler is saved for.

    Raises CheckpointError if it is not described by betas (flow matching, EDM), or for an unknown prediction type.
    """
    place = f"{folder}/scheduler"
    try:
        config = DDPMScheduler.load_config(folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: has no readable scheduler_config.json ({error})") from error
    name = config.get("_class_name", "DDPMScheduler")
    flow = "Flow" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW
    if flow or not {"beta_schedule", "trained_betas"} & config.keys():
        raise CheckpointError(
            f"{place}: {name} has no schedule of betas: it is a flow; of these stable_diffusion_3 is a teacher"
        )
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
    """Folder of a teacher's shared parts: `base` beside its folder ("../stable_diffusion"), or `base` as a Hub id."""
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
        raise MissingFile(f"{path}: not found; pass config=... or write the teacher's settings there")
    values = read_object(path)
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CheckpointError(f"{path}: {', '.join(unknown)} is no setting of this teacher; it has {', '.join(known)}")
    try:
        return settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
