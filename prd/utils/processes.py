"""The processes that share a piece of work, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

WAIT = timedelta(days=7)  # for the other processes


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that were started together."""

    rank: int = 0
    count: int = 1
    state: Any = None

    @staticmethod
    def join() -> Processes:
        """Return this process's place among those that were started together."""
        if number_of_processes() < 2:
            return Processes()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
        return Processes(state.process_index, state.num_processes, state)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def number_of_processes() -> int:
    """Return how many processes a launcher started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)
