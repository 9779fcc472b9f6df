"""Checkpoints that are whole or absent: tensors as safetensors, the rest as JSON, nothing pickled.

    save_checkpoint(run, step, {"adapter": weights, "optimizer": tensors, "rng": rng_state()}, state, total_limit=3)
    checkpoint = load_checkpoint(latest_checkpoint(run))

A checkpoint is a folder `checkpoint-N` with one `.safetensors` file a group, `state.json` and `manifest.json`, which
lists the size and SHA-256 of every file. It is written aside, flushed to the disk and renamed, so that a run killed at
any moment leaves the last whole one behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prd.errors import CheckpointError as CheckpointError
from prd.loading.weights import visible_files
from prd.utils.arguments import expanded_path
from prd.utils.files import flush, move

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
TensorGroups = Mapping[str, Mapping[str, Tensor]]
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint folder."""

    step: int  # optimiser steps done
    tensors: dict[str, dict[str, Tensor]]  # by group, on the CPU
    state: dict[str, Any]  # plain values


def save_checkpoint(
    run: str | Path, step: int, tensors: TensorGroups, state: Mapping[str, Any], *, total_limit: int | None = None
) -> Path:
    """Write `run/checkpoint-{step}` and, once it is on the disk, remove the oldest beyond `total_limit`.

    tensors  by group; a group's name becomes its file's
    state    what JSON can hold; tuples come back as lists

    Returns the checkpoint's folder. Raises CheckpointError if it cannot be written; those before it stay as they are.
    """
    if step < 0:
        raise CheckpointError(f"step={step}: must not be negative")
    if total_limit is not None and total_limit < 1:
        raise CheckpointError(f"total_limit={total_limit}: must be None (keep all) or at least 1")
    run = expanded_path(run, "run")
    final, aside, replaced = (run / name for name in (f"checkpoint-{step}", f".writing-{step}", f".replaced-{step}"))
    for leftover in (*run.glob(".writing-*"), *run.glob(".replaced-*")):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write(aside, step, tensors, state)
        if final.exists():
            move(final, replaced)
        move(aside, final)
    except (OSError, SafetensorError) as error:  # a full disk, mostly: give back what was taken of it
        shutil.rmtree(aside, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        last = max((n for n, _ in _checkpoints(run)), default=None)
        kept = (
            "there is none before it"
            if last is None
            else f"checkpoint-{last} is whole, --resume_from_checkpoint latest"
        )
        raise CheckpointError(f"{final} could not be written ({error}); {kept}") from error
    flush(run)
    shutil.rmtree(replaced, ignore_errors=True)
    if total_limit is not None:
        for _, old in _checkpoints(run)[:-total_limit]:
            if old != final:
                _remove(old)
    return final


def _remove(old: Path) -> None:
    """Remove a checkpoint that is no longer wanted; one that stays costs no more than its room."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        logger.warning("%s: could not be removed (%s); remove it yourself", old, error)


def _write(folder: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    folder.mkdir(parents=True)
    for group, values in tensors.items():
        # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        save_file(copies, folder / f"{group}.safetensors")
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def verify_checkpoint(folder: str | Path) -> int:
    """The step of a checkpoint whose files all match the manifest in size and SHA-256; else `CheckpointError`."""
    folder = expanded_path(folder, "checkpoint")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error}); give a folder checkpoint-N") from None
    present = {path.name for path in visible_files(folder)} - {MANIFEST}
    if present != set(files):
        raise CheckpointError(f"{folder}: holds {sorted(present)}, its manifest lists {sorted(files)}")
    for name, expected in files.items():
        if _digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is truncated or altered: it differs from its manifest")
    return step


def latest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it has none; damaged ones are passed over with a warning.

    Raises `CheckpointError` if there are checkpoints and all are damaged.
    """
    found = _checkpoints(expanded_path(run, "run"))
    for _, folder in reversed(found):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
        else:
            return folder
    if found:
        raise CheckpointError(f"{run}: every checkpoint is damaged; remove them to start anew")
    return None


def archive_newer_checkpoints(run: str | Path, step: int) -> list[Path]:
    """Rename a run's checkpoints of steps after `step` to `abandoned-checkpoint-N`; returns their new places.

    For a run that goes on from `step`: "latest" would else lead back to what it left, and `total_limit` count it.
    """
    moved = []
    for folder in [folder for n, folder in _checkpoints(expanded_path(run, "run")) if n > step]:
        names = (f"abandoned-{folder.name}", *(f"abandoned-{folder.name}.{i}" for i in range(2, 1000)))
        place = next(place for name in names if not (place := folder.with_name(name)).exists())
        moved.append(folder.rename(place))
    return moved


def named_checkpoint(name: str, run: str | Path) -> Path:
    """The folder a name means: itself if it is one, else the one of that name in the run's folder."""
    given = expanded_path(name, "resume_from_checkpoint")
    return given if given.is_dir() else expanded_path(run, "run") / given


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Verify a checkpoint and read all of it; `CheckpointError` if it is damaged."""
    folder = expanded_path(folder, "checkpoint")
    step = verify_checkpoint(folder)
    try:
        tensors = {path.stem: load_file(path) for path in visible_files(folder) if path.suffix == ".safetensors"}
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return Checkpoint(step, tensors, state)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors "{parameter}.{name}" and plain values, for one group and `state`."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, values in content["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{parameter}.{name}"] = value
    return tensors, {"scalars": scalars, "groups": content["param_groups"]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Undo `optimizer_state`; `CheckpointError` if the parameters are others in number or shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counts = [len(group["params"]) for group in plain["groups"]]
    if counts != [len(group["params"]) for group in optimizer.param_groups]:
        raise CheckpointError(f"optimizer: saved with {counts} parameters a group, has {len(parameters)} in all")
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *plain["scalars"].items()):
        number, _, name = key.partition(".")
        index = int(number)
        if isinstance(value, Tensor) and value.dim() and value.shape != parameters[index].shape:
            shapes = f"{tuple(value.shape)} for a parameter of shape {tuple(parameters[index].shape)}"
            raise CheckpointError(f"optimizer: {key} has shape {shapes}; the model is another")
        state.setdefault(index, {})[name] = value
    groups = [
        {name: tuple(value) if name == "betas" else value for name, value in group.items()} for group in plain["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> dict[str, Tensor]:
    """The state of Python's, NumPy's and torch's global generators (CPU and every CUDA device) as tensors."""
    _, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    extra = [numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]]
    tensors = {
        "python": torch.tensor(python, dtype=torch.int64, device="cpu"),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64, device="cpu"),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_extra": torch.tensor(extra, dtype=torch.float64, device="cpu"),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors.update({f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return tensors


def set_rng_state(tensors: Mapping[str, Tensor]) -> None:
    """Undo `rng_state`; generators of CUDA devices that are absent now are left out with a warning."""
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = tensors["numpy_extra"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": int(position)},
            "has_gauss": int(has_gauss),
            "gauss": cached,
        }
    )
    torch.set_rng_state(tensors["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name, state in tensors.items():
        kind, _, index = name.partition(".")
        if kind == "cuda" and int(index) < devices:
            torch.cuda.set_rng_state(state, int(index))
        elif kind == "cuda":
            warnings.warn(f"the checkpoint's generator {name} has no device here; draws will differ", stacklevel=2)


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps; CheckpointError if there is none."""
    found = [folder for _, folder in _checkpoints(run)]
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint-N; give the folder of a run")
    return found


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of every `checkpoint-N`, oldest first."""
    if not run.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
