"""Text files are read and written as UTF-8, whatever the machine's locale says: every call names its encoding."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("prd", "adapters", "teachers", "examples", "benchmarks", "tests")
OTHERS = ("Image", "os", "tarfile", "zipfile", "trimesh")  # whose `open` is no text file's


def without_encoding(source: str) -> Iterator[int]:
    """Yield the lines of the calls that read or write text without `encoding=`."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and not any(word.arg in ("encoding", None) for word in call.keywords):
            name = ast.unparse(call.func)
            owner, _, method = name.rpartition(".")
            if (method in ("read_text", "write_text") and owner) or (
                method == "open" and owner not in OTHERS and "b" not in _mode(call, bool(owner))
            ):
                yield call.lineno


def _mode(call: ast.Call, of_path: bool) -> str:
    """The mode of `open(path, mode)` or `path.open(mode)`; "b" for one that is computed."""
    given = [word.value for word in call.keywords if word.arg == "mode"] or call.args[0 if of_path else 1 :][:1]
    return "r" if not given else str(given[0].value) if isinstance(given[0], ast.Constant) else "b"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_has_its_encoding_named(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open('a')", 1),
        ("open('a', 'w')", 1),
        ("open('a', mode='w')", 1),
        ("Path('a').open()", 1),
        ("path.write_text('a')", 1),
        ("(folder / 'a').read_text()", 1),
        ("open('a', 'rb')", 0),
        ("path.open('wb')", 0),
        ("Image.open('a')", 0),
        ("path.read_text(encoding='utf-8')", 0),
    ],
)
def test_the_check_sees_what_it_is_for(source: str, expected: int) -> None:
    assert len(list(without_encoding(source))) == expected
