"""Session of a run in one process, around its steps: its folder before the first, the model after the last."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prd.data.corpora import preview
from prd.evaluation.report import update_report
from prd.training.recipes import save_config, to_dict
from prd.training.run.checkpoints import archive_newer_checkpoints
from prd.training.run.clock import TIME_IS_UP
from prd.training.run.folder import write_environment
from prd.training.run.places import without_places
from prd.training.run.resume import plain
from prd.utils.files import only_shown

if TYPE_CHECKING:
    from prd.training.trainer import Trainer

logger = logging.getLogger(__name__)


def begin_session(trainer: Trainer) -> int:
    """Write the environment and the config, resume, show the prompts as they are; returns the steps done before."""
    config, main = trainer.config, trainer.accelerator.is_main_process
    if main:
        write_environment(trainer.folder, trainer.accelerator.num_processes)
        save_config(config, trainer.folder / "config.yaml")
        print(f"config: {trainer.folder / 'config.yaml'}")
        print(preview(trainer.corpus.prompts, getattr(trainer.corpus, "source", config.prompts.source)))
    first = trainer.resume()
    if main and (later := archive_newer_checkpoints(trainer.folder, first)):
        names = ", ".join(str(place) for place in later)
        logger.warning("renamed %d checkpoints newer than step %d: %s", len(later), first, names)
    if main and first == 0:
        trainer.validation.before()
    if main and trainer.plan.budget is not None and (seconds := trainer.validation.seconds_after()) is not None:
        trainer.plan.end_seconds = seconds
    trainer.accelerator.init_trackers("prd", config=plain(without_places(to_dict(config))))
    return first


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Say of an OSError, mostly a full disk, that nothing is lost and how to go on."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{error}: the run stopped; its checkpoints in {folder} are whole: make room, and continue with "
            "--resume_from_checkpoint latest"
        ) from error


def report_stop(trainer: Trainer, done: int) -> None:
    """Say where a run that a signal has stopped goes on."""
    if was_stopped(trainer) and trainer.accelerator.is_main_process:
        update_report(trainer.folder)
        print(f"stopped by {trainer.stopping} after {done} steps; continue with --resume_from_checkpoint latest")


def end_session(trainer: Trainer, done: int) -> None:
    """Save, show and measure the model of a run that has ended."""
    if trainer.accelerator.is_main_process and not was_stopped(trainer):
        cost = {
            "fits": to_dict(trainer.plan.config)["fits"],
            "frames_per_prompt": round(trainer.frames_per_prompt, 1),
            "teacher_passes": trainer.passes.total,
            "minutes": round(trainer.clock.minutes_of_run(), 1),
        }
        with full_disk_explained(trainer.folder):
            trainer.validation.after(done, cost)
        print(f"run folder: {trainer.folder}  ({trainer.clock.minutes():.1f} minutes)")
    trainer.accelerator.wait_for_everyone()
    with only_shown("the tracker's log"):
        trainer.accelerator.end_training()


def was_stopped(trainer: Trainer) -> bool:
    """Return True if a signal ended the steps, rather than their number or the minutes."""
    return trainer.stopping not in (None, TIME_IS_UP)
