"""Runs whose number of steps is fitted to their minutes, on random models and with a clock that the test turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prd.evaluation.report import read_run
from prd.training import budget as budget_module
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.training.validation import Validation

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "1", "--report_to", "null"),
    *("--renderer_schedule", "volume", "--renderers.volume.grid_resolution", "12"),
    *("--renderers.volume.num_samples", "8"),
    *("--renderers.volume.height", "16", "--renderers.volume.width", "16"),
    *("--teachers.stable_diffusion.enabled", "false"),
    *("--teachers.mvdream.enabled", "false", "--validation.prompts", "[]", "--validation.stacks", "1"),
    *("--validation.every_steps", "null", "--optimizer.warmup_steps", "1", "--checkpoints_total_limit", "null"),
    *("--max_train_steps", "12", "--checkpointing_steps", "5", "--max_train_minutes", "1"),
]


@pytest.fixture
def quick(toybox, monkeypatch):
    """Paces are measured over one step after one of warm-up, and nothing is measured at the end."""
    monkeypatch.setattr(budget_module, "WARM_UP", 1)
    monkeypatch.setattr(budget_module, "MEASURED", 1)
    monkeypatch.setattr(Validation, "seconds_after", lambda self: 0.0)
    monkeypatch.setattr(Validation, "after", lambda self, done, cost: None)


def clocked(run: Path, seconds: float, *words: str, recipe: str = "toybox") -> Trainer:
    """A run on whose clock every step takes `seconds`."""
    trainer = Trainer(load_config(recipe, [*SMALL, "--output_dir", str(run), *words]))
    train_step, steps = trainer.train_step, []
    trainer.clock.minutes = lambda: seconds * len(steps) / 60

    def counted(step):
        steps.append(step)
        return train_step(step)

    trainer.train_step = counted
    return trainer


def rows(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_gigabytes")} for row in found]


def test_the_schedule_is_that_of_the_fitted_number(quick, tmp_path):
    clocked(tmp_path / "fitted", 7.5).train()
    clocked(tmp_path / "fixed", 7.5, "--max_train_steps", "8", "--max_train_minutes", "null").train()
    fitted, fixed = rows(tmp_path / "fitted"), rows(tmp_path / "fixed")
    assert len(fitted) == len(fixed) == 8  # 60 s / 7.5 s
    rates = [row["lr"] for row in fitted]
    assert rates[2:] == [row["lr"] for row in fixed][2:]  # from the fit on; before it the learning rate warms up
    assert rates[-1] == min(rates) < 0.5 * max(rates)
    config = load_config(tmp_path / "fitted" / "config.yaml")
    (fit,) = config.fits
    assert (fit.step, fit.max_train_steps, fit.schedule_steps) == (2, 8, 8)
    assert (config.max_train_steps, config.schedule_steps) == (12, 12)
    assert read_run(tmp_path / "fitted").planned_steps == 8


def test_a_resumed_run_keeps_the_number_and_ends_like_the_uninterrupted_one(quick, tmp_path):
    whole = clocked(tmp_path / "run", 7.5)
    whole.train()
    folder = str(tmp_path / "run" / "checkpoint-5")
    again = clocked(tmp_path / "again", 1.0, "--resume_from_checkpoint", folder)  # another machine, much faster
    again.train()
    assert again.plan.config.fits == whole.plan.config.fits and again.plan.max_train_steps == 8
    assert rows(tmp_path / "again") == rows(tmp_path / "run")[5:]
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(a, b)
    longer = clocked(tmp_path / "longer", 1.0, "--resume_from_checkpoint", folder, "--max_train_minutes", "null")
    longer.train()
    after = rows(tmp_path / "longer")
    assert [row["step"] for row in after] == list(range(6, 13))  # the schedules stay
    assert after[:3] == rows(tmp_path / "run")[5:] and after[-1]["lr"] == after[3]["lr"]


def test_the_config_of_a_run_repeats_it_whatever_the_clock(quick, tmp_path):
    first = clocked(tmp_path / "run", 7.5)
    first.train()
    words = ["--output_dir", str(tmp_path / "again")]
    again = Trainer(load_config(tmp_path / "run" / "config.yaml", words))
    again.clock.minutes = lambda: 0.0
    again.train()
    assert again.plan.budget is None and rows(tmp_path / "again") == rows(tmp_path / "run")


def test_a_run_that_becomes_far_too_slow_is_stopped_and_says_so(quick, tmp_path, caplog):
    trainer = clocked(tmp_path / "run", 7.5)
    trainer.plan.budget.checks = []  # as if it became slow after the last of them
    trainer.fit_steps = lambda done, fit=trainer.fit_steps: (fit(done), slow(done))

    def slow(done):
        if done == 5:
            trainer.clock.minutes = lambda: 1.3

    trainer.train()
    assert len(rows(tmp_path / "run")) == 6
    assert "1.25 times its max_train_minutes=1.0: the machine became slower" in caplog.text
    assert "resume the run for the remaining 2 steps" in caplog.text


def test_the_stages_of_a_recipe_are_fitted_too(quick, tmp_path):
    trainer = clocked(tmp_path / "run", 7.5, "--teachers.mvdream.enabled", "true", recipe="atom_toybox")
    seen = []
    train_step = trainer.train_step
    trainer.train_step = lambda step: (train_step(step), seen.append(trainer.stage.name))[0]
    trainer.train()
    assert seen == [*["volume"] * 6, *["mesh"] * 2]
    assert [stage.last for stage in trainer.plan.stages] == [6, 8]


def test_two_processes_take_the_same_number(tmp_path):
    """Each with a clock of its own; the main one's decides."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    launcher += ["--mixed_precision", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/training/two_clocks.py"), *SMALL, "--output_dir", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert told == ["process 0: 8 steps, fits [(2, 8)]", "process 1: 8 steps, fits [(2, 8)]"], done.stdout[-2000:]
