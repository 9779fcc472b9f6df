"""Number of optimiser steps, fitted to the minutes a run has, so that a slow machine trains a short but whole schedule.

    budget = Budget(minutes=9.0, steps=400)
    for ...:                                               # `done` steps have been taken
        if budget.due(done):                               # the same steps in every process
            number = budget.fit(done, end_seconds=50.0)    # by the main process, which tells the others
            changed = budget.accept(done, number)          # `budget.steps` is the number from now on

The number is fitted once the pace is known: from `MEASURED` steps after `WARM_UP` steps that compile and fill caches
and are not counted. It is fitted again where the pace may have changed: after the first steps of a stage, and at
`CHECK_SHARES` of the run, if the predicted end departs from the minutes by more than `TOLERANCE`. Every fit is recorded
in the config (`fits`); a run that begins with recorded fits follows them and fits no more.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from prd.utils.checked_types import CHECKS, Count

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps of a process or of a stage whose time is not counted
MEASURED = 8  # steps that a pace is measured over
MEASURED_SHARE = 0.05  # of the minutes: steps that take longer than this in all are measured over fewer
CHECK_SHARES = (0.25, 0.5, 0.75)  # of the steps, where the pace is compared again
TOLERANCE = 0.1  # of the minutes: how far the predicted end may be from them without another fit
END_SHARE = 0.05  # of the minutes: what follows the last step, where it cannot be measured beforehand
HARD_LIMIT = 1.25  # of the minutes: where training stops in the middle of its schedule


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Fit:
    """Numbers of steps that hold from the step `step` on, until the next fit."""

    step: Count  # optimiser steps done when the number was fitted
    max_train_steps: Count  # the run ends after so many
    schedule_steps: Count  # where every schedule reaches its end


class Budget:
    """Fits the number of steps of a run to its minutes.

    minutes  wall-clock minutes of this process, from its start to the finished run folder
    steps    most steps that are taken
    done     steps taken before this process
    clock    seconds since this process began
    """

    def __init__(self, minutes: float, steps: int, *, done: int = 0, clock: Callable[[], float] | None = None) -> None:
        started = time.monotonic()
        self.clock = clock or (lambda: time.monotonic() - started)
        self.seconds, self.most, self.steps = 60 * minutes, steps, steps
        self.fitted = False  # whether a number has been fitted
        self.checks = list(CHECK_SHARES)
        self.begin(done)

    def begin(self, done: int) -> None:
        """Measure the pace anew, after `done` steps: a process or a stage begins."""
        self.measuring = True
        self.mark = done + WARM_UP  # step that the pace is measured from
        self.marked = self.clock()  # when it was reached; set again after the warm-up

    def due(self, done: int) -> bool:
        """Return True if a number of steps is to be fitted after `done` steps; to be called after every step.

        Depends on the steps alone, so that all processes ask for a number after the same ones.
        """
        if done == self.mark:
            self.marked = self.clock()
        if self.measuring:
            return done > self.mark
        return bool(self.checks) and done >= self.checks[0] * self.steps and done - self.mark >= MEASURED

    def fit(self, done: int, *, end_seconds: float, stage_start: float = 0.0) -> int:
        """Number of steps that end with the minutes at the pace measured last, at least `done`; 0: not known yet.

        end_seconds  what follows the last step takes: saving, sheets, meshes, measuring
        stage_start  share of the run at which the current stage begins; a longer run must not go back before it
        """
        now, count = self.clock(), done - self.mark
        spent = now - self.marked
        if self.measuring and count < MEASURED and spent < MEASURED_SHARE * self.seconds:
            return 0
        pace = spent / count
        predicted = now + pace * (self.steps - done) + end_seconds
        if self.fitted and abs(predicted - self.seconds) <= TOLERANCE * self.seconds:
            return self.steps
        left = self.seconds - now - end_seconds
        number = self.most if left >= pace * (self.most - done) else done + math.floor(left / pace)
        if stage_start > 0:
            number = min(number, max(self.steps, math.floor(done / stage_start)))
        number = max(number, done)
        logger.info(
            "step %d: %.2f s per step, %.0f of %.0f s left for training: %d steps in all",
            done,
            pace,
            left,
            self.seconds,
            number,
        )
        return number

    def accept(self, done: int, number: int) -> bool:
        """Take the number that the main process fitted after `done` steps; whether it is to be recorded."""
        if number == 0:
            return False
        new = not self.fitted or number != self.steps
        self.fitted, self.steps, self.measuring = True, number, False
        self.checks = [share for share in self.checks if share * number > done]
        self.mark, self.marked = done, self.clock()
        return new


def planned(config: TrainConfig, done: int) -> TrainConfig:
    """The config with the numbers of steps that hold after `done` steps: those of the last fit until then.

    Without minutes (`max_train_minutes` null) the run ends after `max_train_steps`, as configured, however its
    schedules were fitted before.
    """
    fits = [fit for fit in config.fits if fit.step <= done]
    if not fits:
        return config
    last = max(fits, key=lambda fit: fit.step)
    steps = config.max_train_steps if config.max_train_minutes is None else last.max_train_steps
    return dataclasses.replace(config, max_train_steps=steps, schedule_steps=last.schedule_steps)


def stage_start(config: TrainConfig, index: int) -> float:
    """Share of `max_train_steps` at which a stage begins."""
    if index == 0:
        return 0.0
    return (
        config.stages[index - 1]["until"] * (config.schedule_steps or config.max_train_steps) / config.max_train_steps
    )


def with_fit(config: TrainConfig, done: int, steps: int) -> TrainConfig:
    """The config with a fit recorded; `schedule_steps` keeps its ratio to `max_train_steps`."""
    schedule = config.schedule_steps or config.max_train_steps
    scaled = max(1, round(schedule * steps / config.max_train_steps))
    return dataclasses.replace(
        config, fits=(*config.fits, Fit(step=done, max_train_steps=steps, schedule_steps=scaled))
    )
