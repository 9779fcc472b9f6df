"""The arithmetic of the protocols, on pictures and weights that are computed beside it, and comparisons."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from trimesh import creation

from prd.cli import main
from prd.evaluation import command, formulas
from prd.evaluation.protocols import PROTOCOLS
from prd.toybox.world import COLORS
from tests.evaluation.made import CAPTIONS, refused, run, write_captions
from tests.evaluation.test_report import Links
from tests.evaluation.tiny_clip import save_tiny_clip

ROOT = Path(__file__).parents[2]


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
    spec = spec_from_file_location("bench_janus", ROOT / "benchmarks" / "bench_janus.py")
    assert spec is not None and spec.loader is not None
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "COLORS", {name: COLORS[name] for name in ("red", "green")})
    found = bench.measure(str(clip), tmp_path, 32)
    assert set(found) == set(bench.fields_of("red", "mug")) - {"right"}
    assert found["second front"]["front_back_similarity"] > 0.9


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
