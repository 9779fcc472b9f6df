"""The command line: a file is written, or one sentence says why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import datasets
import pytest
import trimesh

from prd.cli import main

SMALL = ["--resolution", "24", "--faces", "300", "--texture", "32"]


def test_generate_writes_a_glb(random_toybox, tmp_path):
    """In a process of its own that prints in ASCII, with the models given by their folders."""
    path = tmp_path / "w\xfcrfel.GLB"
    places = ["--adapter", str(random_toybox / "adapter"), "--base", str(random_toybox / "stable_diffusion")]
    command = [sys.executable, "-m", "prd.cli", "generate", "a red cube", "-o", str(path), *places, *SMALL]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert str(path).encode("ascii", "backslashreplace").decode() in done.stdout and "triangles" in done.stdout
    (mesh,) = trimesh.load(path, file_type="glb").geometry.values()
    assert 50 < len(mesh.faces) <= 300
    assert mesh.visual.material.baseColorTexture.size == (32, 32)


def test_what_generate_is_asked_for_reaches_the_files(random_toybox, tmp_path, caplog):
    """Vertex colours, what made it, sizes in millimetres, and a warning where the number of triangles is not met."""
    places = ["--adapter", str(random_toybox / "adapter"), "--base", str(random_toybox / "stable_diffusion")]
    generate = ["generate", "a red cube", *places, "--resolution", "24", "--seed", "7"]
    assert main([*generate, "-o", str(tmp_path / "v.glb"), "--vertex-colors", "--faces", "300"]) == 0
    data = (tmp_path / "v.glb").read_bytes()
    tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    extras = tree["asset"]["extras"]
    assert (extras["prompt"], extras["seed"], extras["model"]) == ("a red cube", 7, "TriplaneTurbo")
    assert extras["generator"].startswith("prd ") and extras["licence"]
    assert str(tmp_path.parent).encode() not in data and str(random_toybox).encode() not in data
    (primitive,) = tree["meshes"][0]["primitives"]
    assert "COLOR_0" in primitive["attributes"] and "images" not in tree
    caplog.clear()
    assert main([*generate, "-o", str(tmp_path / "x.stl"), "--vertex-colors", "--faces", "4", "--height", "6cm"]) == 0
    shape = trimesh.load(tmp_path / "x.stl")
    assert shape.extents[2] == pytest.approx(60, rel=1e-4)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if len(shape.faces) > 4:
        assert any("target_faces=4" in line and str(len(shape.faces)) in line for line in warnings)


def one_sentence(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Return what a failing command prints: a single line, no traceback, exit status 2."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_a_bad_suffix_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    assert "texture_size=8: must be an integer in 16..8192" in one_sentence(capsys, ["generate", "a", "--texture", "8"])
    error = one_sentence(capsys, ["generate", "a red cube", "-o", "cube.fbx"])
    assert "output='cube.fbx'" in error and ".glb, .obj, .ply" in error


@pytest.mark.parametrize("size", ["12x", "", "1024.0", "none"])
def test_a_texture_that_is_no_number_is_a_sentence(size, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a", "--texture", size])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and f"--texture: {size!r}: must be 'auto' or a number of texels" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["caf\udce9"], "prompt='caf\\udce9': holds half a character"),
        ([" "], "prompt=' ': is empty"),
        (["a", "--seed", "-1"], "seed=-1: must be an integer in 0..18446744073709551615"),
        (["a", "--seed", "18446744073709551616"], "seed=18446744073709551616: must be an integer in 0.."),
        (["a", "-o", "cube.txt"], "output='cube.txt': must end in .glb, .obj, .ply"),
        (["a", "-o", "absent/cube.GLB"], "output='absent/cube.GLB': the folder absent is not there; make it first"),
        (["a", "-o", "folder.glb"], "output='folder.glb': is a folder"),
        (["a", "-o", "$ABSENT/cube.glb"], "the environment variable ABSENT is not set"),
        (["a", "--resolution", "1"], "isosurface_resolution=1: must be an integer in 2..2048"),
        (["a", "-o", "cube.obj", "--height", "60mm"], "height='60mm': .obj says no unit of length; write one of .glb"),
        (["a", "-o", "cube.stl", "--height", "60"], "height='60': must be 0.01mm to 1000m, a number and mm, cm, m"),
        (["a", "-o", "cube.glb", "--up", "z"], "up='z': a .glb is +Y up; leave it out"),
        (["a", "-o", "cube.stl", "--lods", "2"], "lods=2: .stl holds one mesh; write a .glb or .gltf"),
        (["a", "-o", "cube.ply", "--picture", "webp"], "picture='webp': .ply takes none but png"),
        (["a", "--close-handles", "nan"], "close_handles=nan: must be a width in 0..2 scene units; 0 closes none"),
        (["a", "--lods", "9"], "lods=9: must be an integer in 1..8"),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_loaded(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ABSENT", raising=False)
    (tmp_path / "folder.glb").mkdir()
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    assert message in one_sentence(capsys, ["generate", *words])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--source", "$ABSENT/a.txt", "--output", "e"], "prompts.source=.*ABSENT is not set"),
        (["--source", "a.csv", "--output", "e"], "a.csv, line 2: has 2 fields, the header 1"),
        (["--source", "a.txt", "--output", "a.txt"], "output='a.txt': is a file; name a folder"),
        (["--source", "a.txt", "--column", "b", "--output", "e"], "prompts.column='b': a.txt has no columns"),
    ],
)
def test_a_corpus_is_checked_before_an_encoder_is_loaded(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ABSENT", raising=False)
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("prompt\na, b\n", encoding="utf-8")
    monkeypatch.setattr("prd.text.loading.load_encoder", lambda *a, **k: pytest.fail("loaded an encoder"))
    assert re.search(message, one_sentence(capsys, ["embed", *words, "--encoder", "toybox"]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--adapter", "/absent"], "/absent: no such folder"),
        (["--steps", "3", *SMALL], "num_inference_steps=3: must be a positive divisor of 1000"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(toybox, capsys, words, message):
    assert message in one_sentence(capsys, ["generate", "a red cube", *words])


def test_options_of_sharing_reach_what_they_are_for(capsys, monkeypatch, tmp_path):
    seen = []

    def load(name, **options):
        seen.append(
            (name, {k: v for k, v in options.items() if k in ("revision", "token", "allow_other_base", "text")})
        )
        raise ValueError("stop")

    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", load)
    monkeypatch.setattr("prd.loading.stable_diffusion.load_base", load)
    monkeypatch.setattr("prd.generators.published.published_state", lambda path: {})
    place = ["--revision", "v1", "--token", "hf_x"]
    one_sentence(capsys, ["generate", "a red cube", "--adapter", "me/a", *place, "--allow-other-base"])
    one_sentence(capsys, ["convert", "a.pth", str(tmp_path / "a"), "--base", "me/b", *place])
    hub = {"revision": "v1", "token": "hf_x"}
    assert seen == [("me/a", {**hub, "allow_other_base": True}), ("me/b", {**hub, "text": False})]


def test_an_unknown_key_names_the_nearest(capsys):
    error = one_sentence(capsys, ["train", "--optimizer.learning_rate", "1"])
    assert "unknown config key 'optimizer.learning_rate'" in error and "nearest" in error


@pytest.mark.parametrize(
    "key", ["prompts.source", "prompts.embeddings", "model.base", "init_from", "resume_from_checkpoint"]
)
def test_a_file_that_is_not_there_is_named_before_a_taken_folder(capsys, monkeypatch, tmp_path, key):
    """The user named the file; the output folder is the recipe's and holds another run."""
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "runs" / "toybox" / "metrics.jsonl"
    taken.parent.mkdir(parents=True)
    taken.write_text('{"step": 1}\n', encoding="utf-8")
    assert "holds another run" in one_sentence(capsys, ["train"])
    absent = str(tmp_path / "absent.txt")
    error = one_sentence(capsys, ["train", f"--{key}", absent])
    assert f"{key}=" in error and absent in error


@pytest.mark.parametrize("words", [["runs", "somewhere"], ["train", "--seed", "1"]])
def test_ctrl_c_is_one_sentence(words, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prd.evaluation.report.runs_table", interrupted)
    monkeypatch.setattr("prd.training.run.folder.check_run", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err == f"prd {words[0]}: interrupted\n"


def test_help_does_not_wait_for_torch():
    code = "import sys, prd.cli\ntry: prd.cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_every_public_name_is_there():
    import prd

    for name in prd.__all__:
        assert getattr(prd, name).__name__ == name
    assert set(prd.__all__) <= set(dir(prd))
    with pytest.raises(AttributeError, match="'Absent'"):
        _ = prd.Absent
