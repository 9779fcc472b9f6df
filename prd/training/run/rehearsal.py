"""`prd train --rehearse`: every stage of a run once, so that what fails late in it fails in its first minutes.

The user's own config trains a step, is saved, is resumed by a trainer built anew, trains a second step and the
first one of each further stage of the config, and shows and measures the validation prompts, in a run folder that is
removed when all of it has passed.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prd.errors import ConfigError, PrdError
from prd.training.config import TrainConfig
from prd.training.run.folder import check_run, forget_peak_memory, peak_memory, run_lock
from prd.training.run.heartbeat import Heartbeat
from prd.training.run.logbook import Logbook
from prd.training.run.session import begin_session
from prd.training.trainer import Trainer
from prd.utils.files import nothing_only_shown
from prd.utils.progress import LINE

STEPS = 2
TENSORBOARD = "tensorboard"
MARK, TRACEBACK = "rehearsal.txt", "traceback.txt"
PASSED = "The rehearsal passed: the run loads, trains, saves, resumes and is shown."


class RehearsalError(PrdError, RuntimeError):
    """A stage of a rehearsal failed; the sentence names the stage, the reason and the folder that was kept."""


@dataclass
class Rehearsal:
    """The stages so far: their seconds and the most gigabytes that each took, by name.

    steps  optimiser steps of the whole run that go at the pace of one that was rehearsed, by its stage's name
    """

    device: torch.device | None = None
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gigabytes: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work of a stage; RehearsalError names the stage if it fails."""
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        forget_peak_memory(device)
        begun = time.monotonic()
        try:
            done = work()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, PrdError) else f"{type(error).__name__}: "
            raise RehearsalError(f"rehearsal, {name}: failed: {kind}{reason}") from error
        self.seconds[name], self.gigabytes[name] = time.monotonic() - begun, peak_memory(device)
        return done

    def report(self, config: TrainConfig) -> str:
        """Stages with their seconds and gigabytes, and the hours of the whole run at the pace of the steps."""
        width = max(map(len, self.seconds))
        lines = [f"{'stage':{width}}  seconds  peak GB"]
        lines += [f"{name:{width}}  {s:7.1f}  {self.gigabytes[name]:7.2f}" for name, s in self.seconds.items()]
        if config.max_train_minutes is None:
            hours = sum(self.seconds[name] * count for name, count in self.steps.items()) / 3600
            pace = "the second one's pace" if len(self.steps) == 1 else "the pace of those here"
            lines.append(f"{config.max_train_steps:,} steps at {pace}: {hours:.1f} hours, measuring aside")
        return "\n".join([*lines, PASSED])


def rehearse(config: TrainConfig) -> str | None:
    """Rehearse a run and return the report, in the main process; None in the others.

    Raises ConfigError and CorpusError for what a run would refuse before it loads anything, RehearsalError for a stage
    that fails: its folder, `output_dir` with "-rehearsal" behind, is kept then.
    """
    check_run(config)
    folder, rehearsal = Path(f"{config.output_dir}-rehearsal"), Rehearsal()
    main = os.environ.get("RANK", "0") == "0"
    try:
        with _own_folder(folder) if main else nullcontext(), nothing_only_shown():
            _stages(rehearsed(config, folder), rehearsal)
    except RehearsalError as error:
        if main and not isinstance(error.__cause__, PrdError):
            (folder / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise RehearsalError(f"{error}; {folder} is kept") from error
    return rehearsal.report(config) if main else None


def rehearsed(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config of a rehearsal: the run's own, with all that is measured now and then measured at once.

    Of the trackers TensorBoard alone is told, which writes into the run folder; others keep runs elsewhere.
    """
    validation = config.validation
    due: dict[str, Any] = {"gallery_steps": STEPS if validation.prompts else None}
    due |= {name: STEPS for name in ("every_steps", "spread_steps") if getattr(validation, name) is not None}
    return replace(
        config,
        output_dir=str(folder),
        schedule_steps=config.total_steps,
        max_train_minutes=None,
        resume_from_checkpoint=None,
        report_to=TENSORBOARD if config.report_to in (TENSORBOARD, "all") else None,
        validation=replace(validation, **due),
    )


@contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """An empty run folder, locked; removed with the folders made for it if nothing is raised, else kept."""
    if folder.exists() and not (folder / MARK).is_file():
        raise ConfigError(
            f"{str(folder)!r}: is no rehearsal's, which would take its place; move it, or name another output_dir"
        )
    above = [place for place in folder.parents if not place.exists()]
    with run_lock(folder):
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != ".lock":
                old.unlink()
        (folder / MARK).write_text("of `prd train --rehearse`; may be removed\n", encoding="utf-8")
        yield
    shutil.rmtree(folder)
    for place in above:
        with suppress(OSError):  # others have written there meanwhile
            place.rmdir()


def _stages(config: TrainConfig, rehearsal: Rehearsal) -> None:
    """All stages, in order."""
    stage = rehearsal.stage
    trainer = stage("loading", lambda: Trainer(config))
    rehearsal.device = trainer.device
    stage("before the first step", lambda: begin_session(trainer))
    stage("first step", lambda: _step(trainer, 0))
    stage("checkpoint", lambda: trainer.save(1))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    del trainer
    _release()
    trainer = stage("loading again", lambda: Trainer(replace(config, resume_from_checkpoint="latest")))
    stage("resuming", lambda: begin_session(trainer))
    values = stage("second step", lambda: _step(trainer, 1))
    values = _later_stages(trainer, rehearsal) or values
    if trainer.accelerator.is_main_process:
        stage("gallery", lambda: _show(trainer, values))
        stage("saved model", lambda: trainer.model.save_pretrained(trainer.folder / trainer.model.folder_name))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _later_stages(trainer: Trainer, rehearsal: Rehearsal) -> Mapping[str, float]:
    """The first step of each stage of the config that begins later; returns what the last of them logs."""
    name, end = "second step", trainer.config.max_train_steps
    values: Mapping[str, float] = {}
    rehearsal.steps[name] = end
    for later in trainer.plan.stages:
        if STEPS <= later.first < end:
            rehearsal.steps[name] -= end - later.first
            name = f"first step of {later.name!r}"
            rehearsal.steps[name] = end - later.first
            values = rehearsal.stage(name, partial(_step, trainer, later.first))
    return values


def _step(trainer: Trainer, step: int) -> Mapping[str, float]:
    """An optimiser step, whose place is shown if it takes long; FloatingPointError for one that was skipped."""
    hidden = not trainer.accelerator.is_main_process
    with tqdm(desc=f"rehearsal, step {step}", bar_format=LINE + "{postfix}", disable=hidden) as bar:
        with closing(Heartbeat(bar)):
            values = trainer.train_step(step)
    if values["skipped"]:
        raise FloatingPointError(f"step {step} was skipped, for a gradient or a prediction was not finite")
    return values


def _show(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Everything that is shown, measured and logged now and then."""
    measured = trainer.validation.validate_periodically(STEPS, trainer.plan.now.total_steps)
    with closing(Logbook(trainer.folder, trainer.accelerator, 0, STEPS)) as log:
        log.write(STEPS, {**values, **measured})


def _release() -> None:
    """Give the memory of what is no longer used back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
