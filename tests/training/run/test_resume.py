"""What a run may continue from: the config of the checkpoint, except where a change changes no number."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from prd.cli import main
from prd.errors import ConfigError
from prd.training.config import TrainConfig
from prd.training.recipes import load_config, to_dict
from prd.training.run.checkpoints import Checkpoint, CheckpointError, save_checkpoint
from prd.training.run.resume import departures, load_resumed, resumed_config


def checkpoint(config: TrainConfig, prompts: int = 4) -> Checkpoint:
    """As a run of `config` with `prompts` a step leaves it."""
    settled = replace(config, schedule_steps=config.schedule_steps or config.max_train_steps)
    return Checkpoint(7, {}, json.loads(json.dumps({"config": to_dict(settled), "global_batch_size": prompts})))


def test_limits_logging_output_and_the_split_of_a_batch_are_free():
    saved = checkpoint(load_config("toybox"))
    free = ["--max_train_steps", "900", "--max_train_minutes", "1", "--output_dir", "elsewhere", "--report_to", "null"]
    free += ["--checkpointing_steps", "9", "--validation.every_steps", "3", "--num_threads", "1"]
    free += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "latest"]
    config = resumed_config(load_config("toybox", free), saved, 4)
    first = load_config("toybox").max_train_steps
    assert config.schedule_steps == first  # so that a changed max_train_steps does not change the schedules
    assert config.max_train_steps == 900


def test_every_differing_key_is_listed_and_may_be_allowed(caplog):
    saved = checkpoint(load_config("toybox"))
    changed = ["--optimizer.lr", "0.002", "--seed", "3", "--teachers.mvdream.guidance_scale", "4"]
    with pytest.raises(ConfigError) as error:
        resumed_config(load_config("toybox", changed), saved, 8)
    listed = str(error.value)
    for part in ("checkpoint-7", "optimizer.lr: 0.004 -> 0.002", "seed: 0 -> 3", "prompts per step: 4 -> 8"):
        assert part in listed
    assert "teachers.mvdream.guidance_scale: 2.5 -> 4" in listed and "--allow_config_change" in listed
    assert "output_dir" not in listed and "max_train_steps" not in listed
    with caplog.at_level(logging.WARNING):
        config = resumed_config(load_config("toybox", [*changed, "--allow_config_change"]), saved, 8)
    assert config.optimizer.lr == 0.002 and "seed: 0 -> 3" in caplog.text


def test_the_state_of_another_optimizer_is_never_taken():
    saved = checkpoint(load_config("toybox"))
    adan = ["--optimizer.name", "adan", "--optimizer.betas", "[0.9, 0.9, 0.9]", "--allow_config_change"]
    with pytest.raises(ConfigError, match="optimizer.name='adan'.*'adamw'"):
        resumed_config(load_config("toybox", adan), saved, 4)


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused():
    with pytest.raises(CheckpointError, match="checkpoint-7"):
        resumed_config(load_config("toybox"), Checkpoint(7, {}, {}), 4)


def test_where_a_checkpoint_is_looked_for(tmp_path, caplog):
    def load(name: str | None, *words: str) -> Checkpoint | None:
        options = ["--output_dir", str(tmp_path), *words]
        return load_resumed(
            load_config("toybox", options if name is None else [*options, "--resume_from_checkpoint", name])
        )

    assert load(None) is None
    with pytest.raises(CheckpointError, match="has no checkpoint; leave it out, or pass --start_afresh"):
        load("latest")
    with caplog.at_level(logging.WARNING):
        assert load("latest", "--start_afresh") is None
    assert "has no checkpoint; starting from the first step" in caplog.text
    save_checkpoint(tmp_path, 1, {}, {})
    folder = save_checkpoint(tmp_path, 2, {}, {})
    for name, step in (("latest", 2), ("checkpoint-1", 1), (str(folder), 2)):
        found = load(name)
        assert found is not None and found.step == step
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        load("checkpoint-3")
    (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint.*checkpoint-2"):
        found = load("latest")
    assert found is not None and found.step == 1
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load("checkpoint-2")


def test_nothing_is_loaded_before_the_config_is_compared(tmp_path, monkeypatch, capsys):
    state = checkpoint(load_config("toybox", ["--seed", "1"])).state
    save_checkpoint(tmp_path, 7, {}, state)

    def unreachable(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("prd.training.trainer.build_parts", unreachable)
    words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest", "--report_to", "null"]
    assert main(["train", *words]) == 2
    assert "seed: 1 -> 0" in capsys.readouterr().err
    assert not (Path(tmp_path) / "config.yaml").exists()


def test_what_departs_from_the_recipe_is_told_alone():
    words = ["--seed=3", "--teachers.mvdream.weight=2", "--validation.prompts=[a red cube]"]
    lines = departures(load_config("toybox", words), "toybox").splitlines()
    assert lines[:3] == ["recipe: toybox", "  seed: 0 -> 3", "  teachers.mvdream.weight: 1.0 -> 2.0"]
    assert len(lines) == 4 and lines[3].endswith("-> ['a red cube']")
    assert departures(load_config("triplane_turbo_paper"), "triplane_turbo_paper") == "recipe: triplane_turbo_paper"
