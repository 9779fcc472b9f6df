"""What is only shown of a run does not end it where it cannot be written; a checkpoint that cannot be written does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from prd.cli import main
from prd.training.run.checkpoints import verify_checkpoint
from prd.training.trainer import Trainer

STEPS = 2


def take_away_the_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def move_the_run(run: Path) -> None:
    run.rename(run.with_name("moved"))


def stand_in_the_way(run: Path) -> None:
    """Folders in the place of files, and files in the place of folders: as if there were no right to write."""
    for name in ("index.html", "after.png", "scores.json"):
        (run / name).unlink(missing_ok=True)
        (run / name / "in use").mkdir(parents=True)
    for name in ("gallery", "meshes"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).touch()


def spoil_what_the_page_shows(run: Path) -> None:
    (run / "environment.json").write_text("[3]", encoding="utf-8")
    (run / "scores.json").write_text('{"a": 1}', encoding="utf-8")


@pytest.fixture
def words(toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red cube\na blue mug\n", encoding="utf-8")
    values = {
        **{"output_dir": tmp_path / "run", "prompts.source": tmp_path / "prompts.txt", "prompts.held_out": "[]"},
        **{"prompts.stack_fraction": 0, "max_train_steps": STEPS, "checkpointing_steps": 1, "train_batch_size": 1},
        **{"num_denoising_steps": 1, "rollout_batch_size": 1, "num_threads": 1, "validation.prompts": "[a red cube]"},
        **{"validation.gallery_steps": 2, "validation.resolution": 24, "validation.isosurface_resolution": 16},
        **{"validation.num_inference_steps": 1, "validation.stacks": 1, "validation.every_steps": "null"},
        **{"renderers.volume.grid_resolution": 16, "renderers.volume.num_samples": 16, "benchmark": "null"},
        **{"renderers.surface.grid_resolution": 16, "teachers.mvdream.enabled": "false"},
        **{"teachers.richdreamer.enabled": "false", "report_to": "null"},
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def after_the_first_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    step = Trainer.train_step

    def watched(trainer: Trainer, number: int) -> dict[str, float]:
        if number == 1:
            act()
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "train_step", watched)


@pytest.mark.parametrize("act", [take_away_the_config, move_the_run, stand_in_the_way, spoil_what_the_page_shows])
def test_a_run_ends_although_nothing_can_be_shown_of_it(
    act: Callable[[Path], None],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    after_the_first_step(monkeypatch, lambda: act(run))
    if act is take_away_the_config:
        words = [*words, "--report_to", "tensorboard"]
    with caplog.at_level(logging.WARNING):
        assert main(["train", *words]) == 0
    assert verify_checkpoint(run / f"checkpoint-{STEPS}") == STEPS
    assert (run / "adapter" / "config.json").is_file()
    warned = [record.message for record in caplog.records if "could not be written" in record.message]
    assert any("index.html" in message for message in warned)
    assert all("\n" not in message and message.endswith("the run goes on") for message in warned)
    if (run / "metrics.jsonl").is_file():
        assert [
            json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ] == [1, 2]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_a_sentence(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def replace_by_a_file() -> None:
        shutil.move(run, tmp_path / "moved")
        run.touch()

    after_the_first_step(monkeypatch, replace_by_a_file)
    assert main(["train", *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prd train: ")]
    assert len(said) == 1 and f"{run / 'checkpoint-2'} could not be written" in said[0]
    assert verify_checkpoint(tmp_path / "moved" / "checkpoint-1") == 1
