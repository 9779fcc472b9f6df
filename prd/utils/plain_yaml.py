"""Safe YAML as in the core schema of version 1.2: `no`, dates and 1:30 are text, 010 is ten; no key is given twice.

A number that is not written as Python writes it, as 007 or 0x10, remembers how it stood there: where text is wanted, it
is that text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

INTEGER = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
BOOL = re.compile("^(?:true|True|false|False)$")


class WrittenInt(int):
    """An integer whose `str` is the text that it was read from."""

    written: str

    def __str__(self) -> str:
        return self.written


class WrittenFloat(float):
    """A float whose `str` is the text that it was read from."""

    written: str

    def __str__(self) -> str:
        return self.written


class PlainLoader(yaml.SafeLoader):
    """Loads plain values: mappings, lists, numbers, true, false, null and text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """The integer of a scalar."""
        text = node.value
        try:
            value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError as error:  # of thousands of digits
            raise yaml.constructor.ConstructorError(problem=f"an integer is too long ({error})") from None
        if str(value) == text:
            return value
        kept = WrittenInt(value)
        kept.written = text
        return kept

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """The float of a scalar."""
        text = node.value
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if str(value) == text:
            return value
        kept = WrittenFloat(value)
        kept.written = text
        return kept


_REPLACED = ("bool", "int", "float", "timestamp")
PlainLoader.yaml_implicit_resolvers = {
    first: kept
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in _REPLACED])
}
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_integer)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_number)


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text; yaml.YAMLError if it is none."""
    return yaml.load(text, Loader=PlainLoader)


def parse_texts(text: str) -> list[str]:
    """A list of YAML, as [a red cube, 007], whose entries are text as they are written; yaml.YAMLError for others."""
    values = yaml.load(text, Loader=yaml.BaseLoader)
    if not isinstance(values, list):
        raise yaml.YAMLError("something follows the list")
    if others := [value for value in values if not isinstance(value, str)]:
        raise yaml.YAMLError(f"{others[0]!r} is no text")
    return values
