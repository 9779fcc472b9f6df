"""`prd doctor`: every part is found or said to be missing; the exit status is of what is required alone."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from prd.cli import main
from prd.commands import doctor
from prd.commands.doctor import EXTRAS, examine

ROOT = Path(__file__).parents[2]


def test_everything_is_told_in_words_and_as_json(toybox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == [] and found["packages"]["torch"] and found["processor"]["cores_for_this_process"] >= 1
    assert found["memory"]["total"] > found["memory"]["available"] > 0
    assert set(found["disk"]) == {"models of the Hub", "temporary files", "this folder"}
    assert found["devices"][0]["name"] == "cpu" and found["threads"]["torch"] >= 1
    assert found["threads"]["variables"]["MKL_CBWR"]
    speed = found["speed"]
    assert speed["matrix_gflops"]["float32"] > 0.1 and speed["first_generation_seconds"] > 0
    assert main(["doctor", "--no-speed-test"]) == 0
    text = capsys.readouterr().out
    assert "speed" not in text and "nothing that is required is broken" in text
    for name, extra in EXTRAS.items():
        assert extra.only or name in text
    assert found["packages"]["torch"] in text and "numba" in text and "threads" in text


def test_an_extra_is_one_of_the_package() -> None:
    """What is installed by an extra has the module's package among its requirements."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    known = parser["options.extras_require"]
    for name, extra in EXTRAS.items():
        if found := re.fullmatch(r"pip install 'prd-3d\[(\w+)\]'", extra.install):
            assert name in known[found[1]]
        else:
            assert extra.install.startswith("pip install ") and name == "nvdiffrast"


def test_a_missing_extra_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = examine(speed=False)
    assert found["broken"] == [] and not any(extra["installed"] for extra in found["extras"].values())
    assert found["backends"]["rasteriser"] == "numba"


def test_a_required_package_that_is_missing_or_too_old_is_named(monkeypatch: Any, capsys: Any) -> None:
    wanted = ["torch>=2.11", "numpy>=999", "no-such-package>=1", "usd-core>=26; extra == 'usd'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert main(["doctor", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert len(found["broken"]) == 2 and "speed" not in found
    assert "pip install 'numpy>=999'" in found["broken"][0] and ">=999 is needed" in found["broken"][0]
    assert found["broken"][1] == "no-such-package is not installed; pip install 'no-such-package>=1'"


def broken_wheel() -> Any:
    raise OSError("libgomp.so.1:\n no such file")


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_a_package_that_cannot_be_imported_is_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(doctor.IMPORTED, name, broken_wheel)
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert f"BROKEN       {name} cannot be imported (OSError: libgomp.so.1: no such file)" in text
    assert text.endswith("1 things to mend\n")


@pytest.mark.parametrize("dependent", ["diffusers", "transformers"])
def test_what_fails_for_torch_alone_is_not_named(dependent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", dependent):
        monkeypatch.setitem(doctor.IMPORTED, name, broken_wheel)
    (said,) = examine(speed=False)["broken"]
    assert said.startswith("torch cannot be imported")
    monkeypatch.setitem(doctor.IMPORTED, "torch", lambda: None)  # whole: then it is the other's own fault
    (said,) = examine(speed=False)["broken"]
    assert said.startswith(f"{dependent} cannot be imported")


def test_a_generation_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: 1 / 0)
    assert main(["doctor"]) == 2
    assert "a toy generation failed: ZeroDivisionError" in capsys.readouterr().out
