"""`prd evaluate`: reports of anyone's meshes, what is refused, and what goes on where it ended."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh import creation

from prd.cli import main
from prd.evaluation.inputs import InputError, read_items
from prd.evaluation.judges import GeometryJudge, RetrievalJudge
from tests.evaluation.made import CAPTIONS, refused, run, write_captions
from tests.evaluation.test_report import Links
from tests.evaluation.tiny_clip import save_tiny_clip

# -- geometry ----------------------------------------------------------------------------------------------------------


def test_geometry_of_a_folder_is_a_row_per_mesh_and_a_page(meshes: Path, tmp_path: Path) -> None:
    report = run(meshes, "geometry", tmp_path / "out")
    assert report["protocol"] == "geometry" and [row["file"] for row in report["rows"]] == list(CAPTIONS)
    assert [row["caption"] for row in report["rows"]] == list(CAPTIONS.values())
    assert [row["genus"] for row in report["rows"]] == [0, 1, 0, 0]
    assert all(row["watertight"] and row["self_intersections"] == 0 for row in report["rows"])
    assert report["summary"]["coverage"] == 1 and report["summary"]["watertight"] == 1
    page = Links(tmp_path / "out" / "report.html")
    assert len(page.addresses) == 16 and all((tmp_path / "out" / place).is_file() for place in page.addresses)
    assert "script" not in page.tags and all(caption in page.text for caption in CAPTIONS.values())


def broken(folder: Path) -> dict[str, str]:
    """Files that cannot be judged, and a word of what is said of each."""
    box = creation.box()
    nan = box.vertices.copy()
    nan[0, 0] = np.nan
    trimesh.Trimesh(nan, box.faces, process=False, validate=False).export(folder / "nan.ply")
    header = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    )
    header += "element face 10000000\nproperty list uchar int vertex_indices\nend_header\n"
    points = (
        header.partition("element face")[0].replace("binary_little_endian", "ascii").replace("vertex 3", "vertex 1")
    )
    points += "end_header\n0 0 0\n"
    gltf = json.dumps({"accessors": [{"count": 30_000_000}], "meshes": [{"primitives": [{"indices": 0}]}]}).encode()
    contents: dict[str, bytes] = {
        "huge.ply": header.encode(),
        "huge.glb": b"glTF" + struct.pack("<IIII", 2, 20 + len(gltf), len(gltf), 0x4E4F534A) + gltf,
        "huge.stl": bytes(80) + struct.pack("<I", 10_000_000),
        "nothing.ply": b"",
        "words.glb": b"this is no mesh",
        "cut.ply": header.replace("10000000", "1").encode(),
        "empty.obj": b"# nothing\n",
        "points.ply": points.encode(),
        "flat.obj": b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n",
        "index.off": b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with (folder / "huge.stl").open("ab") as stream:
        stream.truncate(84 + 50 * 10_000_000)  # a sparse file
    said = {"nan.ply": "NaN", "huge.ply": "faces", "huge.glb": "faces", "huge.stl": "faces", "empty.obj": "empty"}
    return {
        name: said.get(name, name.partition(".")[0] if name == "gone.ply" else "") for name in ["nan.ply", *contents]
    }


def test_what_cannot_be_judged_is_a_row_of_the_report(meshes: Path, tmp_path: Path) -> None:
    said = broken(meshes) | {"gone.ply": "no such file"}
    write_captions(meshes, CAPTIONS | {name: f"caption {k}" for k, name in enumerate(said)})
    report = run(meshes, "geometry", tmp_path / "out")
    rows = {row["file"]: row for row in report["rows"]}
    for name, word in said.items():
        assert word in rows[name]["error"] and len(rows[name]["error"].splitlines()) == 1, rows[name]
        assert "watertight" not in rows[name]
    assert report["summary"] | {"judged": 4, "failed": len(said), "prompts": 4 + len(said)} == report["summary"]
    assert all(
        word in (tmp_path / "out" / "report.html").read_text(encoding="utf-8") for word in ("NaN", "no such file")
    )


def test_status_2_and_a_report_where_nothing_could_be_judged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    write_captions(tmp_path / "in", {"gone.glb": "a ghost"})
    report = run(tmp_path / "in", "geometry", tmp_path / "out", status=2)
    assert report["summary"]["judged"] == 0 and "no such file" in report["rows"][0]["error"]
    assert "nothing could be judged" in capfd.readouterr().err


TABLES: list[tuple[str, str, tuple[str, ...]]] = [
    ("captions.csv", "", ("is empty",)),
    ("captions.csv", "file,caption\n", ("is empty",)),
    ("captions.csv", "name,caption\nbox.glb,a box\n", ("'name'", "'file'")),
    ("captions.csv", "file,file,caption\nbox.glb,b,c\n", ("one 'file'",)),
    ("captions.csv", "file,caption\nbox.glb,\n", ("line 2", "caption of box.glb", "is empty")),
    ("captions.csv", "file,caption\n,a box\n", ("line 2", "names no file")),
    ("captions.csv", "file,caption\nbox.glb,a box\nbox.glb,a cube\n", ("line 3", "box.glb", "twice")),
    ("captions.csv", "file,caption\nbox.glb,a box\n./box.glb,a cube\n", ("line 3", "box.glb", "twice")),
    ("captions.csv", "file,caption\nbox.glb,a box, red\n", ("line 2", "3 fields", "quotes")),
    ("captions.csv", 'file,caption\nbox.glb,"a box\n', ("is no CSV",)),
    ("captions.csv", "file,caption\nother.glb,a box\n", ("box.glb", "no caption", "add a row")),
    ("captions.jsonl", '{"file": "box.glb"}\n', ("line 1", "caption")),
    ("captions.jsonl", "[1]\n", ("line 1",)),
    ("captions.jsonl", '{"file": "box.glb", "caption": 3}\n', ("line 1", "text")),
]


@pytest.mark.parametrize(("name", "text", "said"), TABLES)
def test_a_table_that_is_wrong_is_refused_before_anything_is_written(
    name: str, text: str, said: Sequence[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    creation.box().export(tmp_path / "in" / "box.glb")
    (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    message = refused(capfd, str(tmp_path / "in"), "--protocol", "geometry", "-o", str(tmp_path / "out"))
    assert all(word in message for word in said), message
    assert not (tmp_path / "out").exists()


def test_other_things_that_are_refused_before_anything_is_written(
    meshes: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    source = str(meshes)
    for words, said in (
        ([source, "--protocol", "prd", "-o", out], ("'prd'", "prd-paper", "geometry")),
        ([source, "--protocol", "geometry"], ("output",)),
        ([source, "-o", out], ("protocol",)),
        ([str(tmp_path / "none"), "--protocol", "geometry", "-o", out], ("no such folder", "captions.csv")),
        ([source, "--protocol", "geometry", "-o", out, "--clip", str(clip)], ("clip", "geometry")),
        ([source, "--protocol", "prd-paper", "-o", out, "--clip", "nowhere"], ("nowhere",)),
        ([source, "--protocol", "render-fid", "-o", out, "--clip", str(clip)], ("reference",)),
        ([source, "--protocol", "kid", "-o", out, "--clip", str(clip), "--reference", source], ("two pictures",)),
        ([source, "--protocol", "t3bench-quality", "-o", out], ("clip", "any scorer")),
        (["--compare", str(tmp_path), str(tmp_path)], ("report.json",)),
    ):
        message = refused(capfd, *words)
        assert all(word in message for word in said), message
        assert not (tmp_path / "out").exists()
    write_captions(meshes, dict.fromkeys(CAPTIONS, "the same"))
    message = refused(capfd, source, "--protocol", "rprob", "-o", out, "--clip", str(clip))
    assert "box.glb" in message and "torus.obj" in message and not (tmp_path / "out").exists()
    assert run(meshes, "geometry", tmp_path / "out")["summary"]["judged"] == 4  # which tells no captions apart


def test_another_protocol_or_model_in_the_same_folder_is_refused(
    meshes: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = run(meshes, "diffsplat", out, "--clip", str(clip))
    for words in (["--protocol", "prd-paper", "--clip", str(clip)], ["--protocol", "geometry"]):
        message = refused(capfd, str(meshes), *words, "-o", str(out))
        assert "diffsplat" in message and words[1] in message
    other = str(save_tiny_clip(tmp_path / "other", seed=1))
    assert "clip" in refused(capfd, str(meshes), "--protocol", "diffsplat", "--clip", other, "-o", str(out))
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == before


# -- resumption --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["geometry", "prd-paper"])
def test_an_interrupted_run_goes_on_and_gives_the_same_report(
    protocol: str, meshes: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [] if protocol == "geometry" else ["--clip", str(clip)]
    whole = run(meshes, protocol, tmp_path / "whole", *words)
    kind: Any = GeometryJudge if protocol == "geometry" else RetrievalJudge
    look, calls = kind.look, list[str]()

    def interrupted(self: Any, item: Any, key: str) -> Any:
        calls.append(item.file)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return look(self, item, key)

    monkeypatch.setattr(kind, "look", interrupted)
    for _ in range(2):
        assert main(["evaluate", str(meshes), "--protocol", protocol, "-o", str(tmp_path / "out"), *words]) == 130
        assert not (tmp_path / "out" / "report.json").exists()
    assert run(meshes, protocol, tmp_path / "out", *words) == whole
    files = list(CAPTIONS)
    assert calls == [files[0], files[1], files[1], files[2], files[2], files[3]]  # none was judged twice
    assert run(meshes, protocol, tmp_path / "out", *words) == whole and len(calls) == 6


def test_a_failure_of_the_machine_is_tried_again(meshes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(meshes, "geometry", tmp_path / "whole")
    look = GeometryJudge.look

    def full(self: Any, item: Any, key: str) -> Any:
        if item.file == "box.glb":
            raise MemoryError
        return look(self, item, key)

    with monkeypatch.context() as patch:
        patch.setattr(GeometryJudge, "look", full)
        assert "MemoryError" in run(meshes, "geometry", tmp_path / "out")["rows"][0]["error"]
    assert run(meshes, "geometry", tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_twice_an_evaluation_ends_with_the_same_report(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "meshes"
    folder.mkdir()
    rows = {}
    for k in range(60):
        mesh = creation.icosphere(4)
        mesh.apply_scale([1, 1, 1 + k / 60])
        mesh.export(folder / f"{k}.ply")
        rows[f"{k}.ply"] = f"a ball {k}"
    write_captions(folder, rows)
    words = [str(folder), "--protocol", "prd-paper", "--clip", str(clip)]
    whole = run(folder, "prd-paper", tmp_path / "whole", *words[3:])
    command_line = [sys.executable, "-m", "prd.cli", "evaluate", *words, "-o", str(tmp_path / "out")]
    for wanted in (10, 30):
        process = subprocess.Popen(command_line, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob("out/work/*.json"))) < wanted and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert not (tmp_path / "out" / "report.json").exists()
    assert subprocess.run(command_line, check=False).returncode == 0
    assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
    assert whole["summary"]["judged"] == 60


def test_a_mesh_that_changes_is_judged_again(meshes: Path, tmp_path: Path) -> None:
    run(meshes, "geometry", tmp_path / "out")
    creation.torus(1, 0.3).export(meshes / "box.glb")
    assert [row["genus"] for row in run(meshes, "geometry", tmp_path / "out")["rows"]] == [1, 1, 0, 0]


def test_shards_of_two_processes_give_the_same_report(meshes: Path, tmp_path: Path) -> None:
    from prd.evaluation.run import EvaluationConfig, Processes, evaluate

    whole = run(meshes, "geometry", tmp_path / "whole")
    config = EvaluationConfig(protocol="geometry", output=tmp_path / "out")
    items = read_items(meshes)
    assert evaluate(items, config, Processes(1, 2)) == {}
    assert evaluate(items, config, Processes(0, 2)) == whole


def test_jsonl_and_single_pictures_are_read(tmp_path: Path) -> None:
    for k in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"owl_{k}.png")
    lines = [json.dumps({"file": f"owl_{k}.png", "caption": "an owl"}) for k in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    items = read_items(tmp_path)
    assert len(items) == 1 and [path.name for path in items[0].pictures] == [f"owl_{k}.png" for k in range(4)]
    (tmp_path / "captions.csv").write_text("file,caption\n", encoding="utf-8")
    with pytest.raises(InputError, match="both"):
        read_items(tmp_path)
