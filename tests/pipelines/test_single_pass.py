"""What single-pass pipelines have besides the contract of pipelines: text encoders, interpolation, shapes to follow."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
from huggingface_hub import ModelCard
from PIL import Image

import prd
from prd.cli import main
from prd.errors import ModelMismatch
from prd.meshes.read import UnreadableMesh
from prd.pipelines.auto import load_pipeline
from prd.toybox import asset
from tests.compare import ROUNDING, relative_difference
from tests.generators.tiny_single_pass import save_run

SMALL: dict[str, Any] = {"isosurface_resolution": 20, "target_faces": 200, "texture_size": 32}


def test_the_command_line_knows_the_model_by_its_files(tmp_path: Path, capsys) -> None:
    words = ["generate", "a red cube", "--model", str(save_run("atom", tmp_path)), "-o", str(tmp_path / "cube.glb")]
    assert main([*words, "--resolution", "20", "--faces", "200", "--texture", "32"]) == 0
    assert len(trimesh.load(tmp_path / "cube.glb", force="mesh").faces) > 50
    capsys.readouterr()
    for extra, message in (
        (["--steps", "4"], "steps=4: .* answers in one pass; leave it out"),
        (["-o", str(tmp_path / "no" / "cube.glb")], "the folder .*no is not there; make it first"),
        (["--device", "cudaa"], "device='cudaa': cannot compute here"),
        (["--base", "toybox"], "base='toybox': AToM takes no such option; leave it out"),
    ):
        assert main([*words, *extra]) == 2
        assert __import__("re").search(message, capsys.readouterr().err)


def test_the_card_is_of_what_came_last(tmp_path: Path) -> None:
    pipe = prd.ATT3D.from_pretrained(save_run("att3d", tmp_path))
    pipe.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "prd" and card.data.license == "apache-2.0" and "att3d" in card.data.tags
    with pytest.raises(ModelMismatch, match="mine: is a ATT3D, not TriplaneTurbo; use prd.ATT3D.from_pretrained"):
        prd.TriplaneTurbo.from_pretrained(tmp_path / "mine")
    prd.TriplaneTurbo.from_pretrained("toybox").save_pretrained(tmp_path / "mine")  # the card is of what came last
    assert "TriplaneTurbo.from_pretrained" in ModelCard.load(tmp_path / "mine" / "README.md").text
    prd.TriplaneTurbo.from_pretrained(tmp_path / "mine")


def test_another_text_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_run("atom", tmp_path)
    other = asset("richdreamer")
    with pytest.raises(ModelMismatch, match="trained with the text encoder 'toybox', whose weights differ"):
        prd.AToM.from_pretrained(folder, text_encoder=other)
    prd.AToM.from_pretrained(folder, text_encoder=other, allow_other_encoder=True)
    without = prd.AToM.from_pretrained(folder, text=False)
    with pytest.raises(ValueError, match="came without a text encoder; give prompt_embeds= instead"):
        without("a red cube")


def test_what_cannot_be_loaded_or_made_is_named(tmp_path: Path) -> None:
    folder = save_run("latte3d", tmp_path)
    with pytest.raises(ModelMismatch, match="is a LATTE3D, not AToM; use prd.LATTE3D.from_pretrained"):
        prd.AToM.from_pretrained(folder)
    config = folder / "generator" / "config.json"
    record = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**record, "_class_name": "Shap-E"}), encoding="utf-8")
    with pytest.raises(ModelMismatch, match="_class_name is 'Shap-E', expected 'TriplaneTurbo', 'AToM'"):
        load_pipeline(folder)
    config.write_text(json.dumps({**record, "text_encoder": ""}), encoding="utf-8")
    with pytest.raises(ValueError, match="text_encoder=None: .* pass text_encoder="):
        prd.LATTE3D.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no such folder; give one of toybox, toybox-atom"):
        load_pipeline("toybox-atem")
    with pytest.raises(ValueError, match="revision='v1': toybox-atom is on this disk"):
        prd.AToM.from_pretrained("toybox-atom", revision="v1")


def test_att3d_interpolates_between_prompts(tmp_path: Path) -> None:
    pipe = prd.ATT3D.from_pretrained(save_run("att3d", tmp_path))
    between = pipe.interpolate("a red cube", "a blue sphere", [0.0, 0.5, 1.0])
    back = pipe.interpolate("a blue sphere", "a red cube", [1.0, 0.5, 0.0])
    points = torch.rand(3, 30, 3)
    torch.testing.assert_close(between.sdf(points), back.sdf(points), rtol=1e-4, atol=1e-5)
    alone = pipe("a red cube", output_type="field").field
    torch.testing.assert_close(between.sdf(points)[:1], alone.sdf(points[:1]), rtol=1e-4, atol=1e-5)
    for alphas in ([-0.1], [0.5, 1.5], [float("nan")], [], 0.5, torch.rand(2, 2)):
        with pytest.raises(ValueError, match=r"alphas .* \[0, 1\]"):
            pipe.interpolate("a red cube", "a blue sphere", alphas)
    with pytest.raises(TypeError, match="alphas='half': must be numbers"):
        pipe.interpolate("a red cube", "a blue sphere", "half")
    without = prd.ATT3D.from_pretrained(tmp_path, text=False)
    with pytest.raises(ValueError, match="load it with text=True, or give embeddings to pipe.model.interpolate"):
        without.interpolate("a red cube", "a blue sphere", [0.5])


def test_the_continuum_becomes_an_animation(tmp_path: Path, monkeypatch, capsys) -> None:
    script = Path(__file__).parents[2] / "examples" / "interpolate.py"
    run, output = str(save_run("att3d", tmp_path)), tmp_path / "between.gif"
    words = ["a red cube", "a blue sphere", "--model", run, "--frames", "3", "--size", "16"]
    monkeypatch.setattr("sys.argv", ["interpolate.py", *words, "-o", str(output)])
    runpy.run_path(str(script), run_name="__main__")
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.size == (3 * 16, 16)  # the last shape is in it
    for extra, message in (
        (["--model", str(save_run("atom", tmp_path / "atom"))], "is a AToM, not ATT3D"),
        (["-o", str(tmp_path / "no" / "x.gif")], "the folder .*no is not there; make it first"),
    ):
        monkeypatch.setattr("sys.argv", ["interpolate.py", *words, *extra])
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        assert __import__("re").search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["A=nowhere"], "'nowhere': holds no config.yaml"), (["A={0}", "A={0}"], "'A' names 2 runs; give each its own")],
)
def test_runs_that_cannot_be_compared_are_named(
    runs: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr("sys.argv", ["compare_generators.py", *(run.format(tmp_path) for run in runs)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / "compare_generators.py"), run_name="__main__")
    assert message in capsys.readouterr().err


def test_latte3d_follows_a_shape_that_is_given(tmp_path: Path) -> None:
    pipe = prd.LATTE3D.from_pretrained(save_run("latte3d", tmp_path))
    box = trimesh.creation.box((1.0, 0.6, 0.8))
    box.export(tmp_path / "box.ply")
    alone = pipe("a red cube", output_type="field").field
    points = torch.rand(1, 30, 3)
    cloud = torch.tensor(box.sample(500, seed=1), dtype=torch.float32)
    for shape in (tmp_path / "box.ply", pipe("a red cube", **SMALL).meshes[0], cloud):
        field = pipe("a red cube", shape=shape, output_type="field").field
        assert (field.sdf(points) - alone.sdf(points)).abs().max() > 1e-5
        again = pipe("a red cube", shape=shape, output_type="field").field
        # the points on it are always the same
        assert relative_difference(again.sdf(points), field.sdf(points)) <= ROUNDING
    with pytest.raises(TypeError, match="shape=3: must be a Mesh, a file of one, or points"):
        pipe("a red cube", shape=3)
    with pytest.raises(ValueError, match=r"shape=\(4, 2\): expected points \[N, 3\]"):
        pipe("a red cube", shape=torch.zeros(4, 2))
    for points in (torch.zeros(0, 3), torch.full((4, 3), float("nan")), torch.full((4, 3), 1.5)):
        with pytest.raises(ValueError, match="shape: its points must be at least one, finite and in the cube"):
            pipe("a red cube", shape=points)
    (tmp_path / "line.obj").write_text("v 0 0 0\nv 0 1 0\nv 0 2 0\nf 1 2 3\n", encoding="utf-8")
    for name, message in (("line.obj", "no triangles with an area"), ("nowhere.ply", "no such file")):
        with pytest.raises(UnreadableMesh, match=message):
            pipe("a red cube", shape=tmp_path / name)
    with pytest.raises(TypeError, match="prompt_embeds is a int: must be"):
        pipe(prompt_embeds=3, shape=cloud)
