"""The words of a training command line: `--config NAME_OR_PATH` and dotted overrides `--section.key VALUE`.

A value is read as YAML (`--cameras.elevation "[0, 30]"`, `--ema_decay null`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from prd.errors import ConfigError
from prd.utils.plain_yaml import parse_yaml

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


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """The values that words set, nested: ["--optimizer.lr", "1e-3"] is {"optimizer": {"lr": 0.001}}."""
    values: dict[str, Any] = {}
    for key, text in split_words(words):
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text  # a prompt or a path with YAML's punctuation in it
        *sections, name = key.split(".")
        target = values
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{key}: {section}={inner!r} is not a section; give its keys as a mapping")
            target = inner
        target[name] = value
    return values
