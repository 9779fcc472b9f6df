"""The toy box is a guest: outside its folder only the defaults of settings, arguments and recipes name it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prd
from prd.hub.shipped import shipped, shipped_benchmarks, shipped_encoders, shipped_names

ROOT = Path(prd.__file__).resolve().parents[1]
ROOMS = ("prd", "teachers", "adapters")


def sources() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        path for path in dict.fromkeys(path.resolve() for path in found) if (ROOT / "prd/toybox") not in path.parents
    ]


def mentions(tree: ast.Module) -> Iterator[int]:
    """Lines of code that name the toy box, but docstrings and defaults."""
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            allowed.add(node.body[0].value)  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            allowed.add(node.value)
        if isinstance(node, ast.FunctionDef):
            allowed |= set(node.args.defaults) | {default for default in node.args.kw_defaults if default is not None}
        if isinstance(node, ast.Call):
            allowed |= {keyword.value for keyword in node.keywords if keyword.arg in ("default", "help")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any("toybox" in name.split(".") for name in names):
                yield node.lineno
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in allowed:
            if "toybox" in node.value or "toy box" in node.value:
                yield node.lineno


def test_no_code_outside_it_names_it() -> None:
    files = sources()
    assert len(files) > 80
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in mentions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    default_recipe = {place for place in found if place.startswith("prd/training/command_line.py:")}
    assert len(default_recipe) == 1 and set(found) == default_recipe


def test_the_test_sees_a_mention() -> None:
    for code in (
        "from prd.toybox import asset",
        "import prd.toybox.world",
        "if source == 'toybox': pass",
        "load('the toy box')",
    ):
        assert list(mentions(ast.parse(code))) == [1]
    assert not list(mentions(ast.parse('"""The toy box."""\nclass A:\n    base: str = "toybox"')))


def test_the_index_finds_what_ships() -> None:
    assert "toybox" in shipped_names() and shipped_benchmarks() == ["toybox"]
    assert [folder.name for folder in shipped_encoders("toybox")] == ["stable_diffusion", "richdreamer"]
    assert shipped_encoders("nobody/nothing") == []
    for part in ("base", "text_encoder", "mvdream", "richdreamer", "controlnet", "stable_diffusion"):
        assert shipped("toybox", part) is not None
