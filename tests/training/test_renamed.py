"""What was written before the keys were renamed is read, with one warning that names the new ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from prd.evaluation.report import differences, find_runs
from prd.training.recipes import from_dict, load_config, to_dict
from prd.training.renamed import renamed
from prd.training.run.checkpoints import Checkpoint
from prd.training.run.resume import comparable, differing_keys, resumed_config

OLD = Path(__file__).parent / "old"

OTHER_TODAY = {  # values that the recipe has changed since, all of them
    "toybox": ["prompts.open_fraction: 0.0 -> 0.2", "optimizer.lr: 0.001 -> 0.004"],
    "latte3d_toybox": [
        "prompts.open_fraction: 0.2 -> 0.0",
        "optimizer.lr: 0.004 -> 0.003",
    ],  # the old recipe extends today's toybox
    "triplane_turbo_sd21": [
        "mixed_precision: bf16 -> no",
        "global_batch_size: None -> 16",
        "renderers.volume.near: None -> 0.1",
        "renderers.volume.far: None -> 4.0",
        "renderers.volume.cull_below: 0.0001 -> 0.0",
        "renderers.volume.alpha_floor: 0.0 -> 1e-05",
        "renderers.volume.max_rays: 4096 -> 1024",
        "renderers.volume.disparity: camera -> triplane_turbo",
        "renderers.surface.disparity: camera -> triplane_turbo",
        "teachers.stable_diffusion.dtype: None -> float16",
        "teachers.mvdream.dtype: None -> float32",
        "teachers.richdreamer.dtype: None -> float32",
        "regularizers.eikonal: [1.0, 0.0] -> [0.5, 0.0]",
        "regularizers.sparsity: [1.0, 0.0] -> [0.5, 0.0]",
        "renderers.volume.class: absent -> patch",
        "renderers.volume.patch: absent -> 40",
        "renderers.volume.downsample: absent -> 3",
    ],
}


def read(*words, **options):
    """The config, and the warnings about it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        config = load_config(*words, **options)
    return config, [str(w.message) for w in found if issubclass(w.category, FutureWarning)]


@pytest.mark.parametrize("name", ["toybox", "latte3d_toybox", "triplane_turbo_sd21", "atom_if"])
def test_an_old_recipe_is_todays(name):
    config, said = read(OLD / f"{name}.yaml")
    assert differing_keys(comparable(config), comparable(load_config(name))) == OTHER_TODAY.get(name, [])
    (text,) = said
    assert "one release" in text
    assert ("trained is trainable" if name == "latte3d_toybox" else "volume is renderers.volume") in text


def test_a_stored_config_of_an_old_run_is_read_and_resumed():
    values = yaml.safe_load((OLD / "run_config.yaml").read_text(encoding="utf-8"))
    config, said = read(OLD / "run_config.yaml")
    assert len(said) == 1
    for key in ("rollout_batch_size", "renderers.volume", "teacher_options.dtype", "model.class", "trainable"):
        assert f"is {key}" in said[0]
    assert config.renderer_schedule == "all" and config.rollout_batch_size == 4 and config.trainable is None
    assert config.teachers["richdreamer"].eta == 0.1 and not config.teachers["deepfloyd"].enabled
    assert from_dict(to_dict(config)) == config
    checkpoint = Checkpoint(20, {}, {"config": values, "prompts_a_step": 4})
    with pytest.warns(FutureWarning, match="checkpoint-20: written with names of before"):
        assert resumed_config(config, checkpoint, 4).schedule_steps == 20


def test_old_words_of_a_command_line_and_old_stages_are_read():
    words = ["--renderers", "volume", "--volume.height", "16", "--teachers.offload", "true", "--estimates_at_once", "2"]
    words += ["--stages", "[{until: 1, renderers: surface, surface: {height: 24}, trained: [adapter]}]"]
    config, said = read("toybox", words)
    assert len(said) == 1 and said[0].startswith("the command line: ")
    assert config.renderer_schedule == ("volume",) and config.rollout_batch_size == 2
    assert config.renderers["volume"].height == 16 and config.renderers["volume"].num_samples == 40
    assert config.teacher_options.offload
    (stage,) = config.stages
    assert stage["renderer_schedule"] == ["surface"] and stage["renderers"] == {"surface": {"height": 24}}


def test_parts_that_an_old_recipe_did_not_mention_are_there(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("renderers: alternate\nteachers: {mvdream: {weight: 2}}\n", encoding="utf-8")
    config, _ = read(path)
    assert list(config.enabled_teachers) == ["stable_diffusion", "mvdream", "richdreamer"]
    assert list(config.renderers) == ["volume", "surface"] and config.renderer_schedule == "alternate"
    path.write_text(
        "renderer_schedule: alternate\nteachers: {mvdream: {weight: 2}}\n", encoding="utf-8"
    )  # today's: those named
    config, said = read(path)
    assert list(config.teachers) == ["mvdream"] and not said


def test_todays_keys_stay_as_they_are():
    values = to_dict(load_config("latte3d_toybox"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed(values, "here") == values
        with_both = renamed({"renderers": {"volume": {"height": 8}}}, "here", whole=False)
    assert with_both == {"renderers": {"volume": {"height": 8}}}
    with pytest.warns(FutureWarning, match="volume is renderers.volume"):
        mixed = renamed({"volume": {"height": 8, "width": 8}, "renderers": {"volume": {"height": 4}}}, "x", whole=False)
    assert mixed == {"renderers": {"volume": {"height": 4, "width": 8}}}  # today's value counts


def test_the_table_of_runs_compares_an_old_run_with_one_of_today(tmp_path):
    for name, values in (
        ("old", yaml.safe_load((OLD / "run_config.yaml").read_text(encoding="utf-8"))),
        ("new", to_dict(read(OLD / "run_config.yaml", ["--renderers.volume.height", "16"])[0])),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        (tmp_path / name / "metrics.jsonl").write_text("", encoding="utf-8")
    new, old = differences(find_runs(tmp_path))
    assert (old["renderers.volume.height"], new["renderers.volume.height"]) == (32, 16)
    assert not {"estimates_at_once", "model.generator", "volume.height"} & (old.keys() | new.keys())
