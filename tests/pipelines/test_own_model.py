"""A saved model of one's own class: opened by its import path from this disk, never for or from what was downloaded."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
from huggingface_hub import ModelCard

import prd
from prd.cli import main
from prd.errors import ModelMismatch
from prd.generators.single_pass import SinglePassModel
from prd.generators.triplane_turbo import TriplaneTurboConfig, TriplaneTurboModel
from prd.loading.saved_model import OWN_CLASS
from prd.pipelines.auto import load_pipeline
from tests.generators.tiny_single_pass import ATOM
from tests.training.own_parts import OwnModel

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--resolution", "20", "--faces", "200", "--texture", "32"]


class OwnTurbo(TriplaneTurboModel):
    """PRD's model by another name."""


@pytest.fixture
def film(toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a saved `custom_generator.FilmModel`, whose module can be imported as by PYTHONPATH."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from custom_generator import FilmConfig, FilmModel

    return save(FilmModel, FilmConfig(width=8, depth=2, frequencies=2), tmp_path / "run")


def save(kind: type[SinglePassModel], config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    kind.from_config(replace(config, text_length=None, text_width=None))[0].save_pretrained(folder / "generator")
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change(folder: Path, **values: Any) -> None:
    written = {**record_of(folder / "generator"), **values}
    (folder / "generator" / "config.json").write_text(json.dumps(written), encoding="utf-8")


def test_it_is_opened_where_its_class_can_be_imported(film: Path, tmp_path: Path, capsys: Any) -> None:
    assert record_of(film / "generator")[OWN_CLASS] == "custom_generator.FilmModel"
    pipe: Any = load_pipeline(film)
    assert type(pipe.model).__name__ == "FilmModel" and pipe.model.config.width == 8
    field = pipe("a red cube", output_type="field").field
    assert field.sdf(torch.zeros(1, 1, 3)).isfinite().all()
    words = ["generate", "a red cube", "--model", str(film), "-o", str(tmp_path / "cube.glb"), *SMALL]
    assert main(words) == 0, capsys.readouterr().err
    mesh: Any = trimesh.load(tmp_path / "cube.glb", force="mesh")
    assert len(mesh.faces) > 50

    pipe.save_pretrained(tmp_path / "mine")  # with a card that says how it is loaded
    card = ModelCard.load(tmp_path / "mine" / "README.md").text
    assert "from custom_generator import FilmModel" in card and "load_pipeline(model_class=FilmModel, " in card
    assert type(load_pipeline(tmp_path / "mine")).__name__ == "FilmModel"
    with pytest.raises(ModelMismatch, match="is a custom_generator.FilmModel, not AToM; use prd.load_pipeline"):
        prd.AToM.from_pretrained(film)
    with pytest.raises(ModelMismatch, match="is a custom_generator.FilmModel, not TriplaneTurbo; use prd.load_pipe"):
        prd.TriplaneTurbo.from_pretrained(film / "generator")


def test_a_class_that_derives_from_one_of_the_librarys_is_not_taken_for_it(toybox: Path, tmp_path: Path) -> None:
    own = save(OwnModel, ATOM, tmp_path / "atom")
    pipe: Any = load_pipeline(own)
    assert type(pipe.model) is OwnModel and isinstance(pipe, prd.AToM)
    with pytest.raises(ModelMismatch, match="is a tests.training.own_parts.OwnModel, not AToM; use prd.load_pipe"):
        prd.AToM.from_pretrained(own)

    model, _ = OwnTurbo.from_config(TriplaneTurboConfig(rank=2, latent_size=8))
    model.save_pretrained(tmp_path / "turbo" / "adapter")
    pipe = load_pipeline(tmp_path / "turbo")
    assert type(pipe.model) is OwnTurbo and isinstance(pipe, prd.TriplaneTurbo)
    with pytest.raises(ModelMismatch, match="OwnTurbo, not TriplaneTurbo; use prd.load_pipeline"):
        prd.TriplaneTurbo.from_pretrained(tmp_path / "turbo")


def test_no_code_is_imported_for_a_download(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub id: its maker's import path is not followed; the class is given instead."""
    change(film, **{OWN_CLASS: "untouched.Model"})
    monkeypatch.setattr("prd.pipelines.auto.find_model", lambda *_, **__: film / "generator")
    monkeypatch.setattr("prd.pipelines.single_pass.find_model", lambda *_, **__: film / "generator")
    with pytest.raises(ModelMismatch, match=r"me/film: is of the class 'untouched.Model'.*download.*model_class=\)"):
        load_pipeline("me/film")
    film_class = sys.modules["custom_generator"].FilmModel
    assert type(load_pipeline("me/film", model_class=film_class)).__name__ == "FilmModel"
    for wrong in (dict, TriplaneTurboModel, "custom_generator.FilmModel"):
        with pytest.raises(ModelMismatch, match="must be a class derived from SinglePassModel"):
            load_pipeline("me/film", model_class=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [".", "generator", "package"])
def test_no_code_is_imported_from_the_folder_of_a_model(
    film: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (film / place).mkdir(exist_ok=True)
    (film / place / "trap.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for here in (film / place, film, film.parent):
        monkeypatch.chdir(here)
        inner = (film / place).resolve().relative_to(here.resolve()).parts
        change(film, **{OWN_CLASS: ".".join([*inner, "trap", "Model"])})
        with pytest.raises(ModelMismatch, match="no code is imported from the folder of a model"):
            load_pipeline(film)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.FilmModel", "cannot be imported here .*there is no module 'nowhere'.*PYTHONPATH"),
        ("custom_generator.Missing", "has no class or function 'Missing'"),
        ("FilmModel", "must be an import path"),
        ("os.getcwd", "must be a class derived from SinglePassModel"),
        (3, "_class_path=3: must be an import path; save the model again"),
        (None, "_class_name is 'FiLM', expected 'TriplaneTurbo', .*or pass model_class= if it is your own"),
    ],
)
def test_a_class_that_is_not_found_is_one_sentence(film: Path, path: Any, message: str, capsys: Any) -> None:
    if path is None:
        record = record_of(film / "generator")
        del record[OWN_CLASS]
        (film / "generator" / "config.json").write_text(json.dumps(record), encoding="utf-8")
    else:
        change(film, **{OWN_CLASS: path})
    with pytest.raises(ModelMismatch, match=message) as error:
        load_pipeline(film)
    assert "\n" not in str(error.value)
    assert main(["generate", "a red cube", "--model", str(film), "-o", str(film / "cube.glb")]) == 2
    assert "Traceback" not in capsys.readouterr().err
