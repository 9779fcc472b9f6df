"""The files of a saved adapter: what is written, what is checked before anything is loaded.

adapter_config.json + adapter_model.safetensors   one peft adapter around one module (prd.adapters.peta)
heads.safetensors                                 the three MLPs
config.json                                       what the student is besides, which base it belongs to, and hashes

The base is known by its weights, its kind of prediction and its noise schedule, and by its text encoder's weights if it
had one when the adapter was saved (a converted adapter records none).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prd
from prd.adapters.peta import PetaConfig
from prd.base_hash import HALF_PRECISIONS, NEW_LAYER, TEXT, hash_names, same_weights, weights_hash

if TYPE_CHECKING:
    from prd.generators.triplane_turbo import TriplaneTurboGenerator

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS_WEIGHTS, STUDENT_CONFIG = "heads.safetensors", "config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEADS_WEIGHTS, STUDENT_CONFIG)
CLASS_NAME = "TriplaneTurbo"  # the only class whose config.json this is
SHOWN = 5  # names listed in an error
SCHEDULE_POINTS = 11  # of the noise schedule that are recorded


@dataclass(frozen=True)
class StudentConfig:
    """What a student is besides its adapter; saved in config.json. ValueError for a value out of range."""

    base: str = ""  # id or path of the Stable Diffusion it is built on
    base_revision: str | None = None  # commit of that base on the Hub, if it came from there
    latent_size: int = 32  # h = w of the latents that `generate` draws
    latent_scale: float | None = None  # divide latents by this before the decoder; None: as published, taken raw
    head_width: int = 64  # of the three MLPs
    bias_radius: float = 0.5  # sdf = MLP + |p| - bias_radius, scene units
    sdf_init_scale: float = 1.0  # of the sdf head's last layer at initialisation; 0.3 starts near the sphere
    num_inference_steps: int = 4  # K of the training rollout

    def __post_init__(self) -> None:
        for name in ("latent_size", "head_width", "num_inference_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: must be a positive integer")
        for name in ("latent_scale", "bias_radius", "sdf_init_scale"):
            value = getattr(self, name)
            if value is None and name == "latent_scale":
                continue
            if type(value) not in (int, float) or not math.isfinite(value) or (name == "latent_scale" and value <= 0):
                raise ValueError(f"{name}={value!r}: must be a finite number")
        for name in ("base", "base_revision"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "base" or value is not None):
                raise ValueError(f"{name}={value!r}: must be a string")


class AdapterMismatch(ValueError):
    """A saved adapter does not fit this base or this configuration."""


def adapter_state(student: TriplaneTurboGenerator) -> dict[str, Tensor]:
    """Every trained tensor by name: peft's keys of the LoRA and conv_out, and `heads.*`."""
    state = get_peft_model_state_dict(student.peft, save_embedding_layers=False)  # else it asks the Hub about the base
    return {**state, **{f"heads.{name}": tensor for name, tensor in student.heads.state_dict().items()}}


def load_adapter_state(student: TriplaneTurboGenerator, state: dict[str, Tensor]) -> None:
    """Load `adapter_state`; AdapterMismatch, before anything is changed, if a key or a shape differs."""
    if problems := misfits(student, state):
        raise AdapterMismatch("adapter does not fit: " + "; ".join(problems))
    heads = {name.removeprefix("heads."): state[name] for name in state if name.startswith("heads.")}
    student.heads.load_state_dict(heads, strict=True)
    set_peft_model_state_dict(student.peft, {n: t for n, t in state.items() if not n.startswith("heads.")})


def misfits(student: TriplaneTurboGenerator, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being this student's: ranks, then missing and extra keys, then shapes and types."""
    own = adapter_state(student)
    found, expected = ({_rank(t) for n, t in tensors.items() if ".lora_A." in n} for tensors in (state, own))
    if state.keys() == own.keys() and found != expected:
        return [f"its tensors have rank {_some(found)}, not {_some(expected)} as {ADAPTER_CONFIG} must say (r)"]
    problems = [f"missing {_some(own.keys() - state.keys())}"] if own.keys() - state.keys() else []
    problems += [f"extra {_some(state.keys() - own.keys())}"] if state.keys() - own.keys() else []
    shared = sorted(own.keys() & state.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in shared
        if own[name].shape != state[name].shape
    ]
    problems += shapes[:SHOWN] + [f"and {len(shapes) - SHOWN} more shapes"] * (len(shapes) > SHOWN)
    broken = [n for n in shared if not state[n].is_floating_point() or not bool(state[n].isfinite().all())]
    return problems + ([f"{_some(broken)} hold values that are no finite numbers"] if broken else [])


def _rank(lora_down: Tensor) -> int:
    """r of a plane-wise factor [P, r, in], a linear one [r, in] or a convolution's [r, in, k, k]."""
    return lora_down.shape[1] if lora_down.ndim == 3 else lora_down.shape[0]


def _some(names: Iterable[Any]) -> str:
    """At most SHOWN of them, as a list, and how many there are."""
    listed = sorted(names)
    return str(listed) if len(listed) <= SHOWN else f"{str(listed[:SHOWN])[:-1]}, ...] ({len(listed)})"


def base_hash(backbone: nn.Module) -> dict[str, str]:
    """Hashes of the base's weights as they are in this backbone, adapted or not (`prd.base_hash.weights_hash`).

    `load_base` computes them of the weights as they were stored, which is what half precision needs.
    """
    frozen = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    return weights_hash({name: tensor for name, tensor in frozen.items() if not name.startswith(NEW_LAYER)})


def noise_schedule(student: TriplaneTurboGenerator) -> dict[str, Any]:
    """The base's noise schedule: how many timesteps, and alphas_cumprod at evenly spaced ones, the ends among them."""
    alphas = student.alphas_cumprod.double().cpu()
    points = torch.linspace(0, len(alphas) - 1, SCHEDULE_POINTS).round().long()
    return {"num_train_timesteps": len(alphas), "alphas_cumprod": [float(f"{a:.7g}") for a in alphas[points].tolist()]}


def save_adapter(student: TriplaneTurboGenerator, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the adapter, the heads and their configs to `folder`; each file appears whole or not at all.

    dtype  of the tensors on disk; None: as they are, and those that were loaded and not trained since as they were on
           disk, whatever precision the student computes in
    """
    if dtype not in (None, torch.float32, *HALF_PRECISIONS):
        raise ValueError(f"dtype={dtype!r}: must be torch.float32, torch.bfloat16, torch.float16 or None")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in student.trained_state_dict().items()}
    if dtype is None:
        state = {name: _as_loaded(tensor, student.loaded_state.get(name)) for name, tensor in state.items()}
    state = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    heads = {name.removeprefix("heads."): state.pop(name) for name in list(state) if name.startswith("heads.")}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary)
        if not isinstance(student.peta.target_modules, str):  # peft keeps names in a set
            student.peta.target_modules = sorted(student.peta.target_modules or ())
        student.peta.save_pretrained(str(new))
        save_file(state, new / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        save_file(heads, new / HEADS_WEIGHTS, metadata={"format": "pt"})
        record = {
            "_class_name": CLASS_NAME,
            "_prd_version": prd.__version__,
            **asdict(student.config),
            "prediction_type": student.prediction_type,
            "base_hash": student.base_hash(),
            "noise_schedule": noise_schedule(student),
            "weights_hash": {name: _file_hash(new / name) for name in (ADAPTER_WEIGHTS, HEADS_WEIGHTS)},
        }
        (new / STUDENT_CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        mode = (new / STUDENT_CONFIG).stat().st_mode  # as the umask says; safetensors' files are their owner's alone
        for name in ADAPTER_FILES:
            (new / name).chmod(mode)
            os.replace(new / name, folder / name)


def _as_loaded(tensor: Tensor, loaded: Tensor | None) -> Tensor:
    """`loaded`, as it was on disk, if all that became of it since is rounding."""
    if loaded is None or loaded.shape != tensor.shape:
        return tensor
    types = (tensor.dtype, *HALF_PRECISIONS)
    return loaded if any(torch.equal(loaded.to(dtype).to(tensor.dtype), tensor) for dtype in types) else tensor


def load_adapter(student: TriplaneTurboGenerator, folder: Path, *, allow_other_base: bool = False) -> None:
    """Load what `save_adapter` wrote.

    Raises FileNotFoundError for a missing file, and AdapterMismatch, before anything is changed, for a damaged
    file, keys, shapes or ranks that differ, or another base (unless allow_other_base=True).
    """
    _, record = read_configs(folder)
    if not allow_other_base:
        _check_base(student, folder, record)
    state = _read_tensors(folder / ADAPTER_WEIGHTS)
    state |= {f"heads.{name}": tensor for name, tensor in _read_tensors(folder / HEADS_WEIGHTS).items()}
    if problems := misfits(student, state):
        raise AdapterMismatch(f"{folder}: adapter does not fit: {'; '.join(problems)}")
    for name, digest in record["weights_hash"].items():
        if _file_hash(folder / name) != digest:
            raise AdapterMismatch(
                f"{folder / name}: is not the file that {STUDENT_CONFIG} records (its SHA-256 differs); copy or "
                "download the folder again"
            )
    student.load_trained_state_dict(state)
    if not student.peta.full:  # a whole U-Net is not kept twice; copies, for the file may change under its mapping
        student.loaded_state = {name: tensor.clone() for name, tensor in state.items()}
    own = student.base_hash()
    if same_weights(record["base_hash"], own):  # a text encoder that was not loaded is still the recorded one
        student.keep_base_hash({**record["base_hash"], **own})


def _check_base(student: TriplaneTurboGenerator, folder: Path, record: dict[str, Any]) -> None:
    """AdapterMismatch unless the base is the recorded one; what is not recorded, or not loaded, is not compared."""
    recorded, own = record["base_hash"], student.base_hash()
    remedy = "load that base, or pass allow_other_base=True"
    if not same_weights(recorded, own):
        raise AdapterMismatch(
            f"{folder}: trained on the base {record['base']!r}, whose weights differ from those loaded; {remedy}"
        )
    both_have_text = all(any(name in hashes for name in hash_names(TEXT)) for hashes in (recorded, own))
    if both_have_text and not same_weights(recorded, own, TEXT):
        raise AdapterMismatch(
            f"{folder}: trained on the base {record['base']!r}, whose text encoder's weights differ from those loaded; "
            f"{remedy}"
        )
    if "noise_schedule" in record and not _same_schedule(record["noise_schedule"], noise_schedule(student)):
        raise AdapterMismatch(
            f"{folder}: trained on the noise schedule {record['noise_schedule']}, and the scheduler of the base loaded "
            f"has {noise_schedule(student)}; {remedy}"
        )
    if record["prediction_type"] != student.prediction_type:
        raise AdapterMismatch(
            f"{folder}: trained on a base that predicts {record['prediction_type']}, and the scheduler of the one "
            f"loaded says {student.prediction_type}; {remedy}"
        )


def _same_schedule(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["num_train_timesteps"] == other["num_train_timesteps"] and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-7)
        for a, b in zip(one["alphas_cumprod"], other["alphas_cumprod"], strict=True)
    )


def read_student(folder: Path) -> tuple[PetaConfig, StudentConfig]:
    """What to build a student with before `load_adapter`."""
    peta, record = read_configs(folder)
    return peta, StudentConfig(**{field.name: record[field.name] for field in fields(StudentConfig)})


def read_configs(folder: Path) -> tuple[PetaConfig, dict[str, Any]]:
    """The adapter's PetaConfig and the contents of config.json.

    Raises FileNotFoundError for a missing file, and AdapterMismatch for one of another class, a field that is missing
    or unknown, or a value out of range.
    """
    path = folder / STUDENT_CONFIG
    record = _read_json(path)
    if (found := record.get("_class_name")) != CLASS_NAME:
        raise AdapterMismatch(f"{path}: _class_name is {found!r}, expected {CLASS_NAME!r}; give a folder of that class")
    known = {field.name for field in fields(StudentConfig)} | {
        *("_class_name", "_prd_version", "prediction_type", "base_hash", "weights_hash", "noise_schedule")
    }
    missing, extra = known - record.keys() - {"noise_schedule"}, record.keys() - known  # the first ones have none
    if missing or extra:
        raise AdapterMismatch(
            f"{path}: missing {sorted(missing)}, extra {sorted(extra)}; saved by prd "
            f"{record.get('_prd_version')}, read by {prd.__version__}: use the version that saved it"
        )
    for name, keys in (("base_hash", None), ("weights_hash", {ADAPTER_WEIGHTS, HEADS_WEIGHTS})):
        value = record[name]
        strings = isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())
        if not value or not strings or (keys and value.keys() != keys):
            raise AdapterMismatch(f"{path}: {name}={value!r}: must hold hashes by name; save the adapter again")
    schedule = record.get("noise_schedule", {"num_train_timesteps": 1, "alphas_cumprod": [0.0] * SCHEDULE_POINTS})
    if not _is_schedule(schedule):
        raise AdapterMismatch(f"{path}: noise_schedule={schedule!r}: must hold num_train_timesteps and alphas_cumprod")
    try:
        StudentConfig(**{field.name: record[field.name] for field in fields(StudentConfig)})
    except ValueError as error:
        raise AdapterMismatch(f"{path}: {error}") from error
    return _read_peta(folder), record


def _is_schedule(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"num_train_timesteps", "alphas_cumprod"}:
        return False
    alphas = value["alphas_cumprod"]
    return (
        type(value["num_train_timesteps"]) is int
        and isinstance(alphas, list)
        and len(alphas) == SCHEDULE_POINTS
        and all(type(alpha) in (int, float) for alpha in alphas)
    )


def _read_peta(folder: Path) -> PetaConfig:
    path = folder / ADAPTER_CONFIG
    written = _read_json(path)
    known = {field.name for field in fields(PetaConfig)}
    missing = {"num_planes", "plane_channels"} - written.keys()  # what no other config has and no default should decide
    if written.get("peft_type") != "LORA" or missing:
        raise AdapterMismatch(
            f"{path}: is a peft config of another class (peft_type {written.get('peft_type')!r}, missing "
            f"{sorted(missing)}); expected a PetaConfig"
        )
    if extra := written.keys() - known:
        raise AdapterMismatch(f"{path}: extra {sorted(extra)}; saved by peft {written.get('peft_version')}, use that")
    try:
        peta = PetaConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise AdapterMismatch(f"{path}: {error}") from error
    peta.inference_mode = False
    return peta


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing; an adapter is {', '.join(ADAPTER_FILES)}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterMismatch(f"{path}: is no JSON ({error}); copy or download it again") from error
    if not isinstance(record, dict):
        raise AdapterMismatch(f"{path}: holds a {type(record).__name__}, expected a JSON object")
    return record


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing; an adapter is {', '.join(ADAPTER_FILES)}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:  # the last two: a header that names no known type
        raise AdapterMismatch(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
