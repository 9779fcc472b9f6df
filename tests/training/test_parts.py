"""Parts of the user's own: named in a recipe or given to the trainer, checked, stored and compared on resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from prd.errors import ConfigError
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.base import TeacherConfig
from prd.training.parts import build_parts
from prd.training.recipes import from_dict, load_config, save_config, to_dict
from prd.training.trainer import Trainer
from tests.training.own_parts import FlatConfig, FlatRenderer, OwnTeacher, brightest

OWN = "tests.training.own_parts"
SMALL = [
    *("--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "1", "--optimizer.warmup_steps", "1"),
    *("--renderers.volume.grid_resolution", "12", "--renderers.volume.num_samples", "8", "--report_to", "null"),
    *("--renderers.volume.height", "8", "--renderers.volume.width", "8", "--renderer_schedule", "volume"),
    *("--teachers.stable_diffusion.enabled", "false", "--teachers.richdreamer.enabled", "false"),
    *("--validation.prompts", "[]", "--max_train_steps", "4"),
]


def settings(*words: str):
    return load_config("toybox", [*SMALL, *words])


def own(section: str, values: str) -> list[str]:
    return [f"--{section}", f"{{class: {OWN}.{values}}}"]


def test_every_kind_of_part_may_be_the_users_own(toybox, tmp_path):
    config = settings(
        *own("teachers.mine", "OwnTeacher, path: toybox, strength: 0.5, weight: 2"),
        *own("renderers.flat", "FlatRenderer, height: 6, width: 6, brightness: [0, 4]"),
        *own("regularizers.towards", "Towards, weight: 0.5, opacity: 0.1"),
        *own("regularizers.bright", "brightest, weight: [1, 0]"),
        *own("distillation", "OwnLoss, reference: noise"),
        *("--renderer_schedule", "all", "--output_dir", str(tmp_path)),
    )
    trainer = Trainer(config)
    parts = trainer.parts
    assert isinstance(parts.teachers["mine"], OwnTeacher) and parts.teachers["mine"].strength == 0.5
    assert parts.regularizers["bright"] is brightest and parts.regularizers["towards"].opacity == 0.1
    first, second = trainer.train_step(0), trainer.train_step(1)
    for row in (first, second):
        assert row["skipped"] == 0
        for renderer in ("volume", "flat"):
            assert row[f"gradient_norm/own/{renderer}"] > 0 and row[f"gradient_norm/mvdream/{renderer}"] > 0
        assert row["towards"] >= 0 and row["bright"] >= 0
    assert (first["brightness"], second["brightness"]) == (0, 1)  # of 4 after 4 steps

    # stored as it was given, and read again
    save_config(config, tmp_path / "config.yaml")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["teachers"]["mine"]["class"] == f"{OWN}.OwnTeacher" and stored["teachers"]["mine"]["strength"] == 0.5
    assert "class" not in stored["teachers"]["mvdream"] and stored["distillation"]["class"] == f"{OWN}.OwnLoss"
    assert stored["regularizers"]["bright"] == {"class": f"{OWN}.brightest", "weight": [1.0, 0.0]}
    assert stored["regularizers"]["eikonal"] == [25.0, 0.0]
    assert load_config(tmp_path / "config.yaml") == config == from_dict(to_dict(config))


def test_a_model_of_ones_own_is_trained_saved_and_resumed(toybox, tmp_path):
    sizes = "plane_channels: 4, plane_size: 6, num_blocks: 1, attention_heads: 2, head_width: 8"
    words = [*own("model", f"OwnModel, {sizes}"), "--output_dir", str(tmp_path / "run")]
    trainer = Trainer(settings(*words))
    assert type(trainer.model).__name__ == "OwnModel"
    trainer.train_step(0)
    trainer.save(1)
    again = Trainer(settings(*words, "--resume_from_checkpoint", "latest"))
    assert again.resume() == 1
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, again.parameters, strict=True))


def test_a_settings_change_is_noticed_on_resume(toybox, tmp_path):
    words = ["--output_dir", str(tmp_path / "run")]
    teacher = own("teachers.mine", "OwnTeacher, path: toybox, strength: 0.5")
    trainer = Trainer(settings(*words, *teacher))
    trainer.save(0)
    again = [*words, "--resume_from_checkpoint", "latest"]
    assert Trainer(settings(*again, *teacher)).resume() == 0
    with pytest.raises(ConfigError, match=r"teachers.mine.strength: 0.5 -> 0.25"):
        Trainer(settings(*again, *own("teachers.mine", "OwnTeacher, path: toybox, strength: 0.25")))
    with pytest.raises(ConfigError, match=r"distillation.class: absent -> tests.training.own_parts.OwnLoss"):
        Trainer(settings(*again, *teacher, *own("distillation", "OwnLoss, reference: noise")))


def test_parts_given_to_the_trainer_take_part(toybox, tmp_path):
    config = settings("--output_dir", str(tmp_path / "run"), "--renderer_schedule", "all")
    mine = OwnTeacher.from_pretrained(str(toybox / "stable_diffusion"))
    mine.strength = 1.0
    parts = build_parts(config, renderers={"flat": FlatRenderer(FlatConfig(brightness=(0.0, 4.0)))})
    parts.teachers["mine"] = mine
    parts.regularizers["bright"] = brightest
    trainer = Trainer(config, parts)
    assert trainer.parts is parts
    trainer.train_step(0)
    row = trainer.train_step(1)
    assert row["gradient_norm/own/flat"] > 0 and row["brightness"] == 1 and row["bright"] >= 0
    assert not [name for name in row if name.endswith("/volume")]
    # the config may weigh what it does not build
    silent = replace(config, teachers={**config.teachers, "mine": TeacherConfig(enabled=False)})
    trainer = Trainer(silent, parts)
    row = trainer.train_step(0)
    assert not [name for name in row if "/own/" in name]
    trainer.save(1)  # and the run is resumed with the same parts
    assert Trainer(replace(silent, resume_from_checkpoint="latest"), parts).resume() == 1
    louder = replace(silent, teachers={**config.teachers, "mine": TeacherConfig(weight=2.0)})
    with pytest.raises(ConfigError, match=r"teachers.mine.weight: absent -> 2.0"):
        Trainer(replace(louder, resume_from_checkpoint="latest"), parts)


def test_a_part_given_in_python_has_its_settings_from_the_config(toybox, tmp_path):
    config = settings("--output_dir", str(tmp_path / "run"))
    parts = build_parts(config, renderers={"volume": VolumeRenderer(VolumeConfig(num_samples=4))})
    trainer = Trainer(config, parts)
    trainer.train_step(0)
    assert trainer.objective.renderer_names == ("volume",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            own("teachers.mine", "Half"),
            r"teachers.mine.class='tests.training.own_parts.Half': is no ConfigurableTeacher: it lacks condition, pred",
        ),
        (own("teachers.mine", "Missing"), r"'tests.training.own_parts' has no class or function 'Missing'"),
        (
            ["--teachers.mine", "{class: nowhere.Mine}"],
            r"mine.class='nowhere.Mine': there is no module 'nowhere'",
        ),
        (["--teachers.mine", "{class: Mine}"], r"teachers.mine.class='Mine': must be one of .*, or the import path"),
        (["--teachers.mine", "{strength: 2}"], r"teachers.mine: must be one of .*, or the import path"),
        (["--teachers.mine", "{class: 3}"], r"teachers.mine.class=3: must be one of"),
        (
            own("teachers.mine", "OwnTeacher, strenght: 2"),
            r"unknown config key 'teachers.mine.strenght'.*strength'",
        ),
        (own("teachers.mine", "OwnTeacher, strength: -2"), r"teachers.mine.strength=-2: .*greater than 0"),
        (
            own("teachers.mine", "Unsettled"),
            r"teachers.mine: Unsettled.config_class is FlatConfig; derive it from",
        ),
        (own("renderers.flat", "FlatRenderer, height: tall"), r"renderers.flat.height='tall': .*integer"),
        (own("renderers.flat", "OwnTeacher"), r"renderers.flat.class=.*: is no Renderer: it lacks "),
        (own("regularizers.r", "Towards, opacity: much"), r"regularizers.r.opacity='much'"),
    ],
)
def test_a_part_that_cannot_be_used_is_named_before_anything_is_loaded(words, message):
    with pytest.raises(ConfigError, match=message):
        settings(*words)


def test_the_class_of_a_part_holds_for_the_whole_run():
    stages = f"[{{until: 1, teachers: {{mvdream: {{class: {OWN}.OwnTeacher}}}}}}]"
    with pytest.raises(ConfigError, match=r"stages\[0\].teachers.mvdream.class: holds for the whole run"):
        settings("--stages", stages)
    stages = f"[{{until: 1, teachers: {{mine: {{class: {OWN}.OwnTeacher, path: toybox}}}}}}]"
    assert "mine" not in settings("--stages", stages).teachers  # a stage may bring a teacher


def test_teachers_that_see_another_number_of_views_are_refused(toybox):
    with pytest.raises(ConfigError, match="cameras.views=3: must be 4, which mvdream see"):
        build_parts(settings("--cameras.views", "3"))
