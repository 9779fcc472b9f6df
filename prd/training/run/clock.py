"""Minutes of a run, over all the processes that it was resumed in."""

from __future__ import annotations

import time

TIME_IS_UP = "max_train_minutes"


class Clock:
    """Wall-clock time since a process began to train; `minutes_before`: of the run before it was resumed."""

    def __init__(self) -> None:
        self.started = time.time()
        self.minutes_before = 0.0

    def minutes(self) -> float:
        """Minutes of this process."""
        return (time.time() - self.started) / 60

    def minutes_of_run(self) -> float:
        """Minutes of this process and of those before it."""
        return self.minutes_before + self.minutes()
