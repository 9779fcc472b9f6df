"""The steps that a run takes and its stages, fitted to its minutes while it goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from prd.training.budget import END_SHARE, HARD_LIMIT, Budget, planned, stage_start, with_fit
from prd.training.config import Stage, TrainConfig
from prd.training.recipes import save_config, stages_of
from prd.training.run.clock import TIME_IS_UP, Clock
from prd.utils.files import only_shown

logger = logging.getLogger(__name__)


class StepPlan:
    """The numbers of steps that hold now, alike in all processes.

    config  of the run, in which every fit is recorded (`fits`)
    done    steps taken before this process
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, clock: Clock, done: int = 0) -> None:
        self.config, self.accelerator, self.clock = config, accelerator, clock
        self.now = planned(config, max(0, done - 1))  # the config with the numbers of steps that hold now
        self.stages = stages_of(self.now)
        self.budget: Budget | None = None
        if config.max_train_minutes is not None and not config.fits:
            minutes, most = config.max_train_minutes, config.max_train_steps
            self.budget = Budget(minutes, most, done=done, clock=lambda: 60 * clock.minutes())
        self.end_seconds = END_SHARE * 60 * (config.max_train_minutes or 0.0)  # taken by what follows the last step

    @property
    def max_train_steps(self) -> int:
        """The step after which the run ends, as planned now."""
        return self.now.max_train_steps

    def stage_at(self, step: int) -> Stage:
        """The stage that an optimiser step belongs to."""
        return next((stage for stage in self.stages if step < stage.last), self.stages[-1])

    def begin_stage(self, step: int) -> None:
        """Measure the pace anew: the first step of a stage is to be taken."""
        if self.budget is not None:
            self.budget.begin(step)

    def fit(self, done: int, stage: Stage) -> bool:
        """Fit the number of steps to the minutes where that is due after `done` steps; whether one was recorded."""
        if self.budget is None or not self.budget.due(done):
            return False
        numbers = [0]
        if self.accelerator.is_main_process:
            start = stage_start(self.config, self.stages.index(stage))
            numbers = [self.budget.fit(done, end_seconds=self.end_seconds, stage_start=start)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(numbers)
        recorded = self.budget.accept(done, numbers[0])
        if recorded:
            self.config = with_fit(self.config, done, numbers[0])
        return recorded

    def write(self, folder: Path) -> None:
        """Write the config with what was fitted into the run folder; each checkpoint holds it too."""
        path = folder / "config.yaml"
        with only_shown(path):
            save_config(self.config, path)

    def follow(self, done: int, stage: Stage) -> Stage:
        """Take the numbers that hold after `done` steps; returns the stage as it is by them."""
        before, self.now = self.now, planned(self.config, done)
        if (self.now.max_train_steps, self.now.schedule_steps) == (before.max_train_steps, before.schedule_steps):
            return stage
        index = self.stages.index(stage)
        self.stages = stages_of(self.now)
        return self.stages[index]

    def out_of_time(self) -> bool:
        """Return True if the main process has run far longer than `max_train_minutes`, despite the number fitted."""
        limit = self.config.max_train_minutes
        return limit is not None and self.accelerator.is_main_process and self.clock.minutes() > HARD_LIMIT * limit

    def say_stopping(self, reason: str, done: int) -> None:
        """Log why a run stops after `done` steps, and of one that its minutes stop what is left of it."""
        logger.warning("%s: stopping after %d steps", reason, done)
        if reason == TIME_IS_UP and done < self.max_train_steps:
            logger.warning(
                "the run has taken %.3g times its max_train_minutes=%s: the machine became slower, and the schedules "
                "stop in the middle; resume the run for the remaining %d steps",
                *(HARD_LIMIT, self.config.max_train_minutes, self.max_train_steps - done),
            )
