"""Integers, texts and places that users give mean the same everywhere, or are refused by one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from prd.utils.arguments import (
    MAX_SEED,
    check_int,
    check_prompt,
    check_seed,
    check_writable_file,
    check_writable_folder,
    expanded,
    has_suffix,
    integer,
    one_or_more,
    shown,
)


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4), torch.tensor(4).int()])
def test_an_integer_is_an_integer_of_any_library(value):
    assert integer(value) == 4 and type(integer(value)) is int
    assert type(check_int("k", value, 1, 4)) is int and one_or_more(value) == [4]


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 4.0, np.float32(4), torch.tensor(4.0), "4", None, [4]]
)
def test_nothing_else_is(value):
    assert integer(value) is None
    with pytest.raises(ValueError, match="^k=.*: must be an integer in 1..9, or None$"):
        check_int("k", value, 1, 9, "or None")


def test_a_seed_is_one_that_a_generator_takes():
    for seed in (0, 2**53 - 1, 2**63, MAX_SEED):
        torch.Generator().manual_seed(check_seed("seed", seed))
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match=f"seed={seed}: must be an integer in 0..18446744073709551615"):
            check_seed("seed", seed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; say what to make"),
        (" \t\n\u3000", "is empty"),
        ("a \ud800 cube", r"'a \\ud800 cube': holds half a character .* at place 3; give it as UTF-8"),
        ("caf\udce9", "holds half a character"),
        ("a\0b", "holds the NUL character at place 2"),
        ("\0" + "a" * 10**6, r"a'\.\.\. \(1000001 characters\): holds the NUL"),
    ],
)
def test_what_is_no_prompt_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=f"^prompt=.*{message}") as caught:
        check_prompt("prompt", text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    str(caught.value).encode()


@pytest.mark.parametrize("text", ["a", "\u7acb\u65b9\u4f53", "a\x1b[31m", "a" * 10**6, "\U0001f9ca"])
def test_other_text_is_a_prompt(text):
    assert check_prompt("prompt", text) == text and len(shown(text)) < 130


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"]])
def test_what_is_no_string_is_a_type_error(value):
    with pytest.raises(TypeError, match="prompt=.*: must be a string"):
        check_prompt("prompt", value)


def test_home_and_variables_are_expanded_in_a_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "somewhere")
    monkeypatch.delenv("ABSENT", raising=False)
    assert expanded("~/a") == str(tmp_path / "a") == expanded(Path("~/a"))
    assert expanded("$WHERE/a") == expanded("${WHERE}/a") == "somewhere/a"
    for plain in ("owner/name", "toybox", "a~b", "[1]*?", "5$", "caf\udce9"):
        assert expanded(plain) == plain
    with pytest.raises(ValueError, match=r"folder='\$ABSENT/a': the environment variable ABSENT is not set"):
        expanded("$ABSENT/a", "folder")
    with pytest.raises(ValueError, match="NUL"):
        expanded("a\0b")
    (tmp_path / "$ABSENT").mkdir()
    assert expanded(tmp_path / "$ABSENT") == str(tmp_path / "$ABSENT")


def test_a_suffix_is_one_in_any_case():
    assert has_suffix("a.GLB", (".glb", ".obj")) and has_suffix("a.SafeTensors", ".safetensors")
    assert not has_suffix("a.glb.gz", (".glb",))


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_writable_file("output", "~/a.GLB", (".glb",)) == tmp_path / "a.GLB"
    (tmp_path / "b.glb").mkdir()
    for name, message in (("a.stl", "must end in .glb"), ("b.glb", "is a folder"), ("absent/a.glb", "make it first")):
        with pytest.raises(ValueError, match=f"output=.*{message}"):
            check_writable_file("output", tmp_path / name, (".glb",))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable_file("output", tmp_path / "a.glb", (".glb",))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_writable_folder("output", "~/a/b") == tmp_path / "a" / "b"
    assert check_writable_folder("output", tmp_path) == tmp_path and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for name in ("file", "file/a"):
        with pytest.raises(ValueError, match="output=.*is a file; name a folder"):
            check_writable_folder("output", tmp_path / name)
    with pytest.raises(ValueError, match="output='': is empty; give a file, a folder"):
        check_writable_folder("output", "")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written; name another"):
        check_writable_folder("output", tmp_path / "a")


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (
            "x" * 300,
            ValueError,
            r"^k=.x+.\.\.\. \(300 characters\): is longer than a name of a file",
        ),
        ("a/\ud800", ValueError, r"^k='a/\\ud800': holds half a character"),
        ("", ValueError, "^k='': is empty; give a file, a folder or a Hub id"),
        (" ", ValueError, "^k=' ': is empty; give a file, a folder or a Hub id"),
        (5, TypeError, "^k=5: must be a string or a path$"),
        (None, TypeError, "^k=None: must be a string or a path$"),
    ],
)
def test_a_place_that_no_file_can_have_is_refused(place, error, message):
    with pytest.raises(error, match=message):
        expanded(place, "k")


def test_a_tensor_without_data_is_no_integer():
    assert integer(torch.empty((), dtype=torch.int64, device="meta")) is None
