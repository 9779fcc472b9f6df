"""`prd evaluate`: reports of anyone's meshes, the protocols' arithmetic, resumption, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from trimesh import creation

from prd.cli import main
from prd.evaluation import command, formulas
from prd.evaluation.inputs import InputError, read_items
from prd.evaluation.judges import GeometryJudge, RetrievalJudge
from prd.evaluation.protocols import PROTOCOLS
from tests.evaluation.test_report import Links
from tests.evaluation.tiny_clip import save_tiny_clip

ROOT = Path(__file__).parents[2]
CAPTIONS = {"box.glb": "a box, plain.", "torus.obj": "a torus", "ball.ply": 'a "ball"', "cone.stl": "a cone of ice"}


def coloured(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    colors = np.full((len(mesh.vertices), 4), 255, np.uint8)
    colors[:, :3] = np.round(255 * (mesh.vertices - mesh.bounds[0]) / np.ptp(mesh.bounds, axis=0))
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)
    return mesh


def write_captions(folder: Path, rows: dict[str, str]) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "caption"), *rows.items()])


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    """A folder of meshes that trimesh wrote."""
    folder = tmp_path / "meshes"
    folder.mkdir()
    made = (creation.box(), creation.torus(1, 0.3), creation.icosphere(2), creation.cone(1, 2))
    for name, mesh in zip(CAPTIONS, made, strict=True):
        coloured(mesh).export(folder / name)
    write_captions(folder, CAPTIONS)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def run(source: Path, protocol: str, out: Path, *words: str, status: int = 0) -> dict[str, Any]:
    assert main(["evaluate", str(source), "--protocol", protocol, "-o", str(out), *words]) == status
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a command that is refused: one line."""
    capfd.readouterr()
    assert main(["evaluate", *words]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1, said
    return said


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


# -- arithmetic of the protocols ---------------------------------------------------------------------------------------


def renders(folder: Path, count: int = 5, views: int = 4, size: int = 512) -> dict[str, list[np.ndarray]]:
    """A folder of pictures in folders, with captions that hold what the published script deletes."""
    rng = np.random.default_rng(0)
    captions = ["a DSLR photo of a pig, asleep", "a cat. sat", "a dog_ran", "an owl", "a red fox, in snow."][:count]
    made = {}
    for k, caption in enumerate(captions):
        (folder / f"item{k}").mkdir(parents=True)
        made[caption] = [
            np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), np.uint8), size // 8, 0), size // 8, 1)
            for _ in range(views)
        ]
        for v, image in enumerate(made[caption]):
            Image.fromarray(image).save(folder / f"item{k}" / f"rgb_{v}.png")
    write_captions(folder, {f"item{k}": caption for k, caption in enumerate(captions)})
    return made


def features_of(clip: Path, images: Sequence[np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features by transformers alone, as the published script takes them: not normalised."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    small = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) / 255 for image in images]
    pixels = torch.from_numpy(((np.stack(small) - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        pictures = model.get_image_features(pixel_values=pixels)
        words = [
            model.get_text_features(**tokenizer([text], truncation=True, max_length=77, return_tensors="pt"))
            for text in texts
        ]
    return pictures.pooler_output.numpy(), np.concatenate([word.pooler_output.numpy() for word in words])


def test_prd_code_is_the_published_arithmetic(clip: Path, tmp_path: Path) -> None:
    """evaluation/clipscore/compute.py, step by step, on the same pictures and weights."""
    made = renders(tmp_path / "in")
    report = run(tmp_path / "in", "prd-code", tmp_path / "out", "--clip", str(clip))
    folders = [caption.replace(",", "").replace(".", "").replace(" ", "_") for caption in made]
    candidates = [name.replace("_", " ") for name, views in zip(folders, made.values(), strict=True) for _ in views]
    images, texts = features_of(
        clip, [i for views in made.values() for i in views], [f"A photo depicts{c}" for c in candidates]
    )
    images /= np.sqrt(np.sum(images**2, axis=1, keepdims=True))
    texts /= np.sqrt(np.sum(texts**2, axis=1, keepdims=True))
    per = 2.5 * np.clip(np.sum(images * texts, axis=1), 0, None)
    every = list(dict.fromkeys(candidates))
    chosen = np.clip(images @ texts[[candidates.index(c) for c in every]].T, 0, None).argmax(axis=-1)
    recall = (chosen == [every.index(c) for c in candidates]).mean()
    summary = report["summary"]
    assert summary["clip_score"] == pytest.approx(per.mean(), abs=1e-4) and per.mean() > 0.01
    assert summary["r_at_1"] == pytest.approx(recall, abs=1e-4)
    assert summary["clip_score_printed"] == pytest.approx(per[-4:].mean(), abs=1e-4)  # rgb_0 ... rgb_3 of the last
    assert summary["candidates"] == len(every) == 5 and summary["coverage"] == 1


def test_what_fails_is_a_miss_in_the_paper_and_left_out_in_the_code(clip: Path, tmp_path: Path) -> None:
    renders(tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "item4")
    paper = run(tmp_path / "in", "prd-paper", tmp_path / "paper", "--clip", str(clip))
    code = run(tmp_path / "in", "prd-code", tmp_path / "code", "--clip", str(clip))
    assert paper["summary"]["candidates"] == 5 and code["summary"]["candidates"] == 4
    scores = [row.get("clip_score", 0) for row in paper["rows"]]
    assert paper["summary"]["clip_score"] == pytest.approx(sum(scores) / 5) and "error" in paper["rows"][4]
    low, high = paper["summary"]["intervals"]["clip_score"]
    assert low <= paper["summary"]["clip_score"] <= high and paper["summary"]["coverage"] == 0.8


def test_pictures_of_another_size_or_number_are_rows_that_failed(clip: Path, tmp_path: Path) -> None:
    renders(tmp_path / "in")
    Image.new("RGB", (256, 256)).save(tmp_path / "in" / "item0" / "rgb_1.png")
    (tmp_path / "in" / "item1" / "rgb_3.png").unlink()
    (tmp_path / "in" / "item2" / "rgb_0.png").write_bytes(b"no picture")
    rows = run(tmp_path / "in", "prd-paper", tmp_path / "out", "--clip", str(clip))["rows"]
    for row, word in zip(rows, ("256x256", "3 pictures", "rgb_0.png"), strict=False):
        assert word in row["error"]
    assert all("error" not in row for row in rows[3:])


def test_rprob_is_the_softmax_over_the_query_set(clip: Path, tmp_path: Path) -> None:
    made = renders(tmp_path / "in")
    (tmp_path / "queries.txt").write_text("a pig\na cow\nan owl\n", encoding="utf-8")
    words = ["--clip", str(clip), "--queries", str(tmp_path / "queries.txt")]
    report = run(tmp_path / "in", "rprob", tmp_path / "out", *words)
    captions = [*made, "a pig", "a cow"]
    images, texts = features_of(clip, [i for views in made.values() for i in views], captions)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    share = torch.softmax(torch.from_numpy(100.0 * images.astype(np.float64) @ texts.T), dim=1).numpy()
    right = np.repeat(np.arange(5), 4)
    expected = share[np.arange(20), right].reshape(5, 4).mean(axis=1)
    assert report["summary"]["candidates"] == 7
    np.testing.assert_allclose([row["r_probability"] for row in report["rows"]], expected, atol=1e-4)


def test_all_protocols_run_on_meshes(meshes: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scaledreamer and t3bench-quality, with their many views, on small pictures."""
    from dataclasses import replace

    assert tuple(PROTOCOLS) == command.NAMES
    for name, protocol in PROTOCOLS.items():
        assert protocol.pictures is not None or name == "geometry"
        small = None if protocol.pictures is None else replace(protocol.pictures, size=32)
        monkeypatch.setitem(PROTOCOLS, name, replace(protocol, pictures=small))
        words = [] if name == "geometry" else ["--clip", str(clip)]
        if protocol.measure in ("fid", "kid"):
            Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
            Image.new("RGB", (32, 32), "red").save(tmp_path / "b.png")
            (tmp_path / "reference").mkdir(exist_ok=True)
            [shutil.copy(tmp_path / f"{k}.png", tmp_path / "reference") for k in "ab"]
            words += ["--reference", str(tmp_path / "reference")]
        report = run(meshes, name, tmp_path / name, *words)
        assert report["summary"]["judged"] == 4 and report["settings"]["source"], report
        assert report["card"].startswith(name)


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_quality_smooths_over_the_sphere_and_takes_the_best_vertex() -> None:
    flat = np.zeros((162, 5))
    assert formulas.quality(flat) == pytest.approx(50)
    flat[:, 2] = 1
    assert formulas.quality(flat) == pytest.approx(70)
    spike = np.zeros((162, 5))
    spike[0, 0] = 1
    assert 50 < formulas.quality(spike) < 55  # one good view among bad ones counts little


def test_distances_are_0_for_the_same_pictures_and_known_for_gaussians() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4000, 4)), rng.normal(size=(4000, 4)) * 2 + [1, 0, 0, 0]
    assert formulas.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert formulas.frechet_distance(one, other) == pytest.approx(1 + 4 * (1 + 4 - 2 * 2), rel=0.1)
    assert formulas.kernel_distance(one[:2000], one[2000:]) == pytest.approx(0, abs=0.05)
    assert formulas.kernel_distance(one, other) > 0.2


def test_front_on_all_sides_does_not_pass_as_views() -> None:
    """With features that tell views apart, three further fronts lower the score and raise the Janus measure."""
    words = np.eye(4, dtype=np.float32)
    right = formulas.views_figures(PROTOCOLS["views"], words, words)
    janus = formulas.views_figures(PROTOCOLS["views"], words[[0, 0, 0, 0]], words)
    assert right["view_score"] > 0.99 and right["janus"] < 0.01
    assert janus["view_score"] < 0.01 and janus["janus"] > 0.99


def test_a_planted_second_front_is_told_from_right_shapes(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the toy box's exact shapes, by the pictures alone: random weights know no words of views."""
    bench = SourceFileLoader("bench_janus", str(ROOT / "benchmarks" / "bench_janus.py")).load_module()
    monkeypatch.setattr(bench, "COLORS", ("red", "green"))
    assert bench.measure(str(clip), tmp_path, 32)["front_back_similarity"] > 0.9


# -- comparison --------------------------------------------------------------------------------------------------------


def test_two_evaluations_are_compared_in_pairs(
    meshes: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(meshes, "diffsplat", tmp_path / "a", "--clip", str(clip))
    for name in CAPTIONS:
        creation.box().export(meshes / name)
    run(meshes, "diffsplat", tmp_path / "b", "--clip", str(clip))
    capfd.readouterr()
    words = ["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c")]
    assert main(words) == 0 and "cosine" in capfd.readouterr().out
    found = json.loads((tmp_path / "c" / "comparison.json").read_text(encoding="utf-8"))["figures"]["cosine"]
    assert found["difference"] == pytest.approx(found["b"] - found["a"]) and found["prompts"] == 4
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert len(Links(tmp_path / "c" / "comparison.html").addresses) == 32


def test_results_of_different_protocols_do_not_stand_in_one_column(
    meshes: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(meshes, "diffsplat", tmp_path / "a", "--clip", str(clip))
    run(meshes, "prd-paper", tmp_path / "b", "--clip", str(clip))
    run(meshes, "diffsplat", tmp_path / "c", "--clip", str(save_tiny_clip(tmp_path / "other", seed=1)))
    for other, word in (("b", "protocol"), ("c", "model hash")):
        message = refused(capfd, "--compare", str(tmp_path / "a"), str(tmp_path / other))
        assert word in message and "one column" in message


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
