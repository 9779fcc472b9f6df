"""Files of weights: which ones of a folder hold its model, and their tensors; everything else is named in one sentence.

A folder holds a model as one safetensors file or as shards with an index, plain or in a half precision
(`model.fp16.safetensors`). Hidden files are not looked at, and pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prd.errors import CheckpointError

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers' and of transformers' files
VARIANTS = (None, "fp16", "bf16")  # the first that is there is read
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLED = (
    "pickled weights are never loaded, for a pickle can run code; convert it to safetensors where you trust it, with "
    "safetensors.torch.save_file(torch.load(PICKLE, weights_only=True), NAME), or at "
    "https://huggingface.co/spaces/safetensors/convert"
)
POINTER = b"version https://git-lfs.github.com/spec/"
AGAIN = "copy or download it again"
STORED = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, by name, without the hidden ones (macOS leaves `._NAME` beside each file it copies)."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def is_pointer(path: Path) -> bool:
    """Return True if a file is what Git LFS leaves in the place of one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def check_no_pointer(path: Path) -> None:
    """Raise CheckpointError for the pointer that Git LFS leaves in the place of a file that was not fetched."""
    if is_pointer(path):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer and not the file itself; run `git lfs pull` in its clone, or download the "
            "file"
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; CheckpointError for a Git LFS pointer, for no JSON, and for JSON that is no object."""
    check_no_pointer(path)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); {AGAIN}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: must hold an object, not a {type(contents).__name__}; {AGAIN}")
    return contents


def find_weights(folder: Path, stems: Sequence[str] = STEMS) -> list[Path]:
    """The safetensors files that hold a folder's model: the plain ones, else those of a half precision.

    stems  what their names begin with, the likeliest first

    Raises CheckpointError where there are none (naming pickles, which are not loaded), for an index or shards of which
    some are missing, and for Git LFS pointers if nothing else is there.
    """
    names = {f"{path.stem}{path.suffix.lower()}": path for path in visible_files(folder)}
    pointers: list[Path] = []
    for variant in VARIANTS:
        for stem in stems:
            files = _files_of(names, folder, stem, variant)
            found = [path for path in files if is_pointer(path)]
            if files and not found:
                return files
            pointers += found
    for path in pointers:
        check_no_pointer(path)
    if pickled := [name for name in names if name.endswith(PICKLES)]:
        raise CheckpointError(f"{folder / pickled[0]}: {PICKLED}")
    raise CheckpointError(
        f"{folder}: has no weights, {stems[0]}.safetensors or its shards; copy or download the whole folder (and "
        f"convert pickled weights, as {Path(stems[0]).stem}.bin, to safetensors first)"
    )


def _files_of(names: dict[str, Path], folder: Path, stem: str, variant: str | None) -> list[Path]:
    """One file or all shards of a variant; a pointer stands for what it points to; [] if nothing of it is there."""
    dotted = f".{variant}" if variant else ""
    if single := names.get(f"{stem}{dotted}.safetensors"):
        return [single]
    for index in (f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors.index.json"):
        if index in names:
            if is_pointer(names[index]):
                return [names[index]]
            needed = _listed(names[index])
            break
    else:
        pattern = re.compile(rf"({re.escape(stem + dotted)}-)\d{{5}}(-of-(\d{{5}}){re.escape('.safetensors')})")
        late = re.compile(rf"({re.escape(stem)}-)\d{{5}}(-of-(\d{{5}}){re.escape(dotted + '.safetensors')})")
        shards = [match for name in names if (match := pattern.fullmatch(name) or late.fullmatch(name))]
        if not shards:
            return []
        first = shards[0]
        needed = [f"{first[1]}{i:05d}{first[2]}" for i in range(1, int(first[3]) + 1)]
    if missing := [name for name in needed if name not in names]:
        raise CheckpointError(
            f"{folder}: lacks {len(missing)} of the {len(needed)} files of its weights, {missing[0]} first; copy or "
            "download them too"
        )
    return [names[name] for name in needed]


def _listed(index: Path) -> list[str]:
    """The names of the files that an index lists; CheckpointError if it is none."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        listed = sorted({entry for entry in entries if Path(entry).name == entry})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of weights ({type(error).__name__}: {error}); {AGAIN}") from error
    if not listed or len(listed) < len(set(entries)):
        raise CheckpointError(f"{index}: must list files beside it; {AGAIN}")
    return listed


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, mapped from the disk.

    Raises CheckpointError for a file that is a pickle, a Git LFS pointer, damaged or cut short, and for a tensor that
    two of them hold.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        check_no_pointer(path)
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(f"{path}: {PICKLED}")
        try:
            with safe_open(path, framework="pt") as file:
                own = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError) as error:  # the last two: a header of no known type
            raise CheckpointError(f"{path}: is not a whole safetensors file ({error}); {AGAIN}") from error
        if twice := own.keys() & tensors.keys():
            raise CheckpointError(f"{path}: holds {min(twice)}, as another file of the same weights does; {AGAIN}")
        tensors |= own
    return tensors


def stored_types(files: Iterable[Path], unused: Callable[[str], bool]) -> set[str]:
    """safetensors' names of the types of the tensors in some files, but for those that are not used."""
    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys() if not unused(key)}  # noqa: SIM118
    return found


def stored_dtype(names: Iterable[str]) -> torch.dtype:
    """The type that holds weights of all these types (by safetensors' names) exactly; ValueError for no such types."""
    found = set(names)
    if unknown := found - STORED.keys():
        raise ValueError(f"holds {', '.join(sorted(unknown))} tensors; give weights in float32, float16 or bfloat16")
    dtypes = {STORED[name] for name in found}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def has_non_finite(tensor: Tensor) -> bool:
    """Whether a tensor of numbers holds NaN or infinity."""
    return bool(tensor.numel()) and tensor.is_floating_point() and not all(end.isfinite() for end in tensor.aminmax())
