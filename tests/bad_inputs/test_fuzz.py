"""Random values, words, files and damages: they are taken as they are, or refused by the library's own errors.

PRD_FUZZ_EXAMPLES=5000 pytest tests/bad_inputs/test_fuzz.py      # new examples each time; without it, always the same
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prd.data.prompts import PromptsConfig, load_corpus
from prd.errors import PrdError
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.loading.stable_diffusion import load_base
from prd.training.classes import entries
from prd.training.keys import known_keys
from prd.training.recipes import from_dict, load_config, merged, parse_args, save_config, to_dict

ASKED = os.environ.get("PRD_FUZZ_EXAMPLES")


def examples(count: int) -> Callable[[Any], Any]:
    """Settings of a test: as many examples as asked for, or `count` that are the same every time."""
    return settings(
        max_examples=int(ASKED) if ASKED else count,
        derandomize=not ASKED,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


RECIPES = {name: to_dict(load_config(name)) for name in ("toybox", "latte3d_toybox", "triplane_turbo_sd21")}
KEYS = sorted(known_keys(list(entries(RECIPES["toybox"]))))
ODD_NUMBERS = [0, 1, -1, 1e-300, 1e300, 2**63, -(2**63), 2**64, math.inf, math.nan]
ODD_WORDS = [
    "null",
    "true",
    "[]",
    "{}",
    "~",
    "$HOME",
    "$A_B",
    "a: b",
    "- a",
    "&a",
    "*a",
    "%",
    "@",
    "'",
    '"',
    "\0",
    "a\udc80",
]
ODD_WORDS += ["!!python/object/apply:os.getcwd []", "!!binary x", "1e5", "0x10", "12:30", "2001-01-01", "<<: 1", "? a"]
NUMBERS = st.integers() | st.floats() | st.sampled_from(ODD_NUMBERS)
WORDS = st.text(max_size=12) | st.sampled_from(ODD_WORDS)
SCALARS = NUMBERS | WORDS | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)


def one_line(error: BaseException) -> None:
    assert str(error).strip(), repr(error)


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@examples(300)
@given(recipe=st.sampled_from(sorted(RECIPES)), key=st.sampled_from(KEYS), value=VALUES)
def test_a_value_of_the_configuration(recipe: str, key: str, value: Any, tmp_path: Path) -> None:
    """A config that is accepted is written and read as an equal one."""
    try:
        config = from_dict(merged(RECIPES[recipe], nested(key, value)))
    except PrdError as error:
        one_line(error)
        return
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@examples(200)
@given(words=st.lists(st.tuples(st.sampled_from(KEYS) | WORDS, WORDS), max_size=3), bare=st.lists(WORDS, max_size=2))
def test_words_of_a_command_line(words: list[tuple[str, str]], bare: list[str]) -> None:
    try:
        parse_args([*(f"--{key}={value}" for key, value in words), *bare])
    except PrdError as error:
        one_line(error)


@examples(200)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_a_file_in_the_place_of_a_recipe(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except PrdError as error:
        one_line(error)


@examples(100)
@given(values=st.dictionaries(st.sampled_from([*KEYS, "extends", "stages"]), VALUES, max_size=4))
def test_a_recipe_of_random_values(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    try:
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return  # what YAML cannot hold
    try:
        load_config(path)
    except PrdError as error:
        one_line(error)


LINES = st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=4)
CONTENTS = (
    st.binary(max_size=60)
    | LINES.map(lambda lines: "\n".join(lines).encode())
    | LINES.map(lambda lines: ("prompt\n" + "\n".join(lines)).encode())
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.lists(st.dictionaries(st.sampled_from(["prompt", "a"]), SCALARS), max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
)


@examples(200)
@given(suffix=st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".parquet", ".CSV", ""]), content=CONTENTS)
def test_a_file_of_prompts(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    try:
        corpus = load_corpus(PromptsConfig(source=str(path)))
    except PrdError as error:
        one_line(error)
        return
    finally:
        path.unlink()
    found = list(corpus.prompts)
    assert found and all(isinstance(text, str) and text.strip() for text in found)


@pytest.fixture(scope="module")
def load(random_toybox: Path) -> Callable[[Path], object]:
    """Load an adapter on the base that it was made for."""
    base = load_base(str(random_toybox / "stable_diffusion"))

    def load_it(folder: Path) -> object:
        unet, vae = copy.deepcopy((base.unet, base.vae))
        return TriplaneTurboModel.from_adapter(folder, unet, vae, base.scheduler)

    return load_it


DAMAGES = ("cut", "byte", "value", "key", "gone")


@examples(60)
@given(
    name=st.sampled_from(["config.json", "adapter_config.json", "adapter_model.safetensors"]),
    damage=st.sampled_from(DAMAGES),
    place=st.floats(0, 1),
    value=VALUES,
)
def test_a_damaged_adapter(
    name: str,
    damage: str,
    place: float,
    value: Any,
    load: Callable[[Path], object],
    random_toybox: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(random_toybox / "adapter", folder)
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: int(place * len(content))])
    elif damage == "byte" or not name.endswith(".json"):
        at = min(int(place * len(content)), len(content) - 1)
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
    else:
        values = json.loads(content)
        key = sorted(values)[min(int(place * len(values)), len(values) - 1)]
        values[key if damage == "value" else f"{key}_"] = value
        path.write_text(json.dumps(values), encoding="utf-8")
    try:
        load(folder)
    except PrdError as error:
        one_line(error)
