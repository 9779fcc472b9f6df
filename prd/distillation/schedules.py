"""Values that change as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSchedule:
    """`start` up to `start_step`, then linear to `end` at `end_step`, constant after it.

    LinearSchedule(500, 20, 0, 20_000)(5_000) == 380.
    """

    start: float
    end: float
    start_step: int
    end_step: int

    def __post_init__(self) -> None:
        if self.end_step <= self.start_step:
            raise ValueError(f"end_step={self.end_step}: must come after start_step={self.start_step}")

    def __call__(self, step: int) -> float:
        """The value at a training step (counted from 0)."""
        share = (step - self.start_step) / (self.end_step - self.start_step)
        share = min(max(share, 0.0), 1.0)
        return (1 - share) * self.start + share * self.end

    @classmethod
    def from_value(cls, value: float | Sequence[float], end_step: int) -> LinearSchedule:
        """From what a YAML file says: a number (constant), or [start, end] from step 0 to `end_step`."""
        if isinstance(value, int | float):
            return cls(value, value, 0, end_step)
        if isinstance(value, str) or len(value) != 2:
            raise ValueError(f"schedule={value!r}: expected a number or [start, end]")
        return cls(value[0], value[1], 0, end_step)
