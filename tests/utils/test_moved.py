"""Modules are found by the paths that they had before they moved, with a warning."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from prd.utils.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_found(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = import_module(MOVED[old])
    spec = new.__spec__
    with pytest.warns(FutureWarning, match=rf"^{old} is now {MOVED[old]};"):
        assert import_module(old) is new
    assert new.__spec__ is spec and new.__name__ == MOVED[old]


def test_names_come_from_the_module_of_today() -> None:
    with pytest.warns(FutureWarning):
        sys.modules.pop("prd.training.prompts", None)
        from prd.training.prompts import load_corpus
    from prd.data.prompts import load_corpus as expected

    assert load_corpus is expected


def test_other_modules_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="prd.nothing"):
        import_module("prd.nothing")
