"""The models that ship with the package: found by name, through the index of each folder of assets.

A folder `prd/*/assets` lists what it holds in its `index.json`:

    {"NAME": {"folders": {"model": "adapter", "base": "stable_diffusion", ...}, "benchmark": ..., "about": {...}}, ...}

NAME is what users write in the place of a path or a Hub id. `folders` has, by the part that is asked for, the folder
beside the index: "model" (a saved text-to-3D model), "base", "text_encoder", or the name of a teacher. `benchmark`,
optional, is the import path of a `prd.evaluation.benchmark.Benchmark`: the world that the models were trained on.
`about` has the words that model cards and warnings use, all optional:

    title           "the toy box"
    license         SPDX name of the licence of what is made on it; license_text: a paragraph about it
    prompt          an example; single_pass_prompt: one for models that answer in one pass
    examples        further ones, for both
    limits          what it does not know, a list item of Markdown
    vocabulary      every word that its text encoder was trained on
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import prd
from prd.errors import MissingFile

ASSETS: tuple[Path, ...] = tuple(sorted(Path(prd.__file__).parent.glob("*/assets")))
INDEX = "index.json"
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def shipped(name: str | Path, part: str) -> Path | None:
    """Return the folder of a part of a shipped model; None if nothing of that name ships with such a part.

    Raises FileNotFoundError for one that the index lists and that is not there.
    """
    for assets, index in _indices():
        if (folder := index.get(str(name), {}).get("folders", {}).get(part)) is not None:
            if not (assets / folder).is_dir():
                raise MissingFile(f"{assets / folder}: {name!r} has no {part!r} here; install the package again")
            return assets / folder
    return None


def shipped_names(part: str = "model") -> list[str]:
    """Return the names of what ships with such a part."""
    return [name for _, index in _indices() for name, entry in index.items() if part in entry.get("folders", {})]


def shipped_benchmark(name: str) -> str | None:
    """Return the import path of the benchmark that ships under a name; None if there is none."""
    return next((index[name].get("benchmark") for _, index in _indices() if name in index), None)


def shipped_benchmarks() -> list[str]:
    """Return the names under which a benchmark ships."""
    return [name for _, index in _indices() for name, entry in index.items() if "benchmark" in entry]


def shipped_encoders(name: str) -> list[Path]:
    """Return the folders under a name that have a text encoder of their own, each once; [] if nothing of it ships."""
    found: dict[Path, None] = {}
    for assets, index in _indices():
        for folder in index.get(name, {}).get("folders", {}).values():
            if (assets / folder / "text_encoder").is_dir():
                found[assets / folder] = None
    return list(found)


def is_shipped(name: str | Path) -> bool:
    """Return True if something of that name ships with the package."""
    return any(str(name) in index for _, index in _indices())


def public_base(name: str, revision: str | None) -> str:
    """Return the name of a base as saved models and cards have it: of what ships, or came from the Hub at a commit.

    A place on this disk is named nowhere: the hash of the weights says which base it is. Returns "" for it, also where
    it looks like a Hub id, as the folder models/sd does.
    """
    return name if is_shipped(name) or revision is not None else ""


def public_encoder(name: str) -> str:
    """Return the name of a text encoder as saved models and cards have it, "" for a place on this disk by its form."""
    return name if is_shipped(name) or (HUB_ID.fullmatch(name) and not name.lower().endswith(".safetensors")) else ""


def about(name: str) -> dict[str, Any]:
    """Return the words about what ships under a name; {} if nothing does."""
    return next((dict(index[name].get("about", {})) for _, index in _indices() if name in index), {})


def unknown_words(name: str, text: str) -> list[str]:
    """Return the words of a prompt that a shipped text encoder was not trained on; [] if it does not list its words."""
    vocabulary = about(name).get("vocabulary")
    return [] if vocabulary is None else [word for word in text.lower().split() if word not in vocabulary]


def _indices() -> list[tuple[Path, dict[str, Any]]]:
    found = [assets for assets in ASSETS if (assets / INDEX).is_file()]
    return [(assets, json.loads((assets / INDEX).read_text(encoding="utf-8"))) for assets in found]
