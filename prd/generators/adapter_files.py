"""The files of a saved adapter: what is written, what is checked before anything is loaded.

adapter_config.json + adapter_model.safetensors   one peft adapter around one module (prd.adapters.peta)
heads.safetensors                                 the three MLPs
config.json                                       what the student is besides, and which base it belongs to
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prd.adapters.peta import PetaConfig

if TYPE_CHECKING:
    from prd.generators.triplane_turbo import TriplaneTurboGenerator

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS_WEIGHTS, STUDENT_CONFIG = "heads.safetensors", "config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEADS_WEIGHTS, STUDENT_CONFIG)
HALF_PRECISIONS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StudentConfig:
    """What a student is besides its adapter; saved as config.json."""

    base: str = ""  # id or path of the Stable Diffusion it is built on
    latent_size: int = 32  # h = w of the latents that `generate` draws
    latent_scale: float | None = None  # divide latents by this before the decoder; None: as published, taken raw
    head_width: int = 64  # of the three MLPs
    bias_radius: float = 0.5  # sdf = MLP + |p| - bias_radius, scene units
    sdf_init_scale: float = 1.0  # of the sdf head's last layer at initialisation; 0.3 starts near the sphere
    num_inference_steps: int = 4  # K of the training rollout


class AdapterMismatch(ValueError):
    """A saved adapter does not fit this base or this configuration."""


def adapter_state(student: TriplaneTurboGenerator) -> dict[str, Tensor]:
    """Every trained tensor by name: peft's keys of the LoRA and conv_out, and `heads.*`."""
    state = get_peft_model_state_dict(student.peft, save_embedding_layers=False)  # else it asks the Hub about the base
    return {**state, **{f"heads.{name}": tensor for name, tensor in student.heads.state_dict().items()}}


def load_adapter_state(student: TriplaneTurboGenerator, state: dict[str, Tensor]) -> None:
    """Load `adapter_state`; AdapterMismatch, before anything is changed, if a key or a shape differs."""
    own = adapter_state(student)
    problems = [f"missing {sorted(own.keys() - state.keys())}"] if own.keys() - state.keys() else []
    problems += [f"extra {sorted(state.keys() - own.keys())}"] if state.keys() - own.keys() else []
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise AdapterMismatch("adapter does not fit: " + "; ".join(problems))
    heads = {name.removeprefix("heads."): state[name] for name in state if name.startswith("heads.")}
    student.heads.load_state_dict(heads, strict=True)
    set_peft_model_state_dict(student.peft, {n: t for n, t in state.items() if not n.startswith("heads.")})


@torch.no_grad()
def base_hash(backbone: nn.Module) -> dict[str, str]:
    """SHA-256 of the base's weights as the adapter uses them, rounded to each half precision.

    A base loaded in, or saved from, half precision agrees with its float32 original in one of the two.
    """
    frozen = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" not in name and not name.startswith("decoder.conv_out.")
    }
    return {str(dtype).removeprefix("torch."): _digest(frozen, dtype) for dtype in HALF_PRECISIONS}


def save_adapter(student: TriplaneTurboGenerator, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the adapter, the heads and their configs to `folder`; each file appears whole or not at all.

    dtype  of the tensors on disk; None: as they are
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in student.adapter_state_dict().items()}
    heads = {name.removeprefix("heads."): state.pop(name) for name in list(state) if name.startswith("heads.")}
    record = {**asdict(student.config), "base_hash": student.base_hash()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary)
        student.peta.target_modules = sorted(student.peta.target_modules or ())
        student.peta.save_pretrained(str(new))
        save_file(state, new / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        save_file(heads, new / HEADS_WEIGHTS, metadata={"format": "pt"})
        (new / STUDENT_CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        for name in ADAPTER_FILES:
            os.replace(new / name, folder / name)


def load_adapter(student: TriplaneTurboGenerator, folder: Path, *, allow_other_base: bool = False) -> None:
    """Load what `save_adapter` wrote.

    Raises FileNotFoundError for a missing file, and AdapterMismatch, before anything is changed, for a damaged
    file, keys or shapes that differ, or another base (unless allow_other_base=True).
    """
    _, record = read_configs(folder)
    recorded, own = record["base_hash"], student.base_hash()
    if not allow_other_base and not any(recorded.get(name) == digest for name, digest in own.items()):
        raise AdapterMismatch(
            f"{folder}: trained on the base {record['base']!r}, whose weights differ from those loaded "
            f"({student.config.base!r}); load that base, or pass allow_other_base=True"
        )
    state = _read_tensors(folder / ADAPTER_WEIGHTS)
    heads = _read_tensors(folder / HEADS_WEIGHTS)
    student.load_adapter_state_dict({**state, **{f"heads.{name}": tensor for name, tensor in heads.items()}})


def read_student(folder: Path) -> tuple[PetaConfig, StudentConfig]:
    """What to build a student with before `load_adapter`."""
    peta, record = read_configs(folder)
    return peta, StudentConfig(**{field.name: record[field.name] for field in fields(StudentConfig)})


def read_configs(folder: Path) -> tuple[PetaConfig, dict]:
    """The adapter's PetaConfig and the contents of config.json; AdapterMismatch if a field is missing or unknown."""
    record = json.loads((folder / STUDENT_CONFIG).read_text())
    known = {field.name for field in fields(StudentConfig)} | {"base_hash"}
    if record.keys() != known:
        raise AdapterMismatch(
            f"{folder / STUDENT_CONFIG}: missing {sorted(known - record.keys())}, extra {sorted(record.keys() - known)}"
        )
    peta = PetaConfig.from_pretrained(str(folder))
    peta.inference_mode = False
    return peta, record


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterMismatch(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def _digest(tensors: dict[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
