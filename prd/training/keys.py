"""The keys of a configuration, and one sentence about a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ValidationError

from prd.errors import ConfigError
from prd.training.classes import SECTIONS, Entry, setting_names
from prd.training.config import TrainConfig


def known_keys(parts: Sequence[Entry]) -> list[str]:
    """The dotted key of every value that a config with these parts may have."""
    own = [key for part in parts for key in (f"{part.key}.class", *_setting_keys(part.config_class, f"{part.key}."))]
    bare = [part.key for part in parts if part.section.shorthand is not None]
    return [*_static_keys(TrainConfig), *bare, *own]


def _setting_keys(config_class: type, prefix: str) -> Iterator[str]:
    """The keys of a part's settings, and of settings within them."""
    nested = [key for key, _ in _annotations(config_class, prefix)]
    for name in setting_names(config_class):
        inner = [key for key in nested if key.startswith(f"{prefix}{name}.")]
        yield from inner or [f"{prefix}{name}"]


def _static_keys(section: type, prefix: str = "") -> Iterator[str]:
    """The keys that do not depend on the classes of the parts."""
    for f in dataclasses.fields(section):
        if not prefix and (f.name in SECTIONS or f.name == "classes"):
            continue
        inner: Any = f.default_factory
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _static_keys(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def kinds_of(parts: Sequence[Entry]) -> dict[str, Any]:
    """The annotation of every dotted key that a config with these parts may have, where it can be told."""
    kinds = dict(_annotations(TrainConfig))
    for part in parts:
        kinds |= {f"{part.key}.class": str, **dict(_annotations(part.config_class, f"{part.key}."))}
    return kinds


def _annotations(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    try:
        hints = get_type_hints(section, include_extras=True)
    except (NameError, TypeError):  # of a class of the user's own, whose annotations cannot be evaluated here
        return
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(kind := hints[f.name]) and isinstance(kind, type):
            yield from _annotations(kind, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", kind


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def check_keys(values: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Raise `ConfigError` with the nearest known key for one that is neither a value nor a section of the config."""
    allowed = {*with_sections(known), *SECTIONS}
    for key in leaves(values):
        if key not in allowed:
            same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
            nearest = difflib.get_close_matches(key, same_name or known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown config key {key!r}; the nearest known key is {nearest!r}")


def with_sections(keys: Sequence[str]) -> set[str]:
    """The dotted keys of all values and of all sections."""
    return set(keys).union(*({key[:i] for i, letter in enumerate(key) if letter == "."} for key in keys))


def explain(error: ValidationError, known: Sequence[str], section: str = "") -> str:
    """One sentence about the first wrong value: its dotted key, the value and what is allowed.

    section  the dotted key of what was validated; "": the whole config
    """
    prefix = section.split(".") if section else []
    first, *others = error.errors(include_url=False)
    path = [*prefix, *map(str, first["loc"])]
    keys = with_sections(known)
    while path and ".".join(path) not in keys:
        path.pop()  # pydantic ends the location of a union by its branch, of a tuple by its index
    messages = [first["msg"]] + [e["msg"] for e in others if [*prefix, *map(str, e["loc"])][: len(path)] == path]
    text = ", or ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in messages))
    key = ".".join(path)
    if first["type"] == "value_error":
        return f"{key}: {text}" if key else text
    return f"{key}={first['input']!r}: {text}"
