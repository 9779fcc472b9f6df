"""Parts of the user's own: named in a recipe or given to the trainer, checked, stored and compared on resume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import yaml

from prd.distillation.regularizers import RegularizerConfig
from prd.errors import ConfigError
from prd.generators.atom import AtomConfig
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.base import TeacherConfig
from prd.teachers.stable_diffusion import StableDiffusionTeacherConfig
from prd.training.parts import build_parts, build_teachers, with_classes
from prd.training.recipes import from_dict, load_config, save_config, to_dict
from prd.training.trainer import Trainer
from tests.training.own_parts import (
    FlatConfig,
    FlatRenderer,
    OwnLoss,
    OwnLossConfig,
    OwnModel,
    OwnTeacher,
    OwnTeacherConfig,
    Towards,
    TowardsConfig,
    brightest,
)

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
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
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


def test_a_model_without_its_text_encoder_is_refused():
    with pytest.raises(ConfigError, match=r"model=Linear: must be \(model, text encoder\)"):
        build_parts(settings(), model=torch.nn.Linear(2, 2))


def given_parts() -> dict[str, tuple[dict, dict]]:
    """By section: settings by name, and the parts of one's own that are given with them."""
    teacher = OwnTeacher.__new__(OwnTeacher)  # its networks do not matter
    return {
        "teachers": ({"mine": OwnTeacherConfig(path="toybox", strength=0.5)}, {"mine": teacher}),
        "renderers": ({"flat": FlatConfig(brightness=(0.0, 4.0))}, {"flat": FlatRenderer(FlatConfig())}),
        "regularizers": (
            {"near": TowardsConfig(opacity=0.1), "bright": RegularizerConfig(weight=2.0)},
            {"near": Towards(0.1), "bright": brightest},
        ),
    }


@pytest.mark.parametrize("section", ["teachers", "renderers", "regularizers", "model", "distillation"])
def test_settings_given_in_python_are_written_with_the_class_of_the_given_part(section, tmp_path):
    base = settings("--renderer_schedule", "all")
    if section == "model":
        model = type("Anything", (), {})
        own, part = AtomConfig(plane_size=6), OwnModel.__new__(OwnModel)
        assert with_classes(replace(base, model=own), {"model": model}).classes["model"] == "atom"  # its settings tell
        expected = {"model": f"{OWN}.OwnModel"}
    elif section == "distillation":
        own, part, expected = OwnLossConfig(factor=(1.0, 2.0)), OwnLoss(), {"distillation": f"{OWN}.OwnLoss"}
    else:
        own, part = given_parts()[section]
        names = {"mine": "OwnTeacher", "flat": "FlatRenderer", "near": "Towards", "bright": "brightest"}
        expected = {f"{section}.{name}": f"{OWN}.{names[name]}" for name in own}
        own = {**getattr(base, section), **own}
    config = with_classes(replace(base, **{section: own}), {section: part})
    assert config.classes == {**base.classes, **expected}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_settings_of_the_librarys_classes_by_other_names_need_no_class(tmp_path):
    base = settings()
    second = StableDiffusionTeacherConfig(path="toybox", guidance_scale=3.0)
    config = replace(
        base,
        teachers={**base.teachers, "second": second},
        renderers={**base.renderers, "coarse": VolumeConfig(num_samples=4)},
    )
    assert to_dict(config)["teachers"]["second"]["class"] == "stable_diffusion"
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again.teachers == config.teachers and again == with_classes(config, {})


def test_a_run_with_settings_given_in_python_is_read_again_and_resumed(toybox, tmp_path):
    """The file in the run folder of a whole trainer is its config, by the command line too."""
    base = settings("--output_dir", str(tmp_path / "run"), "--stages", "[{until: 0.5}, {until: 1, background: 0.1}]")
    own = OwnTeacherConfig(path=str(toybox / "stable_diffusion"), strength=0.5, weight=2.0)
    config = replace(base, teachers={**base.teachers, "mine": own})
    mine = OwnTeacher.from_pretrained(own.path)
    mine.strength = 0.5
    parts = build_parts(config, teachers={**build_parts(base).teachers, "mine": mine})
    trainer = Trainer(config, parts)
    (tmp_path / "run").mkdir()
    save_config(trainer.config, tmp_path / "run" / "config.yaml")
    trainer.train_step(0)
    trainer.save(1)
    again = load_config(tmp_path / "run" / "config.yaml", ["--resume_from_checkpoint", "latest"])
    assert again.teachers["mine"] == own and again.classes["teachers.mine"] == f"{OWN}.OwnTeacher"
    resumed = Trainer(again)
    assert resumed.resume() == 1 and resumed.parts.teachers["mine"].strength == 0.5


def test_settings_that_weigh_a_given_part_alone_are_read_again(tmp_path):
    """Those of no class: `class: null`; building the part needs it again."""
    base = settings()
    config = with_classes(replace(base, teachers={**base.teachers, "mine": TeacherConfig(weight=2.0)}), {})
    save_config(config, tmp_path / "config.yaml")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["teachers"]["mine"]
    assert stored["class"] is None and stored["weight"] == 2.0
    again = load_config(tmp_path / "config.yaml")
    assert again == config and load_config(tmp_path / "config.yaml", ["--teachers.mine.weight", "3"])
    with pytest.raises(ConfigError, match=r"teachers.mine.class=null: .*Trainer\(config, parts\)"):
        build_teachers(again, [again])


@pytest.mark.parametrize("key", ["teachers.mine", "teachers.mvdream", "renderers.mine", "model", "distillation"])
def test_settings_of_a_class_that_nothing_names_are_refused_at_the_start(key, tmp_path):
    @dataclass(frozen=True)
    class MineConfig(TeacherConfig):
        reference: str = "text"

    class Mine(OwnTeacher):  # inside a function: no import path leads to it
        config_class = MineConfig

    base = settings("--output_dir", str(tmp_path / "run"))
    section, _, name = key.partition(".")
    own = {**getattr(base, section), name: MineConfig()} if name else MineConfig()
    config = replace(base, **{section: own})
    for given in ({}, {section: {name: Mine.__new__(Mine)} if name else Mine.__new__(Mine)}):
        with pytest.raises(ConfigError, match=rf"{key}: MineConfig .*Trainer\(config, parts\).*classes={{'{key}': '"):
            with_classes(config, given)
    with pytest.raises(ConfigError, match=f"{key}: MineConfig"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_config_that_could_not_be_read_again_is_refused_at_the_start(tmp_path):
    """A renderer that is scheduled and has no settings in the config, whatever the trainer is given."""
    config = replace(settings("--output_dir", str(tmp_path / "run")), renderer_schedule=("flat",))
    with pytest.raises(ConfigError, match="renderer_schedule='flat': must be 'all', 'alternate' or a list of volume"):
        with_classes(config, {"renderers": {"flat": FlatRenderer(FlatConfig())}})
