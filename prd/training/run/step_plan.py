"""How many optimiser steps a run takes and which schedules hold, fitted to its minutes by `prd.training.budget`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from prd.training.budget import END_SHARE, HARD_LIMIT, Budget, planned, stage_start, with_fit
from prd.training.recipes import save_config, stages_of
from prd.training.run.clock import Clock

if TYPE_CHECKING:
    from prd.training.config import TrainConfig
    from prd.training.trainer import Trainer


class StepPlan:
    """The numbers of steps of a run as they hold now.

    config       the run's config with these numbers in the place of `max_train_steps` and `schedule_steps`
    done         optimiser steps of the run before this process
    end_seconds  what follows the last step takes: saving, sheets, meshes, measuring
    """

    def __init__(self, config: TrainConfig, clock: Clock, done: int = 0) -> None:
        self.config, self.clock = planned(config, max(0, done - 1)), clock
        self.minutes = config.max_train_minutes
        self.budget: Budget | None = None
        if self.minutes is not None and not config.fits:
            steps = config.max_train_steps
            self.budget = Budget(self.minutes, steps, done=done, clock=lambda: 60 * clock.minutes())
        self.end_seconds = END_SHARE * 60 * (self.minutes or 0.0)

    @property
    def steps(self) -> int:
        """Optimiser steps after which the run ends."""
        return self.config.max_train_steps

    def begin_stage(self, step: int) -> None:
        """Measure the pace anew: a stage begins with `step`."""
        if self.budget is not None:
            self.budget.begin(step)

    def is_over(self) -> bool:
        """Whether this process has run longer than the minutes by far, in spite of the number fitted."""
        return self.minutes is not None and self.clock.minutes() > HARD_LIMIT * self.minutes

    def why_cut(self, done: int) -> str:
        """The sentence about a run that was stopped in the middle of its schedule; "" if it was not."""
        if done >= self.steps:
            return ""
        return (
            f"the run has taken {HARD_LIMIT:.3g} times its max_train_minutes={self.minutes}: the machine became "
            f"slower, and the schedules stop in the middle; resume the run for the remaining {self.steps - done} steps"
        )


def fit_steps(trainer: Trainer, done: int) -> None:
    """Fit the number of steps to the minutes where that is due after `done` steps, alike in all processes."""
    budget, accelerator = trainer.plan.budget, trainer.accelerator
    if budget is not None and budget.due(done):
        number = 0
        if accelerator.is_main_process:
            start = stage_start(trainer.config, trainer.stages.index(trainer.stage))
            number = budget.fit(done, end_seconds=trainer.plan.end_seconds, stage_start=start)
        numbers = [number]
        if accelerator.num_processes > 1:
            broadcast_object_list(numbers)
        if budget.accept(done, numbers[0]):
            trainer.config = with_fit(trainer.config, done, numbers[0])
            if accelerator.is_main_process:
                save_config(trainer.config, trainer.folder / "config.yaml")
    follow_plan(trainer, done)


def follow_plan(trainer: Trainer, done: int) -> None:
    """Follow the schedules that hold after `done` steps; the stage is left when the next step is taken."""
    plan, before = planned(trainer.config, done), trainer.plan.config
    trainer.plan.config = plan
    if (plan.max_train_steps, plan.schedule_steps) != (before.max_train_steps, before.schedule_steps):
        index = trainer.stages.index(trainer.stage)
        trainer.stages = stages_of(plan)
        trainer.follow(trainer.stages[index])
