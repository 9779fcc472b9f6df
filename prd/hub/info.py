"""Facts of a saved model, read off its configs and the headers of its weights: nothing of it is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from prd.errors import CheckpointError
from prd.hub.find import CARD, find_model, read_training_metadata
from prd.hub.shipped import about, public_base, public_encoder, shipped
from prd.loading.saved_model import ADAPTER_CONFIG, OWN_CLASS, read_json, read_record
from prd.loading.weights import visible_files
from prd.text.trained_prompts import KEY

BOOKKEEPING = {"_class_name", "_prd_version", "generator", "weights_hash", "text_hash", "base_hash", OWN_CLASS}
NAMED_APART = {"base", "base_revision", "prediction_type", "noise_schedule", "text_encoder"}  # not among the settings
PETA = ("r", "plane_channels", "num_planes")  # of adapter_config.json
OF_BASE = "that of the base model"
OF_TEACHERS = "that of the teachers it was trained with"


def model_info(name_or_path: str | Path, revision: str | None = None, **hub: Any) -> dict[str, Any]:
    """Return plain values about a model: class, base, sizes, words, training, licence, files.

    name_or_path  a shipped name, a run folder, a saved model, or a Hub id
    revision      on the Hub; hub: token, cache_dir and local_files_only, as for `find_model`

    Raises FileNotFoundError without a model there, and ModelMismatch for a record that is none.
    """
    folder = find_model(name_or_path, revision, **hub)
    record, metadata = read_record(folder), read_training_metadata(folder)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    settings = {name: value for name, value in record.items() if name not in BOOKKEEPING | NAMED_APART}
    if is_adapter:
        peta = read_json(folder / ADAPTER_CONFIG, "copy the whole folder")
        settings |= {("rank" if name == "r" else name): peta[name] for name in PETA if name in peta}
    files = {path.name: path.stat().st_size for path in visible_files(folder) if path.is_file()}
    parameters, dtypes = _counted(folder)
    steps = record.get("num_inference_steps", 1)
    return {
        "name": str(name_or_path),
        "class": record.get(OWN_CLASS, record["_class_name"]),
        "kind": f"an adapter that denoises in {steps} steps" if is_adapter else "a model of a single pass",
        "folder": str(folder),
        "saved_by": f"prd {record.get('_prd_version', 'of an unknown version')}",
        "base": _base(record) if is_adapter else None,
        "text_encoder": None if is_adapter else _encoder(record),
        "parameters": parameters,
        "dtypes": dtypes,
        "settings": settings,
        KEY: metadata.get(KEY),
        "training": {name: value for name, value in metadata.items() if name != KEY},
        "licence": _licence(folder, record, is_adapter),
        "files": files,
        "bytes": sum(files.values()),
    }


def _base(record: dict[str, Any]) -> dict[str, Any]:
    name = public_base(record.get("base", ""), record.get("base_revision"))
    place = shipped(name, "base") if name else None
    found = {
        "name": name or None,
        "revision": record.get("base_revision"),
        "prediction_type": record.get("prediction_type"),
        "hash": record.get("base_hash"),
    }
    return found if place is None else {**found, "parameters": _counted(place)[0], "bytes": _size(place)}


def _encoder(record: dict[str, Any]) -> dict[str, Any]:
    name = public_encoder(record.get("text_encoder", ""))
    return {"name": name or None, "hash": record.get("text_hash")}


def _counted(folder: Path) -> tuple[int, list[str]]:
    """The number of values in a folder's safetensors files, and their types, off the headers."""
    count, types = 0, set[str]()
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    size = 1
                    for length in part.get_shape():
                        size *= length
                    count += size
                    types.add(part.get_dtype())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            fault = f"{path}: is no whole safetensors file ({error}); copy or download it again"
            raise CheckpointError(fault) from None
    return count, sorted(types)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _licence(folder: Path, record: dict[str, Any], is_adapter: bool) -> str:
    """The licence that the card names, else that of what ships, else whose it is."""
    card = folder / CARD
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            named = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError:
            named = None
        if isinstance(named, dict) and isinstance(named.get("license"), str) and named["license"] != "other":
            return str(named["license"])
    known = about(str(record.get("base" if is_adapter else "text_encoder", "")))
    return str(known.get("license", OF_BASE if is_adapter else OF_TEACHERS))
