"""From gradients that were accumulated to those that the optimiser takes: exchange, clip, and steps left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from prd.training.diagnostics import NonFiniteDiagnostics, record_skipped

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10  # steps in a row without a finite gradient
NOT_FINITE = "the gradient is not finite"


def exchange_gradients(
    accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], wishes: Mapping[str, bool]
) -> tuple[Tensor | None, str | None]:
    """Average the accumulated gradients over the processes, in one exchange per step.

    wishes  reasons to stop by name, each with whether this process wants to stop for it; they travel along, so that
            all processes stop at the same step

    Returns this process's own gradient in one piece (None for a process alone), and the first reason to stop that any
    process has (None without one).
    """
    own = None
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient  # also alone: the optimizer must not skip here what it updates among several processes
    if accelerator.num_processes > 1:
        flags = gradients[0].new_tensor([float(wish) for wish in wishes.values()])
        whole = torch.cat([*(g.flatten() for g in gradients), flags])  # large models have no room for another copy
        own = whole[: len(whole) - len(flags)]
        mean = accelerator.reduce(whole, reduction="mean")
        *parts, flags = mean.split([p.numel() for p in parameters] + [len(flags)])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
        wishes = dict(zip(wishes, (flags > 0).tolist(), strict=True))
    return own, next((why for why, wished in wishes.items() if wished), None)


def spoil_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Set every gradient to NaN: the exchange then makes every process skip the step that failed in this one."""
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))


@dataclass
class SkippedSteps:
    """Steps that were left out because their gradient was not finite.

    folder  the run folder, where each is recorded in `skipped.jsonl`
    """

    accelerator: Accelerator
    folder: Path
    in_a_row: int = 0
    total: int = 0  # in this run

    def taken(self) -> None:
        """Note a step with a finite gradient."""
        self.in_a_row = 0

    def skip(self, step: int, reason: str, own: Tensor | None, diagnostics: NonFiniteDiagnostics) -> None:
        """Count a step and record its prompts; FloatingPointError after `MOST_SKIPPED` steps in a row.

        own  this process's gradient before the exchange, which tells whether it spoiled the step; None: a process alone
        """
        self.in_a_row += 1
        self.total += 1
        if own is None or not bool(torch.isfinite(own).all()):
            suspects = diagnostics.suspects(reason)
            said = record_skipped(self.folder, step, self.accelerator.process_index, suspects)
            logger.warning("step %d: %s; the step was skipped: %s", step, reason, said)
        if self.in_a_row >= MOST_SKIPPED and not scale_is_high(self.accelerator):
            raise FloatingPointError(
                f"step {step}: {self.in_a_row} steps in a row had no finite gradient; lower optimizer.lr "
                "(with --allow_config_change)"
            )


def scale_is_high(accelerator: Accelerator) -> bool:
    """Return True if fp16's loss scale can still be lowered: until then a gradient that overflows is expected."""
    scaler = accelerator.scaler
    return scaler is not None and scaler.get_scale() > 1
