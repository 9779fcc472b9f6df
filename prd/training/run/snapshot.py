"""Snapshot of a run, which its checkpoints hold: all that the next optimiser step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from prd.training.recipes import to_dict
from prd.training.run.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

if TYPE_CHECKING:
    from prd.training.trainer import Trainer


def save_trainer(trainer: Trainer, step: int) -> Path:
    """Write `checkpoint-{step}` of a trainer that has done `step` steps; to be called by every process."""
    tensors, plain = optimizer_state(trainer.optimizer)
    groups = {trainer.model.folder_name: trainer.model.trained_state_dict(), "optimizer": tensors}
    if trainer.background is not None:
        groups["background"] = trainer.background.state_dict()
    if trainer.average is not None:
        groups["average"] = trainer.average.state_dict()
    for process, state in enumerate(gather_object([rng_state()])):
        groups[f"rng-{process}"] = state
    scaler = trainer.accelerator.scaler
    values = {
        "optimizer": plain,
        "scaler": None if scaler is None else scaler.state_dict(),
        "config": to_dict(trainer.plan.config),
        "global_batch_size": trainer.global_batch_size,
        "prompts_drawn": trainer.prompts_drawn(step),  # the position in the corpus
        "skipped_total": trainer.skipped.total,
        "frames": trainer.frames,
        "teacher_passes": trainer.passes.total,
        "minutes": trainer.clock.minutes_of_run(),
        "best_spread": trainer.validation.watch.best,
    }
    if trainer.fakes is not None:
        trainer.fakes.save(groups, values)
    if trainer.accelerator.is_main_process:
        save_checkpoint(trainer.folder, step, groups, values, total_limit=trainer.config.checkpoints_total_limit)
    return trainer.folder / f"checkpoint-{step}"


def restore_trainer(trainer: Trainer, checkpoint: Checkpoint) -> int:
    """Put a trainer of the same config where it was when the checkpoint was written; returns the steps done.

    Raises CheckpointError if the checkpoint lacks what the config asks for.
    """
    tensors, state = checkpoint.tensors, checkpoint.state
    trainer.model.load_trained_state_dict(tensors[trainer.model.folder_name])
    trainer.enter(trainer.plan.stage_at(max(0, checkpoint.step - 1)))  # whose optimiser was saved
    if trainer.background is not None:
        if "background" not in tensors:
            raise CheckpointError("the checkpoint holds no background; resume without text_background")
        trainer.background.load_state_dict(tensors["background"], strict=True)
    load_optimizer_state(trainer.optimizer, tensors["optimizer"], state["optimizer"])
    if trainer.average is not None:
        if "average" not in tensors:
            raise CheckpointError("the checkpoint holds no averaged weights; resume without ema_decay")
        trainer.average.load_state_dict(tensors["average"])
    if trainer.fakes is not None:
        trainer.fakes.restore(tensors, state)
    if (scaler := trainer.accelerator.scaler) is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    if own := tensors.get(f"rng-{trainer.accelerator.process_index}"):  # none for a process that has joined
        set_rng_state(own)
    trainer.first, trainer.first_prompt = checkpoint.step, state["prompts_drawn"]
    trainer.skipped.total, trainer.frames = state["skipped_total"], state["frames"]
    trainer.passes.total = state.get("teacher_passes", 0)  # none until 0.2
    trainer.validation.watch.best, trainer.clock.minutes_before = state["best_spread"], state["minutes"]
    trainer.follow_plan(checkpoint.step)
    trainer.resumed = None  # its tensors are no longer needed
    return checkpoint.step
