"""Where recorded reference data lies: the folder that PRD_FIXTURES names, else the repository's own compact set."""

from __future__ import annotations

import atexit
import hashlib
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from tests.fixtures.draws import drawn, from_places, places

OWN = Path(__file__).parent / "fixtures" / "official"
INDEX = "compact.json"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, whatever their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def restored(path: Path) -> dict[str, Tensor]:
    """The tensors of one compact file, those that are stored as draws computed from them."""
    data = lzma.decompress(path.read_bytes())
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    for name, draw in json.loads(metadata.get("draws", "{}")).items():
        difference = tensors[name]
        value = from_places(places(drawn(difference.numel(), draw)) + difference.flatten().long().numpy())
        tensors[name] = torch.from_numpy(value.copy()).view(difference.shape)
    return tensors


def unpack(compact: Path, folder: Path) -> None:
    """Write a compact set of recordings in their original layout; ValueError if a file is not the recorded one."""
    index: dict[str, Any] = json.loads((compact / INDEX).read_text(encoding="utf-8"))
    for path in compact.rglob("*.json"):
        if path.name != INDEX:
            target = folder / path.relative_to(compact)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    stored: dict[str, dict[str, Tensor]] = {}
    for name, entry in index.items():
        source = entry["stored"]
        if source not in stored:
            stored[source] = restored(compact / source)
            if digest(stored[source]) != entry["sha256"]:
                raise ValueError(f"{compact / source}: does not give the recorded tensors; check the file out anew")
        tensors, target = stored[source], folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if "order" not in entry:
            save_file(tensors, target)
            continue
        state = {key: tensors[key] for key in entry["order"]}
        torch.save(state if entry["wrap"] is None else {**entry["wrap"], "state_dict": state}, target)


@contextmanager
def original_layout(folder: Path) -> Iterator[Path]:
    """A folder of recordings in their original layout: `folder`, or a temporary one if `folder` is a compact set."""
    if not (folder / INDEX).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="prd_recordings_") as temporary:
        unpack(folder, Path(temporary))
        yield Path(temporary)


@cache
def _official() -> Path:
    given = os.environ.get("PRD_FIXTURES")
    folder = Path(given) / "official" if given else OWN
    if not folder.is_dir():
        remedy = "set PRD_FIXTURES to the folder that holds official/, or unset it to use the repository's own"
        raise FileNotFoundError(f"{folder}: no such folder of recordings; {remedy}")
    context = original_layout(folder)
    original = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return original


def __getattr__(name: str) -> Path:
    """`OFFICIAL`, the recordings in their original layout, unpacked when it is first asked for."""
    if name == "OFFICIAL":
        return _official()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
