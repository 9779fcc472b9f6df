"""`prd train --rehearse`: every stage of a run once; what fails is named with its stage, and kept."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from prd.cli import main
from prd.errors import ConfigError
from prd.training.recipes import load_config, stages_of
from prd.training.run import heartbeat, rehearsal
from prd.training.run.folder import forget_peak_memory, peak_memory
from prd.utils.files import only_shown
from prd.utils.progress import at

SMALL = (
    *("--num_threads=1", "--train_batch_size=1", "--num_denoising_steps=2", "--report_to=null"),
    *("--renderers.volume.grid_resolution=12", "--renderers.surface.grid_resolution=12"),
    *("--renderers.volume.num_samples=8", "--validation.prompts=[a red cube]", "--validation.resolution=16"),
    *("--validation.isosurface_resolution=16", "--model.latent_size=4", "--validation.num_inference_steps=1"),
)
STAGES = (
    *("loading", "before the first step", "first step", "checkpoint", "loading again", "resuming", "second step"),
    *("gallery", "saved model"),
)


def test_a_run_is_rehearsed_with_its_own_config_and_leaves_nothing(random_toybox, capsys, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(rehearsal.Trainer, "train_step", watched(rehearsal.Trainer.train_step, shown))
    words = [*SMALL, f"--output_dir={tmp_path / 'runs' / 'mine'}"]
    assert main(["train", "--rehearse", "--config", "toybox", *words]) == 0
    text = capsys.readouterr().out
    report = text[text.index("stage ") :].splitlines()
    assert [line.split("  ")[0].strip() for line in report[1 : 1 + len(STAGES)]] == list(STAGES)
    assert report[-1] == rehearsal.PASSED
    assert [step for step, _ in shown] == [0, 1] and not list(tmp_path.iterdir())
    (_, first), (_, second) = shown
    assert first.config == second.config or first is not second  # built anew
    assert second.config.resume_from_checkpoint == "latest" and second.first == 1
    assert first.config.schedule_steps == load_config("toybox").total_steps  # the schedules of the whole run


STAGED = "--stages=[{name: coarse, until: 0.25}, {name: fine, until: 1, renderer_schedule: [surface]}]"


def test_each_stage_of_the_config_takes_a_step(random_toybox, capsys, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(rehearsal.Trainer, "train_step", watched(rehearsal.Trainer.train_step, shown))
    words = [*SMALL, STAGED, "--max_train_steps=100", "--max_train_minutes=null", f"--output_dir={tmp_path / 'mine'}"]
    assert main(["train", "--rehearse", "--config", "toybox", *words]) == 0
    text = capsys.readouterr().out
    assert [step for step, _ in shown] == [0, 1, 25] and shown[-1][1].stage.name == "fine"
    assert "\nfirst step of 'fine' " in text and "\n100 steps at the pace of those here: " in text
    assert text.splitlines()[-1] == rehearsal.PASSED and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ends", "taken", "counted"),
    [
        ([1], [], [100]),
        ([0.01, 1], [], [100]),  # the second step is its first
        ([0.5, 1], [50], [50, 50]),
        ([0.1, 0.25, 1], [10, 25], [10, 15, 75]),
    ],
)
def test_steps_of_later_stages_are_timed_by_their_own(ends, taken, counted, stub, tmp_path):
    steps, step = [], Rehearsed.train_step
    stub.setattr(Rehearsed, "train_step", lambda trainer, number: steps.append(number) or step(trainer, number))
    stages = "[" + ", ".join(f"{{name: s{i}, until: {end}}}" for i, end in enumerate(ends)) + "]"
    timed = rehearsal.Rehearsal()
    config = config_in(tmp_path, f"--stages={stages}", "--max_train_steps=100", "--max_train_minutes=null")
    (tmp_path / "run").mkdir()
    rehearsal._stages(rehearsal.rehearsed(config, tmp_path / "run"), timed)
    assert steps == [0, 1, *taken] and list(timed.steps.values()) == counted
    timed.seconds |= dict.fromkeys(timed.steps, 36.0)
    assert "100 steps at" in timed.report(config) and ": 1.0 hours" in timed.report(config)


def test_a_later_stage_that_fails_is_named(stub, tmp_path):
    stub.setattr(Rehearsed, "fails", "step 25")
    with pytest.raises(rehearsal.RehearsalError, match="rehearsal, first step of 'fine': failed: OSError: No space"):
        rehearsal.rehearse(config_in(tmp_path, STAGED, "--max_train_steps=100", "--max_train_minutes=null"))


def watched(step: Any, shown: list[Any]) -> Any:
    def train_step(trainer: Any, number: int) -> dict[str, float]:
        shown.append((number, trainer))
        return step(trainer, number)

    return train_step


class Rehearsed:
    """A trainer that does nothing but write, and fails where it is told."""

    fails = ""

    def __init__(self, config: Any) -> None:
        self.config, self.device, self.folder = config, torch.device("cpu"), Path(config.output_dir)
        self.resumed = config.resume_from_checkpoint is not None
        self.do("loading again" if self.resumed else "loading")
        self.accelerator = SimpleNamespace(
            is_main_process=True, wait_for_everyone=int, end_training=int, log=lambda *_, **__: None
        )
        self.plan = SimpleNamespace(now=SimpleNamespace(total_steps=10), stages=stages_of(config))
        self.validation = SimpleNamespace(validate_periodically=self.show)
        self.model = SimpleNamespace(save_pretrained=lambda _: self.do("saved model"), folder_name="adapter")

    def do(self, stage: str) -> None:
        if stage == self.fails:
            raise OSError("No space left on device")
        (self.folder / stage.replace(" ", "_")).touch()

    def show(self, done: int, steps: int) -> dict[str, float]:
        with only_shown("a sheet"):
            self.do("gallery")
        return {"peak_gigabytes": 1.0}

    def train_step(self, step: int) -> dict[str, float]:
        self.do({0: "first step", 1: "second step"}.get(step, f"step {step}"))
        return {"skipped": float(self.fails == f"skipped {step}"), "seconds": 1.0}

    def save(self, step: int) -> None:
        self.do("checkpoint")


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(rehearsal, "Trainer", Rehearsed)
    session = {False: "before the first step", True: "resuming"}
    monkeypatch.setattr(rehearsal, "begin_session", lambda trainer: trainer.do(session[trainer.resumed]))
    return monkeypatch


def config_in(folder: Path, *words: str) -> Any:
    return load_config("toybox", ["--report_to=null", f"--output_dir={folder / 'run'}", *words])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_is_named_and_its_folder_kept(stage, stub, tmp_path):
    stub.setattr(Rehearsed, "fails", stage)
    kept = tmp_path / "run-rehearsal"
    with pytest.raises(rehearsal.RehearsalError) as caught:
        rehearsal.rehearse(config_in(tmp_path))
    assert str(caught.value) == f"rehearsal, {stage}: failed: OSError: No space left on device; {kept} is kept"
    assert "No space left" in (kept / rehearsal.TRACEBACK).read_text(encoding="utf-8")
    for earlier in STAGES[: STAGES.index(stage)]:
        assert (kept / earlier.replace(" ", "_")).exists()
    stub.setattr(Rehearsed, "fails", "")  # the next one clears it away
    assert rehearsal.PASSED in str(rehearsal.rehearse(config_in(tmp_path))) and not list(tmp_path.iterdir())


def test_a_long_step_shows_its_place(stub, tmp_path, capfd):
    def train_step(trainer: Any, step: int) -> dict[str, float]:
        at(estimate="estimate 3 of 4", doing="teacher mvdream, renderer volume")
        time.sleep(0.3)
        return {"skipped": 0.0, "seconds": 1.0}

    stub.setattr(Rehearsed, "train_step", train_step)
    stub.setattr(heartbeat, "SILENCE", 0.05)
    assert rehearsal.PASSED in str(rehearsal.rehearse(config_in(tmp_path)))
    text = capfd.readouterr().err
    for step in (0, 1):
        line = rf"rehearsal, step {step}: \d\.\d s, estimate 3 of 4, teacher mvdream, renderer volume, 0 s"
        assert re.search(line, text)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_without_a_gradient_does_not_pass(step, stub, tmp_path, capsys):
    stub.setattr(Rehearsed, "fails", f"skipped {step}")
    words = ["--config", "toybox", "--report_to=null", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", "--rehearse", *words]) == 2
    name = ("first", "second")[step]
    assert f"prd train: rehearsal, {name} step: failed: FloatingPointError: step {step} was skipped" in (
        capsys.readouterr().err
    )


def test_what_a_run_would_refuse_is_refused_before_anything_is_made(stub, tmp_path):
    with pytest.raises(ConfigError, match="teachers.mvdream.path"):
        rehearsal.rehearse(config_in(tmp_path, f"--teachers.mvdream.path={tmp_path / 'none'}"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run-rehearsal").mkdir()
    (tmp_path / "run-rehearsal" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="run-rehearsal.*is no rehearsal's"):
        rehearsal.rehearse(config_in(tmp_path))
    assert (tmp_path / "run-rehearsal" / "thesis.txt").exists()


def test_a_folder_that_others_write_to_meanwhile_is_left(stub, tmp_path):
    stub.setattr(Rehearsed, "save", lambda trainer, step: (trainer.folder.parent / "of_another_run").mkdir())
    assert rehearsal.PASSED in str(rehearsal.rehearse(config_in(tmp_path / "runs" / "today")))
    assert sorted(tmp_path.rglob("*")) == [
        *(tmp_path / "runs", tmp_path / "runs" / "today", tmp_path / "runs" / "today" / "of_another_run")
    ]


def test_everything_that_is_measured_now_and_then_is_due(tmp_path):
    due = rehearsal.rehearsed(config_in(tmp_path, "--validation.spread_steps=null"), tmp_path).validation
    assert (due.gallery_steps, due.every_steps, due.spread_steps) == (2, 2, None)
    assert (
        rehearsal.rehearsed(config_in(tmp_path, "--validation.prompts=[]"), tmp_path).validation.gallery_steps is None
    )


@pytest.mark.parametrize(
    ("report_to", "told"),
    [("null", None), ("tensorboard", "tensorboard"), ("all", "tensorboard"), ("wandb", None), ("mlflow", None)],
)
def test_of_the_trackers_the_one_in_the_run_folder_alone_is_told(report_to, told, tmp_path):
    config = rehearsal.rehearsed(config_in(tmp_path, f"--report_to={report_to}"), tmp_path)
    assert config.report_to == told


def test_a_tracker_leaves_nothing(random_toybox, tmp_path, monkeypatch, capsys):
    """A tracker that writes into the current folder or the Internet begins no run; TensorBoard's goes with it."""
    begun: list[str] = []
    for kind in set(LOGGER_TYPE_TO_CLASS.values()):
        if kind is not None:
            monkeypatch.setattr(kind, "start", watched_start(kind, begun))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("prd.training.run.folder.get_available_trackers", lambda: list(LOGGER_TYPE_TO_CLASS))
    for tracker in ("all", "wandb"):
        words = [*SMALL, f"--report_to={tracker}", f"--output_dir={tmp_path / 'runs' / tracker}"]
        assert main(["train", "--rehearse", "--config", "toybox", *words]) == 0
        assert rehearsal.PASSED in capsys.readouterr().out
        assert sorted(tmp_path.rglob("*")) == [here]
    assert set(begun) == {"TensorBoardTracker"}


def watched_start(kind: Any, begun: list[str]) -> Any:
    start = kind.start

    def watched(tracker: Any) -> Any:
        begun.append(kind.__name__)
        return start(tracker)

    return watched


def test_the_peak_of_a_stage_is_its_own():
    cpu = torch.device("cpu")
    forget_peak_memory(cpu)
    block = torch.ones(100_000_000)
    high = peak_memory(cpu)
    del block
    forget_peak_memory(cpu)
    assert high - peak_memory(cpu) > 0.3
