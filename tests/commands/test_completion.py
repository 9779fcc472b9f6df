"""`prd completion` names every command and option, or the package that it lacks."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from prd.cli import main
from prd.commands.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_without_its_package_one_sentence_says_which(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", shell]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "pip install 'prd-3d[completion]'" in said.err


def test_files_are_completed_where_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a module in the place of shtab that shows what it is given."""
    module: Any = ModuleType("shtab")
    given: list[tuple[Any, str]] = []

    def complete(parser: Any, shell: str) -> str:
        given.append((parser, shell))
        return "script"

    module.FILE, module.complete = {"bash": "_files"}, complete
    monkeypatch.setitem(sys.modules, "shtab", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert main(["completion", "zsh"]) == 0 and capsys.readouterr().out == "script\n"
    ((parser, shell),) = given
    (commands,) = (action for action in parser._actions if action.dest == "command")
    assert shell == "zsh" and {"generate", "train", "info", "doctor", "evaluate"} <= commands.choices.keys()
    files = {action.dest for action in commands.choices["generate"]._actions if hasattr(action, "complete")}
    assert files == {"output", "prompts", "preview", "model", "base"}


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(shell: str, capsys: Any) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("generate", "info", "doctor", "num-meshes-per-prompt"):
        assert word in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
