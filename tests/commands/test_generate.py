"""`prd generate` of many prompts: where they come from, what is refused before a model is loaded, what it says."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prd.cli import main
from prd.commands.generate import OF_SPLATS, add_generate
from prd.commands.options import FORMATS
from prd.commands.prompts import read_prompts
from prd.data.text_files import CorpusError
from prd.meshes.export import SUFFIXES
from prd.meshes.files import read_file_mesh
from tests.commands.made import BROKEN, EMPTY, Pipe

SMALL = ["--resolution", "24", "--faces", "300", "--vertex-colors"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_formats_are_those_that_are_written() -> None:
    assert {f".{name}" for name in FORMATS} == set(SUFFIXES)


def test_a_file_of_prompts_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is called in a shell, with a shipped model; a prompt that it does not know is a line of warning."""
    (tmp_path / "p.txt").write_text("a red cube\n\n  a blue mug  \na red cube\na purple dog\n", encoding="utf-8")
    words = ["generate", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "--format", "obj"]
    assert main([*words, "--model", "toybox-atom", "--batch-size", "3", *SMALL]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}: 4 meshes\n" and "Traceback" not in said.err
    rows = rows_of(tmp_path / "out")
    assert [row["prompt"] for row in rows] == ["a red cube", "a blue mug", "a red cube", "a purple dog"]
    assert [row["file"] for row in rows][:2] == ["00000_a_red_cube.obj", "00001_a_blue_mug.obj"]
    for row in rows:
        assert len(read_file_mesh(tmp_path / "out" / row["file"]).faces) == row["faces"] > 50
        assert row["seed"] is None  # of a model that draws nothing


def test_splats_are_asked_for_by_the_suffix_or_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .splat, and a .ply of Gaussians, of a shipped model; without --splats a .ply stays a mesh."""
    words = ["generate", "a red cube", "--model", "toybox-atom", "--resolution", "24"]
    splat, ply = tmp_path / "cube.SPLAT", tmp_path / "cube.ply"
    assert main([*words, "-o", str(splat)]) == 0
    assert main([*words, "--splats", "-o", str(ply), "--up", "z"]) == 0
    said = capsys.readouterr().out
    count = splat.stat().st_size // 32
    assert splat.stat().st_size == 32 * count and f"{splat}: {count} Gaussians" in said and count > 500
    head = ply.read_bytes()[:600]
    assert f"element vertex {count}".encode() in head and b"property float rot_3" in head and b"+Z up" in head
    assert main([*words, "-o", str(ply), "--faces", "300"]) == 0
    assert b"element face" in ply.read_bytes()[:600]


def test_every_option_of_meshes_is_refused_for_splats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options of the parser, each with another value than its default: splats have it, or it is refused."""
    monkeypatch.setattr("prd.commands.generate.load_model", lambda args: pytest.fail("a model was loaded"))
    parser = argparse.ArgumentParser()
    add_generate(parser.add_subparsers(dest="command"))
    (commands,) = (action.choices["generate"] for action in parser._actions if isinstance(action.choices, dict))
    assert "splats (default: +Y down)" in {action.dest: action.help for action in commands._actions}["up"]
    refused = []
    for action in commands._actions:
        if action.dest in OF_SPLATS | {"help"}:
            continue
        flag = action.option_strings[-1]
        own = [next(one for one in action.choices if one != action.default)] if action.choices else ["7"]
        words = ["generate", "a red cube", "-o", str(tmp_path / "a.splat"), flag, *(own if action.nargs != 0 else [])]
        assert main(words) == 2, flag
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"prd: {flag[2:]}=") and said.endswith("is of meshes, not of splats; leave it out"), said
        refused.append(action.dest)
    assert {"faces", "topology", "close_handles", "texture", "picture", "metallic", "roughness"} < set(refused)
    assert {*refused, *OF_SPLATS} == {*vars(parser.parse_args(["generate"]))} - {"command"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "--splats", "-o", "OUT"], "splats: are of one prompt and one file"),
        (["a", "--splats", "-o", "cube.glb"], "output='cube.glb': must end in .ply, .splat"),
        (["a", "-o", "cube.splat", "--height", "60mm"], "height='60mm': is of meshes, not of splats; leave it out"),
        (["a", "-o", "cube.splat", "--normal-map"], "normal-map=True: is of meshes"),
        (["a", "--splats", "--format", "ply"], "format='ply': is of meshes"),
    ],
)
def test_splats_that_cannot_be_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prd.commands.generate.load_model", lambda args: pytest.fail("a model was loaded"))
    assert main(["generate", *words]) == 2
    assert said in capsys.readouterr().err


def test_one_seed_of_many_makes_the_same_mesh_alone(toybox: Path, tmp_path: Path) -> None:
    """Several prompts on the command line; a seed of the manifest gives the mesh again."""
    many = ["generate", "a red cube", "a blue mug", "-o", str(tmp_path / "out"), "--num-meshes-per-prompt", "2"]
    assert main([*many, "--preview", "sheet.png", *SMALL]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["index"], row["number"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 <= row["pairwise_iou"] <= 1 for row in rows) and rows[0]["pairwise_iou"] == rows[1]["pairwise_iou"]
    assert len({row["seed"] for row in rows}) == 4
    with Image.open(tmp_path / "out" / "00000_a_red_cube.preview.png") as sheet:
        assert sheet.size[0] > 1000
    alone = tmp_path / "alone.GLB"
    assert main(["generate", "a blue mug", "--seed", str(rows[3]["seed"]), "-o", str(alone), *SMALL]) == 0
    assert alone.read_bytes() == (tmp_path / "out" / rows[3]["file"]).read_bytes()


@pytest.mark.parametrize("name", ["turn.gif", "turn.WEBP", "turn.png"])
def test_the_preview_of_one_mesh(name: str, tmp_path: Path) -> None:
    words = ["generate", "a red cube", "--model", "toybox-atom", "-o", str(tmp_path / "a.ply"), *SMALL]
    assert main([*words, "--preview", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / name) as picture:
        assert getattr(picture, "n_frames", 1) == (1 if name.endswith("png") else 36)
    assert {path.name for path in tmp_path.iterdir()} == {"a.ply", name}


@pytest.mark.parametrize(
    "name, content, options, expected",
    [
        ("a.txt", "a\n\n b \na\n", {}, ["a", "b", "a"]),
        ("a.TXT", "\ufeffa\r\nb", {}, ["a", "b"]),
        ("a.json", '["a", "b", "a"]', {}, ["a", "b", "a"]),
        ("a.json", '{"train": ["a"], "test": ["b"]}', {"split": "test"}, ["b"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n{"prompt": "b"}\n', {}, ["a", "b"]),
        ("a.csv", 'id,text\n1,"a, b"\n2,c\n', {"column": "text"}, ["a, b", "c"]),
    ],
)
def test_prompts_of_files(name: str, content: str, options: Any, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / name), **{"column": "prompt", "split": "train", **options}) == expected


def _input(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def test_prompts_of_standard_input_and_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", _input("\ufeffa\n\nrouge é\r\na".encode()))
    assert read_prompts("-", "prompt", "train") == ["a", "rouge é", "a"]
    assert len(read_prompts("pig64", "prompt", "train")) == 64
    monkeypatch.setattr("sys.stdin", _input(b"a\nb\xff\n"))
    with pytest.raises(CorpusError, match="line 2 is not UTF-8"):
        read_prompts("-", "prompt", "train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CorpusError, match="several processes cannot share standard input"):
        read_prompts("-", "prompt", "train")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "prompt: is missing; prd generate"),
        (["--prompts", "absent.txt"], "prompts='absent.txt': no such file; give one, - for standard input"),
        (["--prompts", "a.txt", "a"], "prompt='a': --prompts gives the prompts"),
        (["--prompts", "empty.txt"], "prompts='empty.txt': holds no prompt"),
        (["--prompts", "a.yaml"], "prompts='a.yaml': unknown suffix; must end in .txt"),
        (["--prompts", "a.csv"], "prompts.column='prompt': a.csv has the columns ['text']"),
        (["a", "--column", "b"], "column='b': is of --prompts"),
        (["a", "b", "-o", "x.GLB"], "output='x.GLB': several meshes need a folder; name a folder, and --format glb"),
        (["a", "--num-meshes-per-prompt", "2", "-o", "x.obj"], "several meshes need a folder"),
        (["a", "--num-meshes-per-prompt", "0"], "num-meshes-per-prompt=0: must be an integer in 1..1024"),
        (["a", "b", "--batch-size", "0"], "batch-size=0: must be an integer in 1..1024"),
        (["a", "--format", "obj", "-o", "x.glb"], "format='obj': is not that of output='x.glb'"),
        (["a", "b", "--format", "obj", "--height", "6cm", "-o", "new"], "height='6cm': .obj says no unit of length"),
        (["a", "b", "-o", "a.txt"], "output='a.txt': is a file; name a folder"),
        (["a", "b", "-o", "."], "output='.': holds other files; name a new folder"),
        (["a", "b", " ", "-o", "new"], "prompt=' ': is empty"),
        (["a", "--preview", "x.tiff"], "preview='x.tiff': must end in .gif, .webp, .png, .mp4"),
        (["a", "b", "-o", "new", "--preview", "x/y.gif"], "give its format alone, as turntable.gif"),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_loaded(
    words: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    for name, text in {"a.txt": "a\n", "empty.txt": " \n", "a.yaml": "a", "a.csv": "text\na\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["generate", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1 and message in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "empty.txt", "a.yaml", "a.csv"}


@pytest.mark.parametrize(
    "prompts, status, out", [(["a", EMPTY], 0, "1 meshes, 1 failed"), ([EMPTY, BROKEN], 2, "0 meshes, 2 failed")]
)
def test_the_exit_status_says_whether_any_was_made(
    prompts: list[str], status: int, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", lambda *a, **k: Pipe())
    for _ in range(2):  # and once more, of what is there
        assert main(["generate", *prompts, "-o", str(tmp_path / "out"), *SMALL]) == status
        said = capsys.readouterr()
        assert out in said.out and ("no mesh was made" in said.err) == (status == 2)


def test_several_meshes_of_a_model_that_draws_nothing_are_refused(tmp_path: Path, capsys: Any) -> None:
    words = ["generate", "a red cube", "--model", "toybox-atom", "-o", str(tmp_path / "out")]
    assert main([*words, "--num-meshes-per-prompt", "2"]) == 2
    assert "toybox-atom draws nothing, all would be the same; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["stl", "ply", "3mf"])
def test_a_file_without_a_texture_is_not_unwrapped(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a folder; its preview has the colours of the vertices."""
    monkeypatch.setattr("prd.meshes.mesh.unwrap", lambda *arguments: pytest.fail("unwrapped the mesh"))
    small = ["--resolution", "24", "--faces", "300", "--normal-map", "--model", "toybox-atom"]
    one, sheet = tmp_path / f"one.{format.upper()}", tmp_path / "sheet.png"
    assert main(["generate", "a red cube", "-o", str(one), "--preview", str(sheet), *small]) == 0
    many = ["generate", "a red cube", "a blue mug", "-o", str(tmp_path / "many"), "--format", format, *small]
    assert main(many) == 0
    assert one.stat().st_size > 1000 and len([*(tmp_path / "many").glob(f"*.{format}")]) == 2
    with Image.open(sheet) as picture:
        assert max(picture.convert("HSV").getchannel("S").tobytes()) > 30  # no grey one
