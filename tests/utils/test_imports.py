"""Classes named by import paths: found, or refused in one sentence."""

from __future__ import annotations

import sys
import types
from abc import abstractmethod
from pathlib import Path
from typing import Protocol

import pytest

from prd.errors import ConfigError
from prd.utils.imports import check_members, import_path, load_class, missing_members


class Wanted(Protocol):
    name: str
    size: int = 3

    def make(self) -> int: ...

    @abstractmethod
    def must(self) -> int: ...

    def may(self) -> int:
        return 1


class Whole:
    def __init__(self) -> None:
        self.name = "whole"
        self.size = 1

    def make(self) -> int:
        return 1

    must = may = make


class Derived(Wanted):
    def __init__(self) -> None:
        self.name = "derived"

    def make(self) -> int:
        return 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_class_is_found_by_its_path_also_in_the_current_directory(folder):
    assert load_class("tests.utils.test_imports.Whole") is Whole
    (folder / "module_of_mine_1.py").write_text(
        "class Mine: pass\ndef loss(x): return x\nNUMBER = 3\n", encoding="utf-8"
    )
    assert load_class("module_of_mine_1.Mine").__name__ == "Mine"
    assert load_class("module_of_mine_1.loss")(3) == 3
    with pytest.raises(ConfigError, match=r"x.class='module_of_mine_1.NUMBER': 'module_of_mine_1' has no class or fun"):
        load_class("module_of_mine_1.NUMBER", key="x.class")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Mine", "must be an import path, as my_module.MyClass"),
        ("my module.Mine", "must be an import path"),
        ("module_that_is_not.Mine", "there is no module 'module_that_is_not'"),
        ("prd.nowhere.Mine", "there is no module 'prd.nowhere'"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(ConfigError, match=rf"class='{path}': .*{message}"):
        load_class(path)


def test_a_module_that_fails_to_import_says_why(folder):
    (folder / "module_of_mine_2.py").write_text("import module_that_is_not\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="importing 'module_of_mine_2' failed: No module named 'module_that_is_not'"):
        load_class("module_of_mine_2.Mine")
    (folder / "module_of_mine_3.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="importing 'module_of_mine_3' failed: ZeroDivisionError: division by zero"):
        load_class("module_of_mine_3.Mine")


def test_what_a_class_lacks_is_named():
    assert missing_members(Whole(), Wanted) == []
    assert missing_members(Whole, Wanted) == []  # its __init__ may set the rest
    assert missing_members(Derived, Wanted) == ["must"]
    assert missing_members(object, Wanted) == ["make", "must", "may"]
    with pytest.raises(ConfigError, match=r"teachers.mine: is no Wanted: it lacks make, must, may, size, name"):
        check_members(object(), Wanted, "teachers.mine")
    with pytest.raises(ConfigError, match=r"class='tests.utils.test_imports.Derived': is no Wanted: it lacks must"):
        load_class("tests.utils.test_imports.Derived", Wanted)


def test_a_path_leads_to_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`import_path` and `load_class` are inverse, for the script that runs too; a nested class has no path."""

    class Nested:
        pass

    assert import_path(ConfigError) == "prd.errors.ConfigError" and load_class("prd.errors.ConfigError") is ConfigError
    assert import_path(import_path) == "prd.utils.imports.import_path"
    assert import_path(Nested) is None and import_path(lambda: None) is None and import_path(3) is None

    script = types.ModuleType("__main__")
    own = type("Own", (), {"__module__": "__main__"})
    vars(script).update(Own=own, __file__=str(tmp_path / "my_script.py"), __spec__=None)
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert import_path(own) == "my_script.Own" and load_class("my_script.Own") is own
    del script.__file__  # a notebook
    assert import_path(own) is None
