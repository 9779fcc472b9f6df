"""`prd info`: what a model is, off its records and headers, for every kind of place; nothing is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prd.cli import main
from prd.hub.find import find_model
from prd.hub.info import model_info
from prd.hub.shipped import shipped_names
from tests.generators.tiny_single_pass import KINDS, save_run


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_model(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("built a network"))
    assert main(["info", name]) == 0
    text = capsys.readouterr().out
    assert main(["info", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    folder = find_model(name)
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors) > 0
    assert found["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert found["bytes"] == sum(found["files"].values()) and found["licence"] == "apache-2.0"
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert found["class"] == record["_class_name"]
    hashes = (found["base"] or found["text_encoder"])["hash"]
    assert hashes == record.get("base_hash", record.get("text_hash")) and len(hashes) >= 2
    known = found["trained_on"]
    for part in (record["_class_name"], *known["words"], *known["forms"], f"{known['prompts']} prompts", "apache-2.0"):
        assert part in text
    assert next(iter(hashes.values()))[:16] in text and f"{found['parameters']:,}" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_without_records(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_run(kind, tmp_path / "run")
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "trained on   (not recorded)" in text and "a model of a single pass" in text
    assert model_info(folder)["folder"] == str(folder / "generator")


def test_a_card_says_the_licence(tmp_path: Path) -> None:
    folder = save_run("atom", tmp_path) / "generator"
    assert model_info(folder)["licence"] == "apache-2.0"  # of the text encoder, which ships
    for front, licence in (("license: mit", "mit"), ("license: other", "apache-2.0"), ("license: [", "apache-2.0")):
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
        assert model_info(folder)["licence"] == licence


def test_a_base_of_its_makers_disk_is_known_by_its_hash(random_toybox: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_toybox / "adapter", tmp_path / "adapter"))
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**record, "base": ""}), encoding="utf-8")
    base = model_info(folder)["base"]
    assert base["name"] is None and base["hash"] == record["base_hash"]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "config.json"),
        (lambda f: (f / "config.json").write_text("{}", encoding="utf-8"), "does not say which class it is of"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "is no whole safetensors file"),
    ],
)
def test_what_is_no_model_is_one_sentence(damage: Any, said: str, tmp_path: Path, capsys: Any) -> None:
    folder = save_run("atom", tmp_path / "run") / "generator"
    damage(folder)
    assert main(["info", str(folder)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and len(found.err.strip().splitlines()) == 1 and said in found.err
