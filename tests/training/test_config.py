"""The configuration: recipes, overrides, and errors that name the key."""

import dataclasses

import pytest

from prd.data.prompts import held_out_prompts
from prd.errors import ConfigError
from prd.toybox import world
from prd.training.config import TrainConfig
from prd.training.recipes import dump_config, from_dict, load_config, parse_args, save_config, shipped_recipes, to_dict


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("", encoding="utf-8")
    return path


def test_no_arguments_is_the_toy_box():
    assert parse_args([]) == load_config("toybox")
    assert parse_args([]).model.base == "toybox"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_saving(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


def test_released_recipe_holds_the_published_values():
    config = load_config("triplane_turbo_sd21")
    assert config.teachers["mvdream"].guidance_scale == (20, 10)
    assert config.teachers["richdreamer"].negative_prompt == config.teachers["mvdream"].negative_prompt
    assert config.teachers["mvdream"].negative_prompt.startswith("ugly, bad anatomy, blurry")
    assert config.teachers["mvdream"].negative_prompt.endswith("dehydrated, bad proportions")
    assert config.optimizer.betas == (0.98, 0.92, 0.99)
    assert (config.max_train_steps, config.schedule_steps) == (15000, 20000)


def test_held_out_prompts_are_a_fifth_and_seen_nowhere_but_in_their_words():
    captions = [caption.text for caption in world.all_captions()]
    singles = [caption.text for caption in world.single_captions()]
    held_out = held_out_prompts(load_config("toybox").prompts)
    assert set(held_out) <= set(captions) and len(set(held_out)) == len(held_out)
    assert len(held_out) / len(captions) == pytest.approx(0.2, abs=0.03)
    held_out_singles = set(singles) & set(held_out)
    assert len(held_out_singles) / len(singles) == pytest.approx(0.2, abs=0.03)
    seen = set(captions) - set(held_out)
    assert not [text for text in seen if any(pair in text for pair in held_out_singles)]
    words = {word for text in seen & set(singles) for word in text.split()}
    assert {word for text in held_out_singles for word in text.split()} <= words


def test_overrides_are_typed(empty):
    words = ["--optimizer.lr", "1e-3", "--max-train-steps=10", "--mixed_precision", "no", "--model.plane_wise", "false"]
    words += ["--cameras.elevation", "[-30, 60]", "--teachers.mvdream.guidance_scale", "[20, 10]"]
    words += ["--prompts.held_out", "[a red cube, a blue cone]", "--output_dir", "2026-01-01", "--ema_decay", "null"]
    config = load_config(empty, words)
    assert config.optimizer.lr == 1e-3 and isinstance(config.optimizer.lr, float)
    assert config.max_train_steps == 10
    assert config.mixed_precision == "no"
    assert config.model.plane_wise is False
    assert config.cameras.elevation == (-30, 60)
    assert config.teachers["mvdream"].guidance_scale == (20, 10)
    assert config.prompts.held_out == ("a red cube", "a blue cone")
    assert config.output_dir == "2026-01-01"
    assert config.ema_decay is None


def test_a_negative_number_is_a_value(empty):
    with pytest.raises(ConfigError, match="seed"):
        load_config(empty, ["--seed", "--optimizer.lr", "1"])
    words = ["--cameras.elevation", "[-3, 4]", "--distillation.t_min", "-1"]
    assert load_config(empty, words[:2]).cameras.elevation == (-3, 4)
    with pytest.raises(ConfigError, match="t_min=-1"):
        load_config(empty, words)


def test_command_line_beats_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\noptimizer: {lr: 0.5, warmup_steps: 3}\n", encoding="utf-8")
    config = parse_args(["--optimizer.lr", "0.25", "--config", str(path)])
    assert (config.seed, config.optimizer.lr, config.optimizer.warmup_steps) == (1, 0.25, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.lrr", "1"], r"unknown config key 'optimizer.lrr'.*'optimizer.lr'"),
        (["--lr", "1"], r"unknown config key 'lr'.*'optimizer.lr'"),
        (
            ["--teachers.mvdrem.path", "x"],
            r"teachers.mvdrem: must be one of .* or the import path",
        ),
        (["--teachers.mvdream.pth", "x"], r"'teachers.mvdream.pth'.*'teachers.mvdream.path'"),
        (["--optimizer", "{lrr: 1}"], r"unknown config key 'optimizer.lrr'.*'optimizer.lr'"),
        (["--optimizer.lr", "-1"], r"optimizer.lr=-1: .*greater than 0"),
        (["--optimizer.lr", ".nan"], r"optimizer.lr=nan: .*finite"),
        (["--optimizer", "3"], r"optimizer=3"),
        (["--seed", "x"], r"seed='x': .*integer"),
        (
            ["--renderer_schedule", "both"],
            r"renderer_schedule='both': must be 'all', 'alternate' or a list of ",
        ),
        (["--renderers.volume", "3"], r"renderers.volume=3: must be a mapping of settings"),
        (["--regularizers.eikonal", "[1, 2, 3]"], r"regularizers.eikonal"),
        (["--num_denoising_steps", "3"], r"num_denoising_steps=3: must divide.*1, 2 or 4"),
        (["--num_denoising_steps", "0"], r"num_denoising_steps=0"),
        (["--cameras.elevation", "[30, 0]"], r"cameras: elevation=\[30.0, 0.0\]"),
        (["--renderers.volume.rgb_gradient_scale", "[1, 2, 3]"], r"renderers.volume.rgb_gradient_scale=\[1, 2, 3\]"),
        (["--distillation.t_min", "[990, 20]"], r"t_min=990.0: must be below t_max=980"),
        (["--optimizer.name", "adan"], r"adan takes 3 values"),
        (["seed", "1"], r"'seed': expected --key value"),
        (["--seed"], r"--seed has no value"),
    ],
)
def test_wrong_words_name_the_key(words, message, empty):
    with pytest.raises(ConfigError, match=message):
        load_config(empty, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "'optimizer.lr'"),
        ("sed: 1", "'seed'"),
        ("- a\n- b", "mapping"),
        ("a: [", "not YAML"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        (f"seed: {'9' * 5000}", "an integer is too long"),
    ],
)
def test_wrong_files_name_the_key(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_names_the_recipes():
    with pytest.raises(ConfigError, match="no such file.*toybox.*triplane_turbo_sd21"):
        load_config("nowhere.yaml")


def test_direct_construction_is_checked_and_frozen():
    with pytest.raises(ValueError, match="max_train_steps"):
        TrainConfig(max_train_steps=0)
    with pytest.raises(ValueError, match="seed"):
        dataclasses.replace(TrainConfig(), seed="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1


def test_dump_names_every_key():
    text = dump_config(TrainConfig())
    assert all(f"{f.name}:" in text for f in dataclasses.fields(TrainConfig) if f.name != "classes")
