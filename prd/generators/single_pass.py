"""What the generators share that answer a prompt in one pass: AToM, ATT3D and LATTE3D.

Text embeddings in, a Field out, by `generate`; how they are saved, and the text encoder they belong to.

model.safetensors   every tensor of the generator
config.json         its class, its settings, the hash of the weights and of the text encoder's
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prd
from prd.base_hash import TEXT, same_weights
from prd.fields import Field
from prd.rendering.alpha import AlphaModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RECORDS = ("_class_name", "_prd_version", "weights_hash", "text_hash")  # in config.json beside the settings


class GeneratorMismatch(ValueError):
    """A saved generator that is damaged, of another class, or does not fit the text encoder at hand."""


class SinglePassGenerator(nn.Module):
    """From text embeddings to a Field in one pass; a subclass writes `generate` and names its parts.

    config  the subclass's settings, a frozen dataclass with `text_encoder`, `text_length` and `text_width`: where the
            embeddings come from, and their shape [B, text_length, text_width]
    """

    folder_name = "generator"  # in a run folder
    class_name: ClassVar[str]  # in config.json
    config_class: ClassVar[Any]
    takes_shapes: ClassVar[bool] = False  # whether `generate` takes point clouds of a library's shapes

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.text_length is None or config.text_width is None:
            raise ValueError(
                f"text_length={config.text_length}, text_width={config.text_width}: must be the shape of the text "
                "encoder's embeddings"
            )
        self.config = config
        self.text_hash: dict[str, str] | None = None  # of the text encoder it was trained with, by precision

    @classmethod
    def for_encoder(cls, config: Any, encoder: Any) -> Self:
        """A fresh generator for the embeddings of this `PromptEncoder`."""
        _, length, width = encoder([""]).shape
        return cls(replace(config, text_length=length, text_width=width))

    def generate(self, prompt_embeds: Tensor, generator: Any = None) -> Field:
        """The field of each prompt; prompt_embeds [B, L, Ct]. Nothing is drawn unless a subclass says so."""
        raise NotImplementedError(f"{type(self).__name__}.generate: a generator says how embeddings become a field")

    def alpha(self) -> AlphaModel | None:
        """How the volume renderer reads its fields; None: NeuS with the renderer's own width."""
        return None

    def begin_stage(self, trained: Sequence[str] | None) -> None:
        """Prepare for a stage that trains these parts (None: all); nothing to do for most."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by the names that a stage of training may give in `trained`."""
        return {"all": list(self.parameters())}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that requires a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_embeds(self, prompt_embeds: Tensor) -> None:
        """ValueError unless prompt_embeds is [B, text_length, text_width] with B >= 1."""
        expected = (self.config.text_length, self.config.text_width)
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[1:] != expected or not len(prompt_embeds):
            raise ValueError(
                f"prompt_embeds={tuple(prompt_embeds.shape)}: expected [B, {expected[0]}, {expected[1]}], of the text "
                f"encoder of {self.config.text_encoder}"
            )

    def fits_encoder(self, hashes: Mapping[str, str]) -> bool:
        """Whether a text encoder with these `encoder_hashes` may be the one it was trained with."""
        return self.text_hash is None or same_weights(self.text_hash, hashes, TEXT)

    # -- saving and loading ------------------------------------------------------------------------------------------

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return dict(self.state_dict())

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load `trained_state_dict`; GeneratorMismatch if a key is missing or extra or a shape differs."""
        if problems := _misfits(self.state_dict(), state):
            raise GeneratorMismatch(f"state does not fit: {problems}")
        self.load_state_dict(state, strict=True)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights and the settings to `folder`; each file appears whole or not at all.

        dtype: of the tensors on disk (float32, bfloat16 or float16), None: as they are
        """
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype!r}: must be torch.float32, torch.bfloat16, torch.float16 or None")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            new = Path(temporary)
            save_file({n: t.contiguous() for n, t in state.items()}, new / WEIGHTS, metadata={"format": "pt"})
            record = {
                "_class_name": self.class_name,
                "_prd_version": prd.__version__,
                **asdict(self.config),
                "weights_hash": _file_hash(new / WEIGHTS),
                "text_hash": self.text_hash,
            }
            (new / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            mode = (new / CONFIG).stat().st_mode  # as the umask says; safetensors' files are their owner's alone
            for name in (WEIGHTS, CONFIG):
                (new / name).chmod(mode)
                os.replace(new / name, folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """What `save_pretrained` wrote, in float32.

        Raises FileNotFoundError for a missing file, and GeneratorMismatch for one of another class, a damaged one, and
        keys or shapes that differ.
        """
        folder = Path(folder)
        record = read_record(folder)
        if record["_class_name"] != cls.class_name:
            raise GeneratorMismatch(
                f"{folder / CONFIG}: _class_name is {record['_class_name']!r}, expected {cls.class_name!r}"
            )
        known = {field.name for field in fields(cls.config_class)}
        missing, extra = sorted(known - record.keys()), sorted(record.keys() - known - set(RECORDS))
        if missing or extra:
            raise GeneratorMismatch(
                f"{folder / CONFIG}: missing {missing}, extra {extra}; saved by prd {record.get('_prd_version')}, read "
                f"by {prd.__version__}: use the version that saved it"
            )
        model = cls(_settings(cls, folder, {name: record[name] for name in known}))
        state = _read_weights(folder, record)
        if problems := _misfits(model.state_dict(), state):
            raise GeneratorMismatch(f"{folder / WEIGHTS} does not fit its {CONFIG}: {problems}")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
        model.text_hash = record["text_hash"]
        return model.eval()


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of config.json; FileNotFoundError without one, GeneratorMismatch if it is no object."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing; give a folder that a generator was saved to")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GeneratorMismatch(f"{path}: is no JSON ({error}); copy or download it again") from error
    if not isinstance(record, dict) or "_class_name" not in record:
        raise GeneratorMismatch(f"{path}: does not say which class it is of; give a folder of a saved generator")
    return record


def _settings(cls: type[SinglePassGenerator], folder: Path, values: dict[str, Any]) -> Any:
    try:
        return cls.config_class(**values)
    except ValueError as error:
        raise GeneratorMismatch(f"{folder / CONFIG}: {' '.join(str(error).split())}") from error


def _read_weights(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; copy the whole folder")
    if _file_hash(path) != record.get("weights_hash"):
        raise GeneratorMismatch(f"{path}: is not the file that {CONFIG} records; copy or download the folder again")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GeneratorMismatch(f"{path}: cannot be read ({error}); copy or download it again") from error


def _misfits(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What keeps `state` from being the model's own; "" if nothing does."""
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    found = [f"{what} {names[:5]} ({len(names)})" for what, names in (("missing", missing), ("extra", extra)) if names]
    return "; ".join(found + shapes[:5])


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
