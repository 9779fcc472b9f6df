"""Find a saved model, and read what is recorded about its training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from prd.errors import MissingFile
from prd.hub.shipped import HUB_ID, shipped, shipped_names
from prd.loading.download import download
from prd.loading.saved_model import ADAPTER_CONFIG, ADAPTER_FILES, WEIGHTS, has_other_weights
from prd.text.trained_prompts import KEY, TrainedPrompts
from prd.utils.arguments import expanded_path

logger = logging.getLogger(__name__)

CARD, TRAINING_METADATA = "README.md", "record.json"
IN_RUNS = ("adapter", "generator")  # what a run saves its model as
METRICS = {
    "r_at_1": "R@1",
    "iou": "IoU",
    "color_error": "colour error",
    "right_topology": "right topology",
    "right_outside": "right outside",
}


def find_model(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a saved model: a shipped one, on disk (itself or in a run folder), or from the Hub.

    Raises FileNotFoundError, also where the Hub has no such repository or revision, or does not show it without token,
    and ValueError for a revision of what is not on the Hub.
    """
    path, ours = expanded_path(name_or_path, "model"), shipped(name_or_path, "model")
    if revision is not None and (ours is not None or path.exists()):
        raise ValueError(f"revision={revision!r}: {name_or_path} is on this disk and has no revisions; leave it out")
    if ours is not None:
        return ours
    if path.is_file():
        raise MissingFile(f"{path}: is a file; give the folder it lies in, {path.parent}")
    if path.is_dir():
        for folder in (path, *(path / name for name in IN_RUNS)):
            if any((folder / name).is_file() for name in (ADAPTER_CONFIG, WEIGHTS)) or has_other_weights(folder):
                return folder
        raise MissingFile(f"{path}: holds neither {ADAPTER_CONFIG} nor {WEIGHTS}; give a run folder or a saved model")
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise MissingFile(
            f"{name_or_path}: no such folder; give one of {', '.join(shipped_names())}, a run folder or a Hub id "
            "'owner/name'"
        )
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return download(str(name_or_path), [*ADAPTER_FILES, WEIGHTS, TRAINING_METADATA, CARD], hub)


def place_in_run(folder: Path, key: str) -> str | None:
    """Return what `model.{key}` of the run that a model lies in names on this disk; None if it names nothing here.

    A run folder stays on the machine and knows its places (config.yaml); the model in it may be shared and names none.
    """
    if folder.name not in IN_RUNS:
        return None
    try:
        place = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["model"][key]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return place if isinstance(place, str) and Path(place).expanduser().exists() else None


def read_training_metadata(folder: Path) -> dict[str, Any]:
    """Return what is known of a model's training: record.json beside it, else its run folder's scores.json, else {}."""
    path = folder / TRAINING_METADATA
    if not path.is_file():
        path = folder.parent / "scores.json"
        if folder.name not in IN_RUNS or not path.is_file():
            return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if path.name != TRAINING_METADATA:
            metadata = {"measured": {name: part["summary"] for name, part in metadata.items()}}
        _check(metadata)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: is ignored, for it is no record of a training run (%s)", path, error)
        return {}
    return metadata


def _check(metadata: object) -> None:
    """Raise TypeError or ValueError unless the model card can be written of this metadata."""
    if not isinstance(metadata, dict):
        raise TypeError(f"it holds a {type(metadata).__name__}, not an object")
    measured, held_out = metadata.get("measured"), metadata.get("held_out")
    if not isinstance(held_out, list | None) or not isinstance(measured, dict | None):
        raise TypeError("held_out must be a list and measured an object")
    if KEY in metadata:
        TrainedPrompts.from_dict(metadata[KEY])
    for name, row in (measured or {}).items():
        if not isinstance(row, dict) or any(type(row[key]) not in (int, float) for key in METRICS if key in row):
            raise TypeError(f"measured {name!r} must hold numbers by name")
