"""What a run shows: fixed prompts and noise give the same gallery, measured and on disk."""

from __future__ import annotations

import json
import re

import datasets
import pytest
import torch
import trimesh
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from prd.adapters.precision import keep_in_half
from prd.data.prompts import held_out_prompts
from prd.errors import ConfigError
from prd.evaluation.pictures import LABEL_HEIGHT
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.loading.stable_diffusion import load_base
from prd.toybox.benchmark import ToyBox
from prd.training.galleries import export_meshes, make_fields, mesh_names, save_gallery
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.training.validation import Validation, measure

SMALL = ["--validation.resolution", "24", "--validation.isosurface_resolution", "16", "--validation.views", "4"]


@pytest.fixture
def student_and_encoder(toybox):
    base = load_base("toybox", text=True)
    torch.manual_seed(0)
    return TriplaneTurboModel.from_base(base, load_config("toybox").model), base.encoder


def test_a_gallery_is_drawn_measured_and_repeats(student_and_encoder, tmp_path):
    prompts = ["a red cube", "a blue mug", "a red torus"]
    config = load_config("toybox", [*SMALL, "--validation.prompts", f"[{', '.join(prompts)}]"])
    torch.manual_seed(1)
    means = save_gallery(*student_and_encoder, config, tmp_path / "a", ToyBox())
    torch.manual_seed(2)  # nothing of the gallery comes from the global generator
    assert save_gallery(*student_and_encoder, config, tmp_path / "b", ToyBox()) == means
    for name in ("sheet.png", "metrics.json", "a_red_cube.glb"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # RGB and normals, four views each
    with Image.open(tmp_path / "a" / "sheet.png") as picture:
        assert picture.size == (8 * 25, 3 * (25 + LABEL_HEIGHT))

    rows = json.loads((tmp_path / "a" / "metrics.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in rows] == prompts
    assert {row["mesh"] for row in rows} == {path.name for path in (tmp_path / "a").glob("*.glb")}
    mesh = trimesh.load(tmp_path / "a" / rows[0]["mesh"], force="mesh")
    assert len(mesh.faces) == rows[0]["triangles"] and mesh.volume == pytest.approx(rows[0]["volume"], rel=1e-3)
    for key in ("coverage", "iou", "triangles"):
        assert means[key] == pytest.approx(sum(row[key] for row in rows) / 3)
    assert means["empty"] == 0 and 0 < means["coverage"] < 1

    # what a prompt gives does not depend on its company, and other noise gives another shape
    alone = load_config("toybox", [*SMALL, "--validation.prompts", "[a red cube]"])
    save_gallery(*student_and_encoder, alone, tmp_path / "c", ToyBox())
    (row,) = json.loads((tmp_path / "c" / "metrics.json").read_text(encoding="utf-8"))
    assert row["iou"] == pytest.approx(rows[0]["iou"], abs=1e-3)
    other = load_config("toybox", [*SMALL, "--validation.prompts", "[a red cube]", "--seed", "1"])
    save_gallery(*student_and_encoder, other, tmp_path / "d", ToyBox())
    assert (tmp_path / "d" / "sheet.png").read_bytes() != (tmp_path / "c" / "sheet.png").read_bytes()


def test_a_prompt_without_a_surface_is_a_grey_row_and_no_mesh(student_and_encoder, tmp_path, monkeypatch):
    student, encoder = student_and_encoder
    generate = student.generate

    def vanished(*words, **options):
        field = generate(*words, **options)
        field.bias_radius = -5.0
        return field

    monkeypatch.setattr(student, "generate", vanished)
    config = load_config("toybox", [*SMALL, "--validation.prompts", "[a red cube]", "--background", "0.25"])
    means = save_gallery(student, encoder, config, tmp_path, ToyBox())
    assert means["empty"] == 1 and means["coverage"] == 0 and not list(tmp_path.glob("*.glb"))
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))[0]["mesh"] is None
    picture = Image.open(tmp_path / "sheet.png").crop((0, LABEL_HEIGHT, 24, LABEL_HEIGHT + 24))
    assert picture.getextrema() == ((64, 64),) * 3


def test_a_caption_that_is_measured_several_times_has_other_noise_each_time(student_and_encoder):
    student, encoder = student_and_encoder
    scores = measure(student, encoder, ["a red toy"] * 3, ToyBox(), seed=0, num_inference_steps=1)
    assert len({score.score for score in scores}) == 3
    summary = ToyBox().summary(scores)
    assert summary["precision"] == pytest.approx(sum(score.score for score in scores) / 3, abs=1e-4)
    assert summary["coverage"] == len({score.reached for score in scores} - {None}) / 3


def test_families_are_measured_after_a_run_where_its_config_asks(student_and_encoder):
    """By default no caption is measured twice, so that the end of a fitted run costs what it did."""
    for words, times in ((), 0), (("--validation.families", "2"), 2):
        config = load_config("toybox", [*SMALL, "--validation.prompts", "[]", *words])
        splits = Validation(config, *student_and_encoder, (), benchmark=ToyBox()).splits()
        assert splits == ToyBox().splits(held_out_prompts(config.prompts), 24, times)
        assert sum(map(len, splits.values())) == 96 + 26 * times


def test_every_prompt_has_a_file_name_of_its_own():
    names = mesh_names(["A cat!", "a cat 2", "a cat", "a  cat?", "猫", "...", "x" * 300])
    assert names[0] == "a_cat.glb" and names[4] == "猫.glb" and names[5] == "prompt.glb"
    assert len(set(names)) == len(names) and max(map(len, names)) < 100


def test_a_protocol_of_the_field_judges_a_gallery(student_and_encoder, tmp_path):
    words = ["--validation.protocol", "geometry", "--validation.gallery_steps", "2", "--output_dir", str(tmp_path)]
    config = load_config("toybox", [*SMALL, *words, "--validation.prompts", "[a red cube, a blue mug]"])
    values = Validation(config, *student_and_encoder, ["a red cube"]).gallery(2)
    assert values["gallery/geometry/watertight"] == 1 and values["gallery/geometry/coverage"] == 1
    report = json.loads((tmp_path / "gallery/step-000002/evaluation/report.json").read_text(encoding="utf-8"))
    assert [row["caption"] for row in report["rows"]] == ["a red cube", "a blue mug"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--validation.protocol", "geometry"], "gallery_steps"),
        (["--validation.protocol", "prd", "--validation.gallery_steps", "2"], "prd-paper"),
        (["--validation.protocol", "kid", "--validation.gallery_steps", "2"], "reference"),
        (["--validation.clip", "somewhere"], "validation.protocol"),
        (
            ["--validation.protocol", "geometry", "--validation.gallery_steps", "2", "--validation.clip", "a"],
            "no model",
        ),
    ],
)
def test_a_protocol_that_cannot_judge_galleries_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        load_config("toybox", words)


def test_a_gallery_of_no_prompts_is_refused():
    with pytest.raises(ConfigError, match="gallery_steps"):
        load_config("toybox", ["--validation.gallery_steps", "5", "--validation.prompts", "[]"])


def test_a_run_shows_its_steps_in_tensorboard_a_gallery_and_a_page(toybox, tmp_path, capfd, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red cube\na blue mug\n", encoding="utf-8")
    run = tmp_path / "run"
    words = ["--output_dir", str(run), "--prompts.source", str(tmp_path / "prompts.txt"), "--max_train_steps", "2"]
    words += ["--prompts.held_out", "[]", "--prompts.stack_fraction", "0", "--validation.prompts", "[a red cube]"]
    words += ["--validation.gallery_steps", "2", "--train_batch_size", "1"]
    words += ["--num_denoising_steps", "2", "--num_threads", "1", "--renderers.volume.grid_resolution", "16"]
    words += [
        "--renderers.surface.grid_resolution",
        "16",
        "--renderers.volume.num_samples",
        "16",
        "--validation.num_inference_steps",
        "2",
    ]
    Trainer(load_config("toybox", [*SMALL, *words])).train()

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (events,) = (path for path in run.rglob("events.out.tfevents.*") if path.parent.name == "prd")
    recorded = EventAccumulator(str(events)).Reload()
    for teacher in ("stable_diffusion", "mvdream", "richdreamer"):
        for renderer in ("volume", "surface"):
            name = f"gradient_norm/{teacher}/{renderer}"
            scalars = recorded.Scalars(name)
            assert [event.step for event in scalars] == [1, 2]
            assert [event.value for event in scalars] == pytest.approx([row[name] for row in rows], rel=1e-4)
    for renderer in ("volume", "surface"):  # of teachers that judge the same pixels: colours
        assert all(-1 <= row[f"cosine/stable_diffusion-mvdream/{renderer}"] <= 1 for row in rows)
    assert "gallery/coverage" not in rows[0] and 0 < rows[1]["gallery/coverage"] < 1
    assert rows[1]["peak_gigabytes"] >= rows[0]["peak_gigabytes"] > 0.05

    assert sorted(path.name for path in (run / "gallery").iterdir()) == ["step-000002"]
    page = (run / "index.html").read_text(encoding="utf-8")
    assert "2 of 2 steps" in page and "gallery/step-000002/sheet.png" in page and "meshes/a_red_cube.glb" in page
    bar = capfd.readouterr().err
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d, .*(s/it|it/s).*peak=\d", bar), bar[-500:]


@pytest.mark.parametrize(
    ("name", "base_dtype", "expected"),
    [("no", None, torch.float32), ("bf16", None, torch.bfloat16), ("bf16", "bfloat16", torch.bfloat16)],
)
def test_what_is_shown_and_measured_is_computed_in_the_precision_of_training(
    name, base_dtype, expected, student_and_encoder, tmp_path, monkeypatch
):
    student, encoder = student_and_encoder
    if base_dtype is not None:
        keep_in_half(student.backbone, torch.bfloat16)
    words = [*SMALL, "--validation.prompts", "[a red cube, a blue mug]", "--mixed_precision", name]
    words += ["--validation.num_inference_steps", "1", "--output_dir", str(tmp_path / "run"), "--report_to", "null"]
    seen: list[torch.dtype] = []
    generate = student.generate

    def watched(embeds, *args, **options):
        assert embeds.dtype == torch.float32  # of the text encoder, as in training
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        field = generate(embeds, *args, **options)
        assert field.sdf(torch.zeros(len(embeds), 1, 3)).dtype == torch.float32
        return field

    monkeypatch.setattr(student, "generate", watched)
    config = load_config("toybox", words)
    validation = Validation(config, student, encoder, ["a red cube", "a blue mug"], benchmark=ToyBox())
    (tmp_path / "run").mkdir()
    for shown in (
        *(validation.before, validation.spread, lambda: validation.gallery(1), validation.quick_recognition),
        lambda: export_meshes(student, encoder, ["a red cube"], config, tmp_path / "meshes"),
    ):
        seen.clear()
        shown()
        assert seen and set(seen) == {expected}
    assert not torch.is_autocast_enabled("cpu")


def test_a_gallery_in_half_precision_is_that_of_a_rollout(student_and_encoder):
    """The planes are those of the model under the trainer's own autocast, bit for bit."""
    student, encoder = student_and_encoder
    embeds = encoder(["a red cube"])
    shown = make_fields(student, embeds, [torch.Generator().manual_seed(0)], 2, "bf16")
    AcceleratorState._reset_state()  # of a run before
    with Accelerator(mixed_precision="bf16", cpu=True).autocast(), torch.no_grad():
        trained = student.generate(embeds, [torch.Generator().manual_seed(0)], num_inference_steps=2)
    AcceleratorState._reset_state()
    assert torch.equal(shown.planes, trained.planes)
    exact = make_fields(student, embeds, [torch.Generator().manual_seed(0)], 2)
    assert not torch.equal(exact.planes, shown.planes.float())
