"""Generators of one pass in the loop: their recipes, shading, interpolation, a library, refinement, comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from prd.data.shape_library import LibraryError
from prd.errors import ModelMismatch
from prd.evaluation.comparison import Measured, at_frames, markdown_table, measure_run, side_by_side, write_comparison
from prd.toybox.benchmark import ToyBox
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.compare import ROUNDING, relative_difference

QUICK = [
    *("--num_threads", "1", "--train_batch_size", "1", "--optimizer.warmup_steps", "1", "--report_to", "null"),
    *(
        "--renderers.volume.grid_resolution",
        "16",
        "--renderers.surface.grid_resolution",
        "16",
        "--renderers.volume.num_samples",
        "16",
    ),
    *(
        "--validation.prompts",
        "[a red cube, a blue cone]",
        "--validation.stacks",
        "1",
        "--validation.every_steps",
        "null",
    ),
    *("--validation.resolution", "32", "--validation.isosurface_resolution", "24"),
]


def make(recipe: str, *words: str) -> Trainer:
    return Trainer(load_config(recipe, [*QUICK, *words]))


@pytest.mark.parametrize("recipe", ["atom_toybox", "att3d_toybox", "latte3d_toybox"])
def test_a_recipe_goes_through_its_stages(recipe: str, tmp_path: Path) -> None:
    trainer = make(recipe, "--max_train_steps", "5", "--output_dir", str(tmp_path / "run"))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen, frames = [], 0
    for step in range(5):
        row = trainer.train_step(step)
        assert row["skipped"] == 0 and row["gradient_norm"] > 0
        seen.append(trainer.stage.name)
        frames += 4
        assert row["frames_per_prompt"] == pytest.approx(frames / 38)
        learnt = any(name.startswith("gradient_norm/") for name in row)
        assert learnt == (trainer.stage.name != "pretraining")
        assert ("mask_loss" in row) == (trainer.stage.name in ("pretraining", "geometry", "text"))
    assert sorted(set(seen), key=seen.index) == [stage.name for stage in trainer.plan.stages]
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, start[n])]
    unseen = "heads.deformation"  # whose last layer starts at zero, and which volume rendering does not ask
    assert not [name for name in still if unseen not in name]


@pytest.mark.parametrize("recipe", ["atom_toybox", "att3d_toybox", "latte3d_toybox"])
def test_a_step_in_mixed_precision_is_near_the_exact_one(recipe: str) -> None:
    norms = []
    for precision in ("no", "bf16"):
        words = [
            "--stages",
            "[]",
            "--renderer_schedule",
            "[volume]",
            "--library.alpha",
            "0",
            "--mixed_precision",
            precision,
        ]
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = make(recipe, "--max_train_steps", "2", *words, "--teacher_options.dtype", "float32")
        row = trainer.train_step(0)
        assert row["skipped"] == 0
        norms.append(row["gradient_norm"])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@pytest.mark.parametrize("recipe", ["atom_toybox", "att3d_toybox", "latte3d_toybox"])
def test_a_batch_and_its_accumulation_are_one_step(recipe: str) -> None:
    gradients, states = [], []
    for batch, accumulation in ((2, 1), (1, 2)):
        words = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        trainer = make(recipe, "--max_train_steps", "20", *words, "--interpolation.probability", "0.5")
        trainer.enter(next(stage for stage in trainer.plan.stages if stage.name != "pretraining"))
        trainer.train_step(trainer.stage.first)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]).double())
        states.append([b for n, b in trainer.model.named_buffers() if n.endswith(("_u", "_v"))])
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm() > 0
    assert bool(states[0]) is (recipe == "att3d_toybox")  # whose maps have spectral norms
    assert all(relative_difference(a, b) <= ROUNDING for a, b in zip(*states, strict=True))


def test_the_geometry_stands_still_while_the_texture_is_trained() -> None:
    trainer = make("latte3d_toybox", "--max_train_steps", "5")
    last = trainer.plan.stages[-1]
    trainer.enter(last)
    geometry = [p.detach().clone() for p in trainer.model.parts()["geometry"]]
    texture = [p.detach().clone() for p in trainer.model.parts()["texture"]]
    trainer.train_step(last.first)
    assert all(torch.equal(a, b) for a, b in zip(geometry, trainer.model.parts()["geometry"], strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(texture, trainer.model.parts()["texture"], strict=True)]
    assert all(moved)


def test_the_side_of_a_view_is_told_to_the_teacher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--teachers.stable_diffusion.view_dependent_prompts", "true", "--teachers.mvdream.enabled", "false"]
    trainer = make("att3d_toybox", "--max_train_steps", "3", *words)
    (prompt,), plain, given = trainer.draw(0, 0).prompts, trainer.model.generate, []
    monkeypatch.setattr(trainer.model, "generate", lambda embeds: plain(given.append(embeds) or embeds))
    trainer.train_step(0)
    assert len(given) == 1 and relative_difference(given[0], trainer.parts.text_encoder([prompt])) <= ROUNDING
    told = [
        text for text in trainer.parts.text_encoder.encoded if text.endswith("view")
    ]  # the teacher's encoder is the same
    assert told and all(text.startswith(f"{prompt}, ") for text in told)


LAST_STAGES = ["--schedule_steps", "5", "--max_train_steps", "7", "--ema_decay", "0.9"]  # LATTE3D: text 2-3, texture 4-


@pytest.mark.parametrize(("recipe", "saved"), [("att3d_toybox", 4), ("latte3d_toybox", 4), ("latte3d_toybox", 5)])
def test_a_resumed_run_is_the_uninterrupted_one(recipe: str, saved: int, tmp_path: Path) -> None:
    """With the spectral norms' vectors, and on both sides of where the texture gets an encoder of its own."""
    words = [*LAST_STAGES, "--output_dir", str(tmp_path / "run")]
    whole = make(recipe, *words)
    for step in range(3, saved):
        whole.train_step(step)
    whole.save(saved)
    rows = [whole.train_step(step) for step in range(saved, 6)]
    other = make(recipe, *words, "--resume_from_checkpoint", "latest")
    assert other.resume() == saved
    again = [other.train_step(step) for step in range(saved, 6)]
    for a, b in zip(rows, again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    one, two = whole.model.trained_state_dict(), other.model.trained_state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(whole.average.tensors, other.average.tensors, strict=True))


def test_the_average_of_the_texture_begins_where_the_texture_does() -> None:
    trainer = make("latte3d_toybox", *LAST_STAGES)
    trainer.train_step(3)
    shared = [p.detach().clone() for p in trainer.model.geometry_encoder.parameters()]
    trainer.train_step(4)
    now = [p.detach().clone() for p in trainer.model.texture_encoder.parameters()]
    with trainer.average.averaged_weights():
        for average, first, last in zip(trainer.model.texture_encoder.parameters(), shared, now, strict=True):
            torch.testing.assert_close(
                average.detach(), torch.lerp(first, last, 1 - 5 / 14)
            )  # (1 + step) / (10 + step)


def test_clouds_are_annealed_and_keyed_by_sample() -> None:
    trainer = make("latte3d_toybox", "--max_train_steps", "20", "--train_batch_size", "2")
    geometry = trainer.plan.stages[1]
    trainer.enter(geometry)
    batch = trainer.draw(geometry.first, 0)
    alone = trainer.batches.draw(geometry, geometry.first, [1], trainer.prompts_drawn(geometry.first))
    assert relative_difference(batch.shapes.clouds[1], alone.shapes.clouds[0]) <= ROUNDING
    # the stage begins with the shapes
    assert relative_difference(batch.inputs["points"], batch.shapes.clouds) <= ROUNDING
    trainer.enter(trainer.plan.stages[2])
    batch = trainer.draw(trainer.plan.stages[2].first, 0)
    assert relative_difference(batch.inputs["points"], trainer.model.dummy.expand(2, -1, -1)) <= ROUNDING


def test_shading_reaches_the_teachers_and_what_is_drawn() -> None:
    plain, white = (
        make("atom_toybox", "--max_train_steps", "5", "--shading.textureless", share) for share in ("0", "1")
    )
    rows = [trainer.train_step(0) for trainer in (plain, white)]
    assert rows[0]["opacity"] == rows[1]["opacity"]  # the same field from the same cameras
    assert rows[0]["gradient_norm/mvdream/volume"] != rows[1]["gradient_norm/mvdream/volume"]
    colour = [trainer.model.heads.rgb.third.weight.grad for trainer in (plain, white)]
    assert bool(colour[0].any()) and not bool(colour[1].any())  # a white render says nothing about colours


@pytest.mark.parametrize("over", ["embeddings", "guidance", "losses"])
def test_what_lies_between_prompts_is_trained(over: str) -> None:
    words = ["--interpolation.probability", "1", "--interpolation.over", over, "--train_batch_size", "2"]
    trainer = make("att3d_toybox", "--max_train_steps", "3", *words)
    batch = trainer.draw(0, 0)
    first, second = trainer.parts.text_encoder(batch.prompts), trainer.parts.text_encoder(batch.mixture.prompts)
    share = batch.mixture.share.view(-1, 1, 1)
    torch.testing.assert_close(batch.embeds, (1 - share) * first + share * second)
    assert 0 < float(batch.mixture.share.min()) and batch.mixture.over == over
    assert trainer.train_step(0)["skipped"] == 0


def test_refinement_starts_from_saved_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make("atom_toybox", "--max_train_steps", "2", "--output_dir", str(run))
    trainer.train_step(0)
    trainer.model.save_pretrained(run / "generator")
    words = ["--init_from", str(run), "--prompts.texts", "[a red mug]", "--max_train_steps", "2"]
    refined = make("atom_toybox", *words)
    saved, state = trainer.model.trained_state_dict(), refined.model.trained_state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    assert list(refined.corpus.prompts) == ["a red mug"] and refined.draw(0, 0).prompts == ["a red mug"]
    assert refined.train_step(0)["frames_per_prompt"] == 4
    with pytest.raises(ModelMismatch, match=r"init_from=.*: its model.sphere_radius is 0.45, not 0.3"):
        make("atom_toybox", *words, "--model.sphere_radius", "0.3")
    with pytest.raises(ModelMismatch, match="_class_name is 'AToM', expected 'ATT3D'"):
        make("att3d_toybox", *words)


def test_a_library_is_for_those_who_take_shapes() -> None:
    with pytest.raises(LibraryError, match="library.source='toybox': this model takes no shapes"):
        make("atom_toybox", "--library.source", "toybox")


def test_runs_are_compared_at_equal_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ToyBox.splits
    monkeypatch.setattr(  # four captions stand for the 48 of each checkpoint
        ToyBox,
        "splits",
        lambda self, *args, **options: {name: some[:2] for name, some in every(self, *args, **options).items()},
    )
    folders = []
    for recipe in ("atom_toybox", "att3d_toybox"):
        folder = tmp_path / recipe
        words = ["--max_train_steps", "3", "--checkpointing_steps", "1", "--checkpoints_total_limit", "null"]
        trainer = make(recipe, *words, "--output_dir", str(folder), "--train_batch_size", "2")
        trainer.train()
        folders.append(folder)
        record = json.loads((folder / "generator" / "record.json").read_text(encoding="utf-8"))
        assert record["trained_on"]["prompts"] == 38 and record["trained_on"]["forms"].keys() == {"a _ _"}
    rows = [row for folder in folders for row in measure_run(folder)]
    assert [row.step for row in rows] == [1, 2, 3, 1, 2, 3]
    assert [row.frames_per_prompt for row in rows[:3]] == pytest.approx([8 / 38, 16 / 38, 24 / 38])
    assert {split: summary["count"] for split, summary in rows[0].scores.items()} == {
        "single_seen": 2,
        "single_held_out": 2,
    }
    chosen = at_frames(rows, 16 / 38)
    assert [(row.run, row.step) for row in chosen] == [("atom_toybox", 2), ("att3d_toybox", 2)]
    table = write_comparison(rows, tmp_path / "out", 16 / 38)
    assert table == markdown_table(chosen) and "| atom_toybox | 0 | 2 |" in table
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))) == 6
    assert "frames per prompt" in (tmp_path / "out" / "curves.html").read_text(encoding="utf-8")
    side_by_side(folders, ["a red cube", "a blue mug"], tmp_path / "out" / "sheet.png", ["AToM", "ATT3D"])
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 500


def test_a_split_that_was_not_measured_keeps_its_place_in_the_table() -> None:
    row = Measured("mine", 2, 4.0, {"single_held_out": {"r_at_1": 0.5, "iou": 0.25}})
    assert markdown_table([row]).splitlines()[-1] == "| mine | 4 | 2 | - / 0.50 | - / 0.25 | - / - | - / - | - / - |"
