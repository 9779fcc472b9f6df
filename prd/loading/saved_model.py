"""The folder of a saved model: one writer and one strict reader, whatever the model.

config.json          the model's class (its import path too, of one's own) and settings, and the SHA-256 of its weights
*.safetensors        its weights

Files are written aside, hashed and renamed, so that each appears whole or not at all, config.json last. Reading checks
that each file is the recorded one, and that its tensors are the model's own in name, shape and kind.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prd.errors import CheckpointError, MissingFile, ModelMismatch
from prd.loading.weights import PICKLED, PICKLES, read_object, read_tensors, visible_files
from prd.utils.arguments import expanded_path
from prd.utils.dtypes import check_dtype
from prd.utils.files import move
from prd.utils.imports import import_path

CONFIG = "config.json"
OWN_CLASS = "_class_path"  # in config.json: the import path of a class that is not the library's
WEIGHTS = "model.safetensors"  # of a single-pass model
ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEADS_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "heads.safetensors",
)
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEADS_WEIGHTS, CONFIG)
SHOWN = 5  # names listed in an error


def save_model(
    folder: str | Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    record: Callable[[dict[str, str]], dict[str, Any]],
    *,
    dtype: torch.dtype | None = None,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model's folder; each file appears whole or not at all.

    weights       tensors by name, for each file name
    record        returns the contents of config.json, given the SHA-256 of each file of weights by its name
    dtype         of the tensors on disk; None: as they are
    write_beside  writes further files into the folder that it is given

    Raises ValueError for another dtype, and OSError where the folder cannot be written.
    """
    check_dtype(dtype)
    folder = expanded_path(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary)
        if write_beside is not None:
            write_beside(new)
        for name, tensors in weights.items():
            state = {key: t.detach().cpu().to(dtype or t.dtype).contiguous() for key, t in tensors.items()}
            save_file(state, new / name, metadata={"format": "pt"})
        contents = record({name: file_hash(new / name) for name in weights})
        (new / CONFIG).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        mode = (new / CONFIG).stat().st_mode  # as the umask says; safetensors' files are their owner's alone
        for path in sorted(new.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
            path.chmod(mode)
            move(path, folder / path.name)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises FileNotFoundError without one, and ModelMismatch if it is no JSON object that names its class.
    """
    record = read_json(folder / CONFIG, "give a folder that a model was saved to")
    if "_class_name" not in record:
        raise ModelMismatch(f"{folder / CONFIG}: does not say which class it is of; give a folder of a saved model")
    return record


def own_class_record(kind: type) -> dict[str, str]:
    """Return what config.json says of a class of one's own: its import path; {} for the library's and without one."""
    path = None if kind.__module__.partition(".")[0] == "prd" else import_path(kind)
    return {} if path is None else {OWN_CLASS: path}


def loader_of(record: Mapping[str, Any]) -> str:
    """Return the call that loads the model of a config.json, for messages."""
    return "prd.load_pipeline" if OWN_CLASS in record else f"prd.{record['_class_name']}.from_pretrained"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return a file's JSON object; FileNotFoundError, with the remedy, without a file, ModelMismatch for no object."""
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; {remedy}")
    try:
        return read_object(path)
    except CheckpointError as error:
        raise ModelMismatch(str(error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors; FileNotFoundError without it, ModelMismatch if it is no whole safetensors file.

    Both say what lies in its place: a pickle, a Git LFS pointer, shards or a variant, which are not what was saved.
    """
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; {_instead(path)}")
    try:
        return read_tensors([path])
    except CheckpointError as error:
        raise ModelMismatch(str(error)) from error


def has_other_weights(folder: Path) -> bool:
    """Return True if a single-pass model was saved here and its weights are not as they were: `read_weights` says."""
    return (folder / CONFIG).is_file() and any(
        path.name.startswith(("model.", "model-", "pytorch_model"))
        and (path.suffix in PICKLES or ".safetensors" in path.name)
        for path in visible_files(folder)
    )


def _instead(path: Path) -> str:
    """Say what to do about a file of weights that is not there, by what is."""
    names = [file.name for file in visible_files(path.parent)] if path.parent.is_dir() else []
    if pickled := [name for name in names if name.endswith(PICKLES)]:
        return f"{pickled[0]} is there instead, and {PICKLED}"
    if others := [name for name in names if name.startswith(path.stem) and ".safetensors" in name]:
        return (
            f"{others[0]} is there instead, and {CONFIG} records the hash of {path.name} alone; copy that file too, or "
            "save the model again"
        )
    return "copy the whole folder"


def check_hash(path: Path, recorded: object) -> None:
    """Raise ModelMismatch unless a file has the SHA-256 that config.json records."""
    if file_hash(path) != recorded:
        raise ModelMismatch(
            f"{path}: is not the file that {CONFIG} records (its SHA-256 differs); copy or download the folder again"
        )


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """List what keeps `state` from being loaded in the place of `own`: missing and extra keys, shapes, values."""
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    problems = [f"{what} {some(names)}" for what, names in (("missing", missing), ("extra", extra)) if names]
    shared = sorted(own.keys() & state.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in shared
        if own[name].shape != state[name].shape
    ]
    problems += shapes[:SHOWN] + [f"and {len(shapes) - SHOWN} more shapes"] * (len(shapes) > SHOWN)
    broken = [name for name in shared if own[name].is_floating_point() and not _is_finite(state[name])]
    return problems + ([f"{some(broken)} hold values that are no finite numbers"] if broken else [])


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def some(names: Iterable[Any]) -> str:
    """Write at most SHOWN of some names as a list, and how many there are."""
    listed = sorted(names)
    return str(listed) if len(listed) <= SHOWN else f"{str(listed[:SHOWN])[:-1]}, ...] ({len(listed)})"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
