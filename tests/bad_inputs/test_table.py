"""Every wrong input of the table is refused in one sentence, through each door that takes it, before a model loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from prd import load_pipeline
from prd.cli import main
from prd.data.prompts import PromptsConfig, load_corpus
from prd.errors import PrdError
from prd.training.recipes import from_dict, load_config, merged, to_dict
from prd.training.trainer import Trainer
from tests.bad_inputs.table import ADAPTER, CALL, CONFIG, FILES, FLAGS, Damage, File, Value


@pytest.fixture(autouse=True)
def _no_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("the run began"))


def test_the_table_is_long_enough() -> None:
    assert len(CONFIG) + len(CALL) + len(FILES) + len(ADAPTER) >= 120


def said_by(call: Callable[[], object], kinds: type[Exception] | tuple[type[Exception], ...]) -> str:
    """The message of what is raised, which must be one line."""
    with pytest.raises(kinds) as caught:
        call()
    return one_line(str(caught.value))


def said_on_standard_error(capfd: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """The last line of a command that fails with status 2; those before are notes."""
    capfd.readouterr()
    assert main(words) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return one_line(err.strip().splitlines()[-1])


def one_line(message: str) -> str:
    assert message and len(message.splitlines()) == 1 and len(message) < 700, message
    return message


def check(message: str, said: Sequence[str]) -> None:
    assert [text for text in said if text not in message] == [], message


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def named(entry: Value) -> str:
    return f"{entry.key}={re.sub(r' at 0x[0-9a-f]+', '', repr(entry.value))}"[:60]


NULL_IS_TEXT = ("output_dir", "model.base", "teachers.mvdream.path", "prompts.source")  # on a command line
DOORS = [
    (door, entry)
    for entry in CONFIG
    for door in ("command line", "YAML", "Python")
    if not (door == "command line" and entry.value is None and entry.key in NULL_IS_TEXT)
]


@pytest.mark.parametrize("door, entry", DOORS, ids=lambda given: given if isinstance(given, str) else named(given))
def test_a_value_of_the_configuration(
    door: str, entry: Value, toybox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    if door == "command line":
        word = entry.value if isinstance(entry.value, str) else json.dumps(entry.value)
        others = [] if entry.key == "output_dir" else ["--output_dir", str(place)]
        message = said_on_standard_error(capfd, ["train", *others, f"--{entry.key}={word}"])
    elif door == "YAML":
        recipe = tmp_path / "mine.yaml"
        values = merged({"output_dir": str(place)}, nested(entry.key, entry.value))
        recipe.write_text(yaml.safe_dump({"extends": "toybox", **values}), encoding="utf-8")
        message = said_on_standard_error(capfd, ["train", "--config", str(recipe)])
    else:
        values = {**to_dict(load_config("toybox")), "output_dir": str(place)}
        message = said_by(lambda: Trainer(from_dict(merged(values, nested(entry.key, entry.value)))), PrdError)
    check(message, entry.said)
    assert not place.exists()


@pytest.fixture(scope="module")
def pipe(random_toybox: Path) -> Any:
    return load_pipeline(str(random_toybox / "adapter"), base=str(random_toybox / "stable_diffusion"))


@pytest.mark.parametrize("entry", CALL, ids=named)
def test_an_option_of_a_call(entry: Value, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.model, "denoise", lambda *args, **options: pytest.fail("computed before it refused"))
    options = {"prompt": "a red cube", entry.key: entry.value}
    check(said_by(lambda: pipe(**options), (ValueError, TypeError)), entry.said)


TYPED = [entry for entry in CALL if entry.key in FLAGS and type(entry.value) is (str if entry.key == "prompt" else int)]


@pytest.mark.parametrize("entry", TYPED, ids=named)
def test_an_option_on_the_command_line(
    entry: Value, pipe: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *args, **options: pipe)
    flag, text = FLAGS[entry.key], str(entry.value)
    words = [text] if entry.key == "prompt" else ["a red cube", f"{flag}={text}"]
    check(said_on_standard_error(capfd, ["generate", *words]), entry.said)


@pytest.mark.parametrize("entry", FILES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("door", ["prd train", "prd embed", "Python"])
def test_a_file_of_prompts(door: str, entry: File, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts" / entry.name
    path.parent.mkdir(parents=True)
    path.mkdir() if entry.name.endswith("/") else path.write_bytes(entry.content)
    place = str(tmp_path / "place")
    if door == "prd train":
        words = ["train", "--prompts.source", str(path), "--prompts.held_out", "[]", "--output_dir", place]
        message = said_on_standard_error(capfd, words)
    elif door == "prd embed":
        words = ["embed", "--source", str(path), "--encoder", "toybox", "--output", place]
        message = said_on_standard_error(capfd, words)
    else:
        message = said_by(lambda: load_corpus(PromptsConfig(source=str(path))), PrdError)
    check(message, entry.said)
    assert not Path(place).exists()


@pytest.mark.parametrize("entry", ADAPTER, ids=lambda entry: entry.name)
@pytest.mark.parametrize("door", ["prd generate", "prd train", "Python"])
def test_a_damaged_adapter(
    door: str, entry: Damage, toybox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(toybox / "adapter", folder)
    entry.damage(folder)
    if door == "prd generate":
        message = said_on_standard_error(capfd, ["generate", "a red cube", "--model", str(folder)])
    elif door == "prd train":
        words = ["train", "--init_from", str(folder), "--output_dir", str(tmp_path / "run")]
        message = said_on_standard_error(capfd, words)
    else:
        message = said_by(lambda: load_pipeline(str(folder)), (PrdError, OSError))
    check(message, entry.said)
