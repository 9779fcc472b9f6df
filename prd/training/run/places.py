"""Check that what a config names is on this machine, before anything is loaded or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prd.data.prompts import check_source
from prd.errors import ConfigError, PrdError
from prd.hub.shipped import HUB_ID, is_shipped
from prd.training.run.checkpoints import named_checkpoint
from prd.training.run.models import model_faults

if TYPE_CHECKING:
    from prd.training.config import TrainConfig


HERE = "(a place on this machine)"


def without_places(values: Any) -> Any:
    """Return a config's plain values with `HERE` for each place on this machine: what a tracker may upload.

    A place is a path by its form, or the name of a file or folder that is here.
    """
    if isinstance(values, dict):
        return {key: without_places(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_places(value) for value in values]
    return HERE if isinstance(values, str) and _is_place(values) else values


def _is_place(text: str) -> bool:
    has_form = text.startswith(("/", "~", "./", "../")) or "\\" in text or re.match("[A-Za-z]:", text) is not None
    return not is_shipped(text) and bool(text) and (has_form or os.path.exists(os.path.expanduser(text)))


def check_places(config: TrainConfig) -> None:
    """Raise for a file or folder named in the config that does not exist, or holds another model than it should.

    What may be a Hub id ("owner/name") is left to the function that loads it. Raises CorpusError for the corpus and
    ConfigError for every other place.
    """
    for fault in place_faults(config):
        raise fault


def place_faults(config: TrainConfig) -> Iterator[PrdError]:
    """Every reason for which `check_places` would raise, the corpus first."""
    try:
        check_source(config.prompts)
    except PrdError as error:
        yield error
    for key, folder in (("prompts.embeddings", config.prompts.embeddings), ("library.source", config.library.source)):
        if folder is not None and not is_shipped(folder) and not Path(folder).is_dir():
            yield ConfigError(f"{key}={folder!r}: no such folder; correct it or leave it out")
    for key, place in _models(config).items():
        if not _is_known(place):
            yield ConfigError(f"{key}={place!r}: no such file or folder; correct it or give a Hub id 'owner/name'")
    name = config.resume_from_checkpoint
    if name not in (None, "latest") and not named_checkpoint(name, config.output_dir).exists():
        yield ConfigError(
            f"resume_from_checkpoint={name!r}: neither a folder nor a checkpoint in {config.output_dir}; give one of "
            "these or 'latest'"
        )
    yield from model_faults(config)


def _models(config: TrainConfig) -> dict[str, str]:
    """The models that the run loads, by the keys of the config that name them."""
    places = {
        "init_from": config.init_from,
        "model.base": getattr(config.model, "base", None),
        "model.text_encoder": getattr(config.model, "text_encoder", None),
    }
    for name, teacher in config.teachers.items():
        if getattr(teacher, "enabled", False):
            keys = ("path", "controlnet", "adapter")
            places |= {f"teachers.{name}.{key}": getattr(teacher, key, None) for key in keys}
    return {key: place for key, place in places.items() if place is not None}


def _is_known(place: str) -> bool:
    """Return True if a model is shipped, on this disk, or named by what may be a Hub id."""
    return is_shipped(place) or Path(place).exists() or HUB_ID.fullmatch(place) is not None
