"""The words of a training command line: `--config NAME_OR_PATH` and dotted overrides `--section.key VALUE`.

What a value is read as depends on what its key holds:

    text          the words as they are: --output_dir 007, --teachers.mvdream.negative_prompt "ugly # blurry"
    text or null  the same, and null for none: --init_from null
    texts         a list in brackets, --validation.prompts "[a red cube, 007]", whose entries are text as they stand, in
                  quotes where they hold a comma, a bracket, ": " or " #"; anything else is one text as it is
    others        YAML: --cameras.elevation "[0, 30]", --ema_decay null, --optimizer "{lr: 1e-3}"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from prd.errors import ConfigError
from prd.utils.plain_yaml import parse_texts, parse_yaml

SWITCHES = ("start_afresh", "allow_config_change")  # need no value


def split_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe that a command line names (default "toybox"), and its other words."""
    config, overrides = "toybox", []
    for key, value in split_words(argv):
        if key == "config":
            config = value
        else:
            overrides.append(f"--{key}={value}")
    return config, overrides


def split_words(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--key value` and `--key=value` as pairs of text; hyphens in a key are underscores."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{word!r}: expected --key value or --key=value, as --optimizer.lr 1e-3")
        if not equals and key.replace("-", "_") in SWITCHES and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        yield key.replace("-", "_"), value


def parse_overrides(words: Sequence[str], kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values that words set, nested: ["--optimizer.lr", "1e-3"] is {"optimizer": {"lr": 0.001}}.

    kinds  the annotation of each key that is known; the values of others are read as YAML

    Raises ConfigError for a list of texts that is none.
    """
    values: dict[str, Any] = {}
    for key, text in split_words(words):
        value = _value(key, text, (kinds or {}).get(key))
        *sections, name = key.split(".")
        target = values
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{key}: {section}={inner!r} is not a section; give its keys as a mapping")
            target = inner
        target[name] = value
    return values


def _value(key: str, text: str, kind: Any) -> Any:
    """The value of a key's text, read as its annotation asks for."""
    members = list(_members(kind))
    if not members or not all(member is NoneType or _is_text(member) or _is_texts(member) for member in members):
        try:
            return parse_yaml(text)
        except yaml.YAMLError:
            return text  # a path of a part that is not known yet; else the key's own check refuses it
    if text == "null" and NoneType in members:
        return None
    if not any(map(_is_texts, members)):
        return text
    if text.lstrip().startswith("["):
        try:
            return parse_texts(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(
                f"{key}={text!r}: is no list of texts ({reason}); put an entry with a comma, a bracket, ': ' or ' #' "
                "in quotes"
            ) from None
    return text if any(map(_is_text, members)) else [text]


def _members(kind: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without what checks them."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    elif kind is not None:
        yield kind


def _is_text(member: Any) -> bool:
    if get_origin(member) is Literal:
        return all(isinstance(choice, str) for choice in get_args(member))
    return member is str


def _is_texts(member: Any) -> bool:
    return get_origin(member) in (tuple, list) and all(
        inner is Ellipsis or all(map(_is_text, _members(inner))) for inner in get_args(member)
    )
