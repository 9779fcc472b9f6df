"""Runs in several stages: what a stage changes, what it trains, and a resume across its boundary."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from prd.errors import ConfigError
from prd.training.parts import build_teachers
from prd.training.recipes import load_config, save_config, stages_of, to_dict
from prd.training.trainer import Trainer

STAGES = """[
  {name: volume, until: 0.6, renderer_schedule: [volume], optimizer: {lr: 2.0e-3}},
  {name: mesh, until: 1, renderer_schedule: [surface], renderers: {surface: {isosurface: tetrahedra}},
   teachers: {mvdream: {enabled: false}}}
]"""
TINY = "{class: atom, plane_channels: 4, plane_size: 6, num_blocks: 1, attention_heads: 2, head_width: 8}"
SMALL = [
    *("--num_threads", "1", "--train_batch_size", "1", "--optimizer.warmup_steps", "1", "--report_to", "null"),
    *(
        "--renderers.volume.grid_resolution",
        "12",
        "--renderers.surface.grid_resolution",
        "12",
        "--renderers.volume.num_samples",
        "8",
    ),
    *("--teachers.richdreamer.enabled", "false", "--validation.prompts", "[]", "--validation.stacks", "1"),
]


def staged(tmp_path, *words: str):
    """A tiny AToM on the toy box."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: toybox\nmodel: {TINY}\n", encoding="utf-8")
    return load_config(recipe, [*SMALL, "--output_dir", str(tmp_path / "run"), *words])


def teachers_of(config):
    return build_teachers(config, [stage.config for stage in stages_of(config)])


def test_a_run_without_stages_is_one(tmp_path) -> None:
    (only,) = stages_of(staged(tmp_path, "--max_train_steps", "7"))
    assert (only.first, only.last, only.config.schedule_steps) == (0, 7, 7)
    (longer,) = stages_of(staged(tmp_path, "--max_train_steps", "9", "--schedule_steps", "7"))
    assert (longer.last, longer.config.schedule_steps) == (9, 7)


def test_a_stage_is_the_recipe_with_some_values_replaced(tmp_path) -> None:
    config = staged(tmp_path, "--max_train_steps", "20", "--stages", STAGES)
    volume, mesh = stages_of(config)
    assert (volume.name, volume.first, volume.last, mesh.first, mesh.last) == ("volume", 0, 12, 12, 20)
    assert (volume.config.renderer_schedule, mesh.config.renderer_schedule) == (("volume",), ("surface",))
    assert (volume.config.optimizer.lr, mesh.config.optimizer.lr) == (2e-3, 4e-3)
    assert volume.config.optimizer.betas == config.optimizer.betas  # the rest of a section stays
    assert volume.config.teachers["mvdream"].enabled and not mesh.config.teachers["mvdream"].enabled
    assert (volume.config.schedule_steps, mesh.config.schedule_steps) == (12, 8)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    longer = stages_of(staged(tmp_path, "--max_train_steps", "30", "--schedule_steps", "20", "--stages", STAGES))
    assert [stage.last for stage in longer] == [12, 30]  # the last goes on


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{until: 0.5}]", r"stages\[0\].until=0.5: the last must be 1"),
        ("[{until: 0.5}, {until: 0.4}]", r"stages\[1\].until=0.4: must be a share of the run up to 1, ascending"),
        ("[{renderer_schedule: [volume]}]", r"stages\[0\].until=None: must be a share"),
        ("[{until: 1, seed: 3}]", r"stages\[0\]: 'seed' is no value of a stage; allowed: renderer_schedule, "),
        ("[{until: 1, optimizer: {lrr: 1}}]", r"stages\[0\]: unknown config key 'optimizer.lrr'; the nearest known "),
        ("[{until: 1, renderer_schedule: none}]", r"stages\[0\]: renderer_schedule='none'"),
        ("[{until: 1, library: {alpha: [0, 0.3]}}]", r"stages\[0\]: library.alpha=\(0.0, 0.3\): needs shapes; give "),
        ("[{until: 1, library: {reconstruction: 9}}]", r"stages\[0\]: library.reconstruction=9.0: needs shapes; give "),
        (
            "[{until: 1, library: {source: toybox}}]",
            r"stages\[0\].library.source: holds for the whole run; give it out",
        ),
        ("[{until: 1, teacher_options: {offload: true}}]", r"stages\[0\]: 'teacher_options' is no value of a stage"),
        (
            "[{until: 1, teachers: {mvdream: {class: stable_diffusion}}}]",
            r"stages\[0\].teachers.mvdream.class: holds for the whole run",
        ),
        (
            "[{until: 1, teachers: {mvdream: {enabled: false}, stable_diffusion: {enabled: false}}}]",
            r"stages\[0\]: no teacher is enabled",
        ),
    ],
)
def test_stages_that_cannot_be_are_named(tmp_path, stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        staged(tmp_path, "--stages", stages)


def test_each_stage_has_its_renderer_teachers_and_optimiser(toybox, tmp_path) -> None:
    trainer = Trainer(staged(tmp_path, "--max_train_steps", "4", "--stages", STAGES.replace("0.6", "0.5")))
    deformation = trainer.model.heads.deformation.third.weight
    rows = []
    for step in range(4):
        rows.append(trainer.train_step(step))
        assert bool(deformation.any()) == (step >= 2)  # the mesh alone moves it
    for row in rows[:2]:
        assert row["gradient_norm/mvdream/volume"] > 0 and "gradient_norm/stable_diffusion/surface" not in row
    for row in rows[2:]:
        assert row["gradient_norm/stable_diffusion/surface"] > 0
        assert not [name for name in row if "mvdream" in name or name.endswith("volume")]
    assert (rows[0]["lr"], rows[2]["lr"]) == (2e-3, 4e-3)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}  # begun anew


def test_a_teacher_is_loaded_as_the_stages_that_enable_it_say(tmp_path) -> None:
    found = {type(t).__name__ for t in teachers_of(load_config("latte3d_toybox")).values()}
    assert found == {"DepthControlTeacher", "MVDreamTeacher"}  # the ControlNet is named by the last stage alone
    stages = "[{until: 0.5}, {until: 1, teachers: {stable_diffusion: {weight: 2, controlnet: toybox}}}]"
    with pytest.raises(ConfigError, match=r"teachers.stable_diffusion.controlnet: is None and toybox in stages"):
        teachers_of(staged(tmp_path, "--stages", stages))


def test_a_loss_scale_is_taken_out_once_in_every_stage(toybox, monkeypatch, tmp_path) -> None:
    words = ["--max_train_steps", "4", "--stages", STAGES.replace("0.6", "0.5")]
    plain, scaled = (Trainer(staged(tmp_path, *words)) for _ in range(2))
    accelerator = scaled.accelerator  # as on a GPU in fp16, with the arithmetic of float32
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    monkeypatch.setattr(accelerator, "autocast", nullcontext)
    monkeypatch.setattr(accelerator, "native_amp", True)
    second = scaled.plan.stages[1]
    for trainer in (plain, scaled):
        trainer.enter(second)
    first, again = plain.train_step(second.first), scaled.train_step(second.first)
    assert again["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
    assert len(accelerator._optimizers) == 1  # what an earlier stage's held is let go


def test_a_resume_across_stages_is_bit_for_bit(toybox, tmp_path) -> None:
    words = ["--max_train_steps", "4", "--stages", STAGES.replace("0.6", "0.5"), "--ema_decay", "0.9"]
    for saved in (1, 2, 3):  # in the first stage, at the boundary, in the second
        whole = Trainer(staged(tmp_path, *words, "--output_dir", str(tmp_path / f"whole{saved}")))
        for step in range(saved):
            whole.train_step(step)
        whole.save(saved)
        rows = [whole.train_step(step) for step in range(saved, 4)]
        folder = str(tmp_path / f"whole{saved}")
        other = Trainer(staged(tmp_path, *words, "--output_dir", folder, "--resume_from_checkpoint", "latest"))
        assert other.resume() == saved
        again = [other.train_step(step) for step in range(saved, 4)]
        for a, b in zip(rows, again, strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
        one, two = whole.model.trained_state_dict(), other.model.trained_state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert all(torch.equal(a, b) for a, b in zip(whole.average.tensors, other.average.tensors, strict=True))


def test_a_part_that_is_not_there_is_named(toybox, tmp_path) -> None:
    with pytest.raises(ConfigError, match="trainable='wheels': is no part of this model; it has all"):
        Trainer(staged(tmp_path, "--trainable", "[wheels]"))


def test_a_recipe_extends_another(tmp_path) -> None:
    base, toybox = staged(tmp_path), load_config("toybox")
    assert base.prompts == toybox.prompts and base.optimizer.betas == toybox.optimizer.betas
    assert to_dict(base)["model"]["class"] == "atom" and base.model.plane_size == 6
    (tmp_path / "next.yaml").write_text(
        "extends: recipe.yaml\nmodel: {plane_size: 8, class: atom}\nseed: 3\n", encoding="utf-8"
    )
    again = load_config(tmp_path / "next.yaml")
    assert (again.model.plane_size, again.model.plane_channels, again.seed) == (8, 4, 3)
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="loop.yaml: extends='loop.yaml': extends itself"):
        load_config(tmp_path / "loop.yaml")
    (tmp_path / "lost.yaml").write_text("extends: absent\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="config='absent': no such file"):
        load_config(tmp_path / "lost.yaml")
