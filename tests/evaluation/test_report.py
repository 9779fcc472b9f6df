"""The page of a run opens from disk and shows what its folder holds; runs are compared in a table."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from PIL import Image

from prd.cli import main
from prd.evaluation.report import POINTS, RunError, chart, differences, duration, find_runs, read_run, write_report
from prd.training.recipes import load_config, save_config
from prd.training.run.folder import write_environment


class Links(HTMLParser):
    """Every address, every tag and all text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.titles: list[str] = []  # of the charts
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        if self.tags[-1:] == ["title"]:
            self.titles.append(data)
        self.text += data


def make_run(folder: Path, *words: str, steps: int = 3, scores: bool = False) -> Path:
    folder.mkdir(parents=True)
    save_config(load_config("toybox", words), folder / "config.yaml")
    write_environment(folder)
    rows = [
        {
            "step": i + 1,
            "lr": 1e-3,
            "gradient_norm": 400.0,
            "gallery/triangles": 8000.0,
            "gallery/iou": 0.3 + i,
            "gradient_norm/mvdream/volume": 2.0 * i,
            "cosine/a-b/volume": -0.5,
            "seconds": 30.0,
        }
        for i in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if scores:
        summary = {"count": 4, "r_at_1": 0.75, "iou": 0.5, "iou_by_shape": {"cube": 0.5}}
        (folder / "scores.json").write_text(
            json.dumps({"single_seen": {"summary": summary, "scores": []}}), encoding="utf-8"
        )
    return folder


def test_the_page_shows_the_run_and_refers_to_its_folder_alone(tmp_path):
    run = make_run(tmp_path / "a <b>", scores=True)
    prompt = 'a <script>alert("x")</script> & 猫'
    for step in (2, 10):
        gallery = run / "gallery" / f"step-{step:06d}"
        gallery.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(gallery / "sheet.png")
        (gallery / "a #1 猫.glb").touch()
        (gallery / "metrics.json").write_text(
            json.dumps([{"prompt": prompt, "mesh": "a #1 猫.glb", "iou": 0.31251}]), encoding="utf-8"
        )
    Image.new("RGB", (8, 8)).save(run / "after.png")
    (run / "meshes").mkdir()
    (run / "meshes" / "a_cat.glb").touch()

    page = Links(write_report(run))
    assert {"gallery/triangles", "gallery/iou", "gradient_norm (parameters)", "gradient_norm"} <= set(page.titles)
    assert page.addresses and not [a for a in page.addresses if a.startswith(("/", "http", "data:")) or ":" in a]
    assert all((run / unquote(address)).is_file() for address in page.addresses)
    assert len(page.addresses) == 2 * 2 + 2  # sheet and mesh of two galleries, the last sheet, a mesh
    assert "script" not in page.tags and "b" in page.tags and prompt in page.text and "a <b>" in page.text
    assert page.text.index("After 10 steps") < page.text.index("After 2 steps")
    packages = json.loads((run / "environment.json").read_text(encoding="utf-8"))[0]["packages"]
    for text in ("0.3125", "3 of 400 steps, 1 min 30 s", "optimizer.lr", packages["torch"], "single_seen", "commit"):
        assert text in page.text


def test_curves_hold_every_finite_metric():
    lines = {"one": [(float(i), 10.0 ** (i / 500)) for i in range(2000)], "two": [(5.0, 3.0)]}
    figure = ElementTree.fromstring(chart("norm & more", lines).replace("&nbsp;", " "))
    (polyline,) = figure.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in polyline.get("points").split()]
    assert 100 < len(points) <= POINTS and len(list(figure.iter("circle"))) == 1
    xs, ys = zip(*points, strict=True)
    assert xs == tuple(sorted(xs)) and ys == tuple(sorted(ys, reverse=True))  # a growing value climbs
    middle = points[len(points) // 2]
    assert middle[1] == pytest.approx((ys[0] + ys[-1]) / 2, abs=3)  # exponential growth is straight on a log axis
    assert "(log)" in "".join(figure.itertext())


def test_a_half_written_line_and_nan_do_not_hide_the_run(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "gradient_norm": NaN, "seconds": 30.0}\n{"step": 5, "gra')
    assert read_run(run).steps == 4
    page = Links(write_report(run))
    assert "4 of 400 steps, 2 min 00 s" in page.text and "nan" not in page.text.lower().split("curves")[1][:2000]


def test_runs_are_compared_by_what_differs_and_by_their_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_run(tmp_path / "one", "--output_dir", "runs/one", scores=True)
    make_run(tmp_path / "sub" / "[red]two", "--seed", "3", "--optimizer.lr", "5e-4", "--output_dir", "b", steps=200)
    first, second = differences(find_runs(tmp_path))
    assert first == {"seed": 0, "optimizer.lr": 4e-3} and second == {"seed": 3, "optimizer.lr": 5e-4}
    assert main(["runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for text in (
        "one",
        "3/400",
        "1 min 30 s",
        "[red]two",
        "200/400",
        "1 h 40 min",
        "optimizer.lr 0.0005",
        "r_at_1 0.75",
    ):
        assert text in table
    assert "output_dir" not in table


def test_what_only_another_generator_has_is_not_listed_of_a_run(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", "--model", "{class: atom, text_encoder: toybox}")
    first, second = differences(find_runs(tmp_path))
    assert first["model.class"] == "triplane_turbo" and second["model.class"] == "atom"
    assert "model.rank" in first and "model.num_blocks" in second and not first.keys() & {"model.num_blocks"}


def test_a_damaged_file_hides_neither_the_run_nor_the_others(tmp_path, capsys, caplog):
    run = make_run(tmp_path / "one", scores=True)
    make_run(tmp_path / "two")
    gallery = run / "gallery" / "step-000002"
    gallery.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(gallery / "sheet.png")
    (gallery / "metrics.json").write_text('[{"pro', encoding="utf-8")
    (run / "environment.json").write_text('[{"comm', encoding="utf-8")
    (run / "scores.json").write_text('{"sing', encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "After 2 steps" in page and "3 of 400 steps" in page
    for name in ("metrics.json", "environment.json", "scores.json"):
        assert re.search(rf"{name} is damaged .* left out", caplog.text)
    write_environment(run)
    assert len(read_run(run).sessions) == 1
    (tmp_path / "two" / "config.yaml").write_text("", encoding="utf-8")  # as a full disk leaves it
    assert main(["runs", str(tmp_path)]) == 0
    assert "one" in capsys.readouterr().out and "two: its config.yaml is no mapping" in caplog.text


def test_a_long_key_is_whole_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", "--renderers.volume.rgb_weight_gradient_scale", "0.2")
    assert main(["runs", str(tmp_path)]) == 0
    rows = [line.split("│")[4].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "volume.rgb_weight_gradient_scale0.2" in "".join(rows).replace(" ", "")


def test_folders_without_runs_are_one_sentence(tmp_path, capsys):
    for folder, message in ((tmp_path, "holds no run"), (tmp_path / "absent", "no such folder")):
        assert main(["runs", str(folder)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path)
    assert duration(3.21) == "3.2 s"
