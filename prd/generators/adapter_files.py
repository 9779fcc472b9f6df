"""The files of a saved adapter: what is written, what is checked before anything is loaded.

adapter_config.json + adapter_model.safetensors   one peft adapter around one module (prd.adapters.peta)
heads.safetensors                                 the three MLPs; the splat heads and NeuS's learned s if there are any
config.json                                       what the model is besides, its base, and hashes

The base is known by its weights, its kind of prediction and its noise schedule, and by its text encoder's weights if it
had one when the adapter was saved (a converted adapter records none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import prd
from prd.adapters.peta import PetaConfig
from prd.errors import ModelMismatch
from prd.hub.shipped import public_base
from prd.loading.saved_model import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CONFIG,
    HEADS_WEIGHTS,
    OWN_CLASS,
    check_hash,
    misfits,
    own_class_record,
    read_json,
    read_weights,
    save_model,
    some,
)
from prd.loading.weight_hashes import NEW_LAYER, TEXT, hash_names, same_weights, weights_hash
from prd.utils.arguments import integer
from prd.utils.dtypes import HALF_PRECISIONS, check_dtype

if TYPE_CHECKING:
    from prd.generators.triplane_turbo import TriplaneTurboModel

WHOLE = f"an adapter is {', '.join(ADAPTER_FILES)}"  # in an error
CLASS_NAME = "TriplaneTurbo"  # the only class whose config.json this is
LEVELS = ("alphas_cumprod", "sigmas")  # of a diffusion, of a flow (`prd.adapters.noise_levels`)
VAE_SCALING = "vae_scaling"  # key of bases whose latents are decoded by their VAE's own factor and shift
OFF = {"inv_std": None, "splat_heads": False}  # what is written of a model that has it alone
SCHEDULE_POINTS = 11  # of the noise schedule that are recorded


@dataclass(frozen=True)
class SavedConfig:
    """Settings of a model besides its adapter, saved in config.json. ValueError for a value out of range."""

    base: str = ""  # the Stable Diffusion it is built on: a shipped name or a Hub id; "" for one on its maker's disk
    base_revision: str | None = None  # commit of that base on the Hub, if it came from there
    latent_size: int = 32  # h = w of the latents that `generate` draws
    latent_scale: float | None = None  # divide latents by this before the decoder; None: as published, taken raw
    head_width: int = 64  # of the three MLPs
    bias_radius: float = 0.5  # sdf = MLP + |p| - bias_radius, scene units
    sdf_init_scale: float = 1.0  # of the sdf head's last layer at initialisation; 0.3 starts near the sphere
    num_inference_steps: int = 4  # K of the training rollout
    inv_std: float | None = None  # s of NeuS that training began with, and learnt on; None: s is not the model's
    splat_heads: bool = False  # whether there is an MLP of what Gaussians on the surface are

    def __post_init__(self) -> None:
        for name in ("latent_size", "head_width", "num_inference_steps"):
            value = getattr(self, name)
            found = integer(value)
            if found is None or found < 1:
                raise ValueError(f"{name}={value!r}: must be a positive integer")
            object.__setattr__(self, name, found)
        for name in ("latent_scale", "inv_std", "bias_radius", "sdf_init_scale"):
            value, may_be_none = getattr(self, name), name in ("latent_scale", "inv_std")  # and are positive
            if value is None and may_be_none:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: must be a finite number")
            if may_be_none and value <= 0:
                raise ValueError(f"{name}={value!r}: must be above 0")
            object.__setattr__(self, name, value if type(value) is int else float(value))  # of numpy, as Python's
        if not isinstance(self.splat_heads, bool):
            raise ValueError(f"splat_heads={self.splat_heads!r}: must be true or false")
        for name in ("base", "base_revision"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "base" or value is not None):
                raise ValueError(f"{name}={value!r}: must be a string")


def adapter_state(model: TriplaneTurboModel) -> dict[str, Tensor]:
    """Every trained tensor by name: peft's keys of the LoRA and conv_out, and `heads.*`."""
    state = get_peft_model_state_dict(model.peft, save_embedding_layers=False)  # else it asks the Hub about the base
    return {**state, **{f"heads.{name}": tensor for name, tensor in model.heads.state_dict().items()}}


def load_adapter_state(model: TriplaneTurboModel, state: dict[str, Tensor]) -> None:
    """Load `adapter_state`; ModelMismatch, before anything is changed, if a key or a shape differs."""
    if problems := adapter_misfits(model, state):
        raise ModelMismatch("adapter does not fit: " + "; ".join(problems))
    heads = {name.removeprefix("heads."): state[name] for name in state if name.startswith("heads.")}
    model.heads.load_state_dict(heads, strict=True)
    set_peft_model_state_dict(model.peft, {n: t for n, t in state.items() if not n.startswith("heads.")})


def adapter_misfits(model: TriplaneTurboModel, state: dict[str, Tensor]) -> list[str]:
    """List what keeps `state` from being this model's: ranks, else keys, shapes and values."""
    own = adapter_state(model)
    found, expected = ({_rank(t) for n, t in tensors.items() if ".lora_A." in n} for tensors in (state, own))
    if state.keys() == own.keys() and found != expected:
        return [f"its tensors have rank {some(found)}, not {some(expected)} as {ADAPTER_CONFIG} must say (r)"]
    return misfits(own, state)


def _rank(lora_down: Tensor) -> int:
    """Return r of a plane-wise factor [P, r, in], a linear one [r, in] or a convolution's [r, in, k, k]."""
    return lora_down.shape[1] if lora_down.ndim == 3 else lora_down.shape[0]


def base_hash(backbone: nn.Module) -> dict[str, str]:
    """Hashes of the base's weights as they are in this backbone, adapted or not (`weights_hash`).

    `load_base` computes them of the weights as they were stored, which is what half precision needs.
    """
    frozen = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    return weights_hash({name: tensor for name, tensor in frozen.items() if not name.startswith(NEW_LAYER)})


def noise_schedule(model: TriplaneTurboModel) -> dict[str, Any]:
    """The base's noise schedule: how many timesteps, and its levels at evenly spaced ones, the ends among them."""
    kind, levels = model.backbone.levels.name, model.backbone.levels.levels.double().cpu()
    points = torch.linspace(0, len(levels) - 1, SCHEDULE_POINTS, dtype=torch.float32, device="cpu").round().long()
    return {"num_train_timesteps": len(levels), kind: [float(f"{a:.7g}") for a in levels[points].tolist()]}


def save_adapter(model: TriplaneTurboModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the adapter, the heads and their configs to `folder`; each file appears whole or not at all.

    dtype  of the tensors on disk; None: as they are, and those that were loaded and not trained since as they were on
           disk, whatever precision the model computes in
    """
    check_dtype(dtype)
    state = {name: tensor.detach().cpu() for name, tensor in model.trained_state_dict().items()}
    if dtype is None:
        state = {name: _as_loaded(tensor, model.loaded_state.get(name)) for name, tensor in state.items()}
    heads = {name.removeprefix("heads."): state.pop(name) for name in list(state) if name.startswith("heads.")}
    base = public_base(model.config.base, model.config.base_revision)

    def write_peta(new: Path) -> None:
        if not isinstance(model.peta.target_modules, str):  # peft keeps names in a set
            model.peta.target_modules = sorted(model.peta.target_modules or ())
        model.peta.base_model_name_or_path = base or None
        model.peta.save_pretrained(str(new))

    def record(hashes: dict[str, str]) -> dict[str, Any]:
        return {
            "_class_name": CLASS_NAME,
            **own_class_record(type(model)),
            "_prd_version": prd.__version__,
            **{name: value for name, value in asdict(model.config).items() if (name, value) not in OFF.items()},
            "base": base,
            "prediction_type": model.prediction_type,
            "base_hash": model.base_hash(),
            "noise_schedule": noise_schedule(model),
            **({} if model.backbone.vae_scaling is None else {VAE_SCALING: model.backbone.vae_scaling}),
            "weights_hash": hashes,
        }

    weights = {ADAPTER_WEIGHTS: state, HEADS_WEIGHTS: heads}
    save_model(folder, weights, record, dtype=dtype, write_beside=write_peta)


def _as_loaded(tensor: Tensor, loaded: Tensor | None) -> Tensor:
    """`loaded`, as it was on disk, if all that became of it since is rounding."""
    if loaded is None or loaded.shape != tensor.shape:
        return tensor
    types = (tensor.dtype, *HALF_PRECISIONS)
    return loaded if any(torch.equal(loaded.to(dtype).to(tensor.dtype), tensor) for dtype in types) else tensor


def load_adapter(model: TriplaneTurboModel, folder: Path, *, allow_other_base: bool = False) -> None:
    """Load what `save_adapter` wrote.

    Raises FileNotFoundError for a missing file, and ModelMismatch, before anything is changed, for a damaged
    file, keys, shapes or ranks that differ, or another base (unless allow_other_base=True).
    """
    _, record = read_configs(folder)
    if not allow_other_base:
        _check_base(model, folder, record)
    state = read_weights(folder / ADAPTER_WEIGHTS)
    state |= {f"heads.{name}": tensor for name, tensor in read_weights(folder / HEADS_WEIGHTS).items()}
    if model.config.splat_heads and not record["splat_heads"]:  # new ones, which answer 0, begin as they are
        fresh = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
        state |= {name: tensor for name, tensor in fresh.items() if name.startswith("heads.splats.")}
    if problems := adapter_misfits(model, state):
        raise ModelMismatch(f"{folder}: adapter does not fit: {'; '.join(problems)}")
    for name, digest in record["weights_hash"].items():
        check_hash(folder / name, digest)
    model.load_trained_state_dict(state)
    if not model.peta.full:  # a whole U-Net is not kept twice; copies, for the file may change under its mapping
        model.loaded_state = {name: tensor.clone() for name, tensor in state.items()}
    own = model.base_hash()
    if same_weights(record["base_hash"], own):  # a text encoder that was not loaded is still the recorded one
        model.keep_base_hash({**record["base_hash"], **own})


def _check_base(model: TriplaneTurboModel, folder: Path, record: dict[str, Any]) -> None:
    """ModelMismatch unless the base is the recorded one; what is not recorded, or not loaded, is not compared."""
    recorded, own = record["base_hash"], model.base_hash()
    remedy = "load that base, or pass allow_other_base=True"
    if not same_weights(recorded, own):
        raise ModelMismatch(
            f"{folder}: trained on {_name_of(record)}, whose weights differ from those loaded; {remedy}"
        )
    both_have_text = all(any(name in hashes for name in hash_names(TEXT)) for hashes in (recorded, own))
    if both_have_text and not same_weights(recorded, own, TEXT):
        raise ModelMismatch(
            f"{folder}: trained on {_name_of(record)}, whose text encoder's weights differ from those loaded; {remedy}"
        )
    if "noise_schedule" in record and not _same_schedule(record["noise_schedule"], noise_schedule(model)):
        raise ModelMismatch(
            f"{folder}: trained on the noise schedule {record['noise_schedule']}, and the scheduler of the base loaded "
            f"has {noise_schedule(model)}; {remedy}"
        )
    if VAE_SCALING in record and record[VAE_SCALING] != model.backbone.vae_scaling:
        raise ModelMismatch(
            f"{folder}: trained on a VAE with the scaling {record[VAE_SCALING]}, and the base loaded has "
            f"{model.backbone.vae_scaling}; {remedy}"
        )
    if record["prediction_type"] != model.prediction_type:
        raise ModelMismatch(
            f"{folder}: trained on a base that predicts {record['prediction_type']}, and the scheduler of the one "
            f"loaded says {model.prediction_type}; {remedy}"
        )


def _name_of(record: Mapping[str, Any]) -> str:
    return f"the base {record['base']!r}" if record["base"] else "a base of its maker's disk"


def _same_schedule(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys() or one["num_train_timesteps"] != other["num_train_timesteps"]:
        return False
    kind = next(key for key in LEVELS if key in one)
    return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-7) for a, b in zip(one[kind], other[kind], strict=True))


def read_settings(folder: Path) -> tuple[PetaConfig, SavedConfig]:
    """Return what to build a model with before `load_adapter`."""
    peta, record = read_configs(folder)
    return peta, SavedConfig(**{field.name: record[field.name] for field in fields(SavedConfig)})


def read_configs(folder: Path) -> tuple[PetaConfig, dict[str, Any]]:
    """The adapter's PetaConfig and the contents of config.json.

    Raises FileNotFoundError for a missing file, and ModelMismatch for one of another class, a field that is missing
    or unknown, or a value out of range.
    """
    path = folder / CONFIG
    record = {**OFF, **read_json(path, WHOLE)}
    if (found := record.get("_class_name")) != CLASS_NAME:
        raise ModelMismatch(f"{path}: _class_name is {found!r}, expected {CLASS_NAME!r}; give a folder of that class")
    known = {field.name for field in fields(SavedConfig)} | {
        *("_class_name", "_prd_version", "prediction_type", "base_hash", "weights_hash")
    }
    optional = {"noise_schedule", OWN_CLASS, *OFF, VAE_SCALING}  # older adapters or other bases have none
    missing, extra = known - record.keys() - optional, record.keys() - known - optional
    if missing or extra:
        raise ModelMismatch(
            f"{path}: missing {sorted(missing)}, extra {sorted(extra)}; saved by prd "
            f"{record.get('_prd_version')}, read by {prd.__version__}: use the version that saved it"
        )
    for name, keys in (("base_hash", None), ("weights_hash", {ADAPTER_WEIGHTS, HEADS_WEIGHTS})):
        value = record[name]
        strings = isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())
        if not value or not strings or (keys and value.keys() != keys):
            raise ModelMismatch(f"{path}: {name}={value!r}: must hold hashes by name; save the adapter again")
    schedule = record.get("noise_schedule", {"num_train_timesteps": 1, "alphas_cumprod": [0.0] * SCHEDULE_POINTS})
    if not _is_schedule(schedule):
        raise ModelMismatch(
            f"{path}: noise_schedule={schedule!r}: must hold num_train_timesteps and {' or '.join(LEVELS)}"
        )
    try:
        SavedConfig(**{field.name: record[field.name] for field in fields(SavedConfig)})
    except ValueError as error:
        raise ModelMismatch(f"{path}: {error}") from error
    return _read_peta(folder), record


def _is_schedule(value: object) -> bool:
    if not isinstance(value, dict) or set(value) not in [{"num_train_timesteps", kind} for kind in LEVELS]:
        return False
    alphas = next(value[kind] for kind in LEVELS if kind in value)
    return (
        type(value["num_train_timesteps"]) is int
        and isinstance(alphas, list)
        and len(alphas) == SCHEDULE_POINTS
        and all(type(alpha) in (int, float) for alpha in alphas)
    )


def _read_peta(folder: Path) -> PetaConfig:
    path = folder / ADAPTER_CONFIG
    written = read_json(path, WHOLE)
    known = {field.name for field in fields(PetaConfig)}
    missing = {"num_planes", "plane_channels"} - written.keys()  # what no other config has and no default should decide
    if written.get("peft_type") != "LORA" or missing:
        raise ModelMismatch(
            f"{path}: is a peft config of another class (peft_type {written.get('peft_type')!r}, missing "
            f"{sorted(missing)}); expected a PetaConfig"
        )
    if extra := written.keys() - known:
        raise ModelMismatch(f"{path}: extra {sorted(extra)}; saved by peft {written.get('peft_version')}, use that")
    try:
        peta = PetaConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ModelMismatch(f"{path}: {error}") from error
    peta.inference_mode = False
    return peta
