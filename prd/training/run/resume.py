"""Find the checkpoint that a run continues from, and check that it was trained with the same config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prd.data.prompts import held_out_prompts
from prd.errors import ConfigError
from prd.training.classes import split_given_parts
from prd.training.config import TrainConfig
from prd.training.recipes import from_dict, load_config, to_dict
from prd.training.renamed import renamed
from prd.training.run.checkpoints import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    named_checkpoint,
)

logger = logging.getLogger(__name__)

FREE = frozenset(  # keys and sections that change no number of the training
    ("output_dir", "max_train_steps", "max_train_minutes", "fits", "checkpointing_steps", "checkpoints_total_limit")
    + ("resume_from_checkpoint", "start_afresh", "allow_config_change", "report_to", "num_threads", "validation")
    + ("offload_text_encoders",)
)
SPLIT = frozenset(("train_batch_size", "gradient_accumulation_steps"))  # compared with the processes, as their product


def load_resumed(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint `resume_from_checkpoint` names, whole; None without one, or to start afresh.

    A name that is no folder is looked up in the run folder. Damaged checkpoints are passed over by "latest", with a
    warning. Raises CheckpointError if the one named is damaged, or there is none and `start_afresh` is not set.
    """
    name = config.resume_from_checkpoint
    if name is None:
        return None
    run = Path(config.output_dir)
    if name != "latest":
        return load_checkpoint(named_checkpoint(name, run))
    if path := latest_checkpoint(run):
        return load_checkpoint(path)
    if not config.start_afresh:
        raise CheckpointError(
            f"resume_from_checkpoint='latest': {run} has no checkpoint; leave it out, or pass --start_afresh, to start "
            "from the first step"
        )
    logger.warning("resume_from_checkpoint='latest': %s has no checkpoint; starting from the first step", run)
    return None


def resumed_config(config: TrainConfig, checkpoint: Checkpoint | None, global_batch_size: int) -> TrainConfig:
    """The config with `schedule_steps` settled: as given, else the checkpoint's, else `max_train_steps`.

    The numbers of steps that the checkpoint's run was fitted to (`fits`) go with the checkpoint's `schedule_steps`.

    global_batch_size  prompts per step over all processes and batches; how they are shared out is free to change

    Raises ConfigError listing the keys in which the checkpoint was trained otherwise, unless `allow_config_change`;
    CheckpointError for a checkpoint that holds no config.
    """
    if checkpoint is None:
        return replace(config, schedule_steps=config.schedule_steps or config.max_train_steps)
    if "config" not in checkpoint.state:
        raise CheckpointError(f"checkpoint-{checkpoint.step} does not say how it was trained: not one of a run")
    written, given = split_given_parts(renamed(checkpoint.state["config"], f"checkpoint-{checkpoint.step}"))
    try:
        saved = from_dict(written)
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint-{checkpoint.step}: the config it was trained with is not one of today's ({error}); resume it "
            "with the version of prd that wrote it"
        ) from error
    fits = config.fits
    if config.schedule_steps in (None, saved.schedule_steps):
        fits = config.fits or saved.fits
    config = replace(config, schedule_steps=config.schedule_steps or saved.schedule_steps, fits=fits)
    if config.optimizer.name != saved.optimizer.name:
        raise ConfigError(
            f"optimizer.name={config.optimizer.name!r}: checkpoint-{checkpoint.step} holds the state of "
            f"{saved.optimizer.name!r}; resume with that, or start another run"
        )
    ours, ours_given = split_given_parts(comparable(config))
    given = {key: own for key, own in given.items() if not _is_disabled(key, own)}
    found = differing_keys({**comparable(saved), **given}, {**ours, **ours_given})
    before = checkpoint.state.get("global_batch_size", checkpoint.state.get("prompts_a_step"))  # its name until 0.2
    if before != global_batch_size:
        found.append(f"prompts per step: {before} -> {global_batch_size}")
    if found and not config.allow_config_change:
        raise ConfigError(
            f"resume_from_checkpoint: checkpoint-{checkpoint.step} was trained with another config: "
            f"{'; '.join(found)}; set them back, or pass --allow_config_change"
        )
    if found:
        logger.warning("checkpoint-%d was trained with another config: %s", checkpoint.step, "; ".join(found))
    return config


def comparable(config: TrainConfig) -> dict[str, Any]:
    """A config's plain values without what does nothing: teachers that are disabled, whatever their settings.

    A rule of `prompts.held_out` is written as the texts that it holds out.
    """
    values = to_dict(config)
    values["prompts"]["held_out"] = list(held_out_prompts(config.prompts))
    staged = {name for stage in config.stages for name in stage.get("teachers", {})}
    values["teachers"] = {
        name: own for name, own in values["teachers"].items() if name in config.enabled_teachers or name in staged
    }
    return values


def _is_disabled(key: str, settings: Any) -> bool:
    """Whether a part's settings are those of a teacher that is not asked."""
    return key.startswith("teachers.") and isinstance(settings, Mapping) and settings.get("enabled") is False


def differing_keys(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """ "key: before -> after" for every value that differs and is not free to."""
    before, after = flat(saved), flat(config)
    keys = [key for key in {**before, **after} if not {key, key.partition(".")[0]} & (FREE | SPLIT)]
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in keys
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def departures(config: TrainConfig, recipe: str) -> str:
    """List what a config sets otherwise than a recipe or file: its name, then lines "key: before -> after"."""
    before, after = flat(to_dict(load_config(recipe))), flat(to_dict(config))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "\n".join([f"recipe: {recipe}", *(f"  {key}: {before.get(key)} -> {after.get(key)}" for key in keys)])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def plain(config: dict[str, Any]) -> dict[str, str | float]:
    """A config by dotted key, as trackers take it."""
    return {key: value if isinstance(value, int | float) else str(value) for key, value in flat(config).items()}
