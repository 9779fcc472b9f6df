"""A world of the user's own: the trainer draws, measures and shows by it, given as a part and named in a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.custom_world import BallsAndBoxes
from prd.errors import ConfigError
from prd.evaluation.comparison import measure_run
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer

WORLD = "examples.custom_world.BallsAndBoxes"
SMALL = [
    *("--max_train_steps", "2", "--checkpointing_steps", "2", "--train_batch_size", "1", "--num_denoising_steps", "1"),
    *(
        "--validation.prompts",
        "[a red cube]",
        "--validation.num_inference_steps",
        "1",
        "--validation.gallery_steps",
        "1",
    ),
    *("--validation.resolution", "16", "--validation.isosurface_resolution", "16", "--validation.every_steps", "2"),
    *("--renderers.volume.height", "8", "--renderers.volume.width", "8", "--renderer_schedule", "[volume]"),
    *("--teachers.stable_diffusion.enabled", "false", "--teachers.richdreamer.enabled", "false"),
    *("--report_to", "null"),
]


def check(folder: Path, splits: set[str]) -> None:
    """The run is measured by the world: its splits, galleries and record."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == splits
    captions = [row["prompt"] for part in scores.values() for row in part["scores"]]
    assert sorted(captions) == sorted(BallsAndBoxes().captions())
    for part in scores.values():
        assert set(part["summary"]) == {"count", "r_at_1", "iou", "color_error"}
    (row,) = json.loads((folder / "gallery" / "step-000001" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= row["iou"] <= 1 and "color_error" in row
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "gallery/iou" in metrics[0] and metrics[1]["r_at_1"] in (0, 1)
    assert json.loads((folder / "adapter" / "record.json").read_text(encoding="utf-8"))["measured"].keys() == splits


def test_the_trainer_takes_a_benchmark_among_its_parts(toybox, tmp_path, capsys):
    world, out = BallsAndBoxes(), tmp_path / "run"
    config = load_config("toybox", [*SMALL, "--prompts.held_out", "[]", "--output_dir", str(out)])
    parts = replace(build_parts(config), corpus=world.corpus(seed=config.seed), benchmark=world)
    Trainer(config, parts).train()
    check(out, {"seen"})
    printed = capsys.readouterr().out
    assert "seen                6 prompts  R@1" in printed
    assert f"prompts of {world.name}: 6, the first 'a " in printed


def test_a_recipe_names_a_benchmark_by_its_import_path(toybox, tmp_path):
    out = tmp_path / "run"
    words = ["--prompts.source", WORLD, "--prompts.held_out", "[a blue cube, a green sphere]", "--output_dir", str(out)]
    trainer = Trainer(load_config("toybox", [*SMALL, *words]))
    assert set(trainer.corpus.prompts) == set(BallsAndBoxes().captions()) - {"a blue cube", "a green sphere"}
    trainer.train()
    check(out, {"seen", "held_out"})
    (row,) = measure_run(out)
    assert row.step == 2 and set(row.scores) == {"seen", "held_out"}


def test_a_validation_prompt_outside_the_world_is_refused(toybox, tmp_path):
    words = ["--prompts.source", WORLD, "--prompts.held_out", "[]", "--validation.prompts", "[a red torus]"]
    with pytest.raises(ConfigError, match="validation.prompts: caption='a red torus': the world of balls and boxes"):
        Trainer(load_config("toybox", [*SMALL, *words, "--output_dir", str(tmp_path)]))


def test_a_run_without_a_benchmark_measures_nothing(toybox, tmp_path):
    words = ["--benchmark", "null", "--validation.prompts", "[a marble dragon]", "--output_dir", str(tmp_path / "run")]
    folder = Trainer(load_config("toybox", [*SMALL, *words])).train()
    assert not (folder / "scores.json").exists()
