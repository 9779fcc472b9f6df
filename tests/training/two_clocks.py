"""A run of several processes, each with another clock: a step takes the main process 7.5 s, the others 1 s.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/training/two_clocks.py OPTIONS
"""

from __future__ import annotations

import sys

from prd.training import budget
from prd.training.recipes import load_config
from prd.training.trainer import Trainer


def main(*overrides: str) -> None:
    budget.WARM_UP = budget.MEASURED = 1
    trainer = Trainer(load_config("toybox", overrides))
    train_step, steps = trainer.train_step, []
    seconds = 7.5 if trainer.accelerator.is_main_process else 1.0

    def counted(step):
        steps.append(step)
        return train_step(step)

    trainer.train_step = counted
    trainer.clock.minutes = lambda: seconds * len(steps) / 60
    trainer.validation.seconds_after = lambda: 0.0
    trainer.validation.after = lambda done, cost: None
    trainer.train()
    fits = [(fit.step, fit.max_train_steps) for fit in trainer.plan.config.fits]
    # in one write: without a buffer `print` writes the line's end apart, and the processes share the stream
    sys.stdout.write(f"process {trainer.accelerator.process_index}: {len(steps)} steps, fits {fits}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
