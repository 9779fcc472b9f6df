"""`prd train --dry-run`: what a run would need, from its config alone; loads no weights and writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prd.errors import ConfigError
from prd.generators.triplane_turbo import TriplaneTurboConfig
from prd.hub.shipped import HUB_ID
from prd.training.config import TrainConfig
from prd.training.estimate.architectures import base_architecture, folder_of
from prd.training.estimate.costs import (
    DEVICES,
    FLOAT32,
    SHARES,
    Switch,
    checkpoint_bytes,
    checkpoints_at_once,
    grid,
    in_precision,
    memory,
    prompts_per_process,
    recounted,
    step_parts,
    step_seconds,
    switches,
)
from prd.training.estimate.counts import StepCounts, count_step
from prd.training.run.folder import run_faults

RESERVE = 1.5  # gigabytes of a GPU that its context and fragmentation take


@dataclass(frozen=True)
class Remedy:
    """Switches that make a run fit, and the gigabytes that it then takes; `fits` is False if all together do not."""

    switches: tuple[Switch, ...]
    gigabytes: float
    fits: bool

    def __str__(self) -> str:
        words = " ".join(switch.words for switch in self.switches)
        if not self.fits:
            return f"does not fit, with every switch {self.gigabytes:.1f} GB"
        inexact = [switch.words for switch in self.switches if not switch.exact]
        note = "" if not inexact else f" ({' '.join(inexact)} changes the numbers)"
        return f"{words}: {self.gigabytes:.1f} GB{note}"


def dry_run(config: TrainConfig) -> str:
    """The report of a run: parameters, memory, time, disk, and what is missing.

    Raises ConfigError for a model that is not TriplaneTurbo, whose networks alone are counted.
    """
    if not isinstance(config.model, TriplaneTurboConfig):
        raise ConfigError(
            f"model.class: --dry-run counts triplane_turbo alone, not {type(config.model).__name__}; leave it out"
        )
    counts = count_step(config)
    blocks = [_parameters(counts, config), _memory(counts, config), _time(counts, config), _disk(counts, config)]
    return "\n\n".join([*blocks, _missing(config, counts)])


def _parameters(counts: StepCounts, config: TrainConfig) -> str:
    rows = [["trained: adapters, heads", f"{counts.student.trained:,}", "float32"]]
    if counts.background:
        rows.append(["trained: background", f"{counts.background:,}", "float32"])
    source = base_architecture(config.model.base).source
    rows.append(
        [
            "frozen: student's base, text encoder",
            f"{counts.student.frozen:,}",
            f"{config.model.base_dtype or FLOAT32} ({source})",
        ]
    )
    rows += [
        [f"frozen: {name}, with text encoder", f"{t.parameters:,}", f"{t.dtype} ({t.source})"]
        for name, t in counts.teachers.items()
    ]
    note = [f"Not counted: {', '.join(counts.uncounted)}."] if counts.uncounted else []
    return "\n".join(["Parameters", grid(["", "number", "precision"], rows), *note])


# -- memory ------------------------------------------------------------------------------------------------------------


def this_device() -> tuple[str, float]:
    """Name and gigabytes of what a process would train on: its GPU, else main memory."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.name, device.total_memory / 1e9
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return "this machine's main memory, no GPU", total / 1e9


def total_memory(counts: StepCounts, config: TrainConfig) -> float:
    """Gigabytes of a process, with what a GPU's context takes."""
    return sum(memory(counts, config).values()) + RESERVE


def remedy(counts: StepCounts, config: TrainConfig, gigabytes: float) -> Remedy:
    """The fewest switches, the cheapest first, with which a run fits."""
    size, taken, before = total_memory(counts, config), list[Switch](), config
    for switch in switches(config):
        if size <= gigabytes:
            break
        if recounted(before, switch.config):
            counts = count_step(switch.config)
        counts, before = in_precision(counts, switch.config), switch.config
        smaller = total_memory(counts, switch.config)
        taken, size = [*taken, switch], smaller
    return Remedy(tuple(taken), size, size <= gigabytes)


def _memory(counts: StepCounts, config: TrainConfig) -> str:
    parts = memory(counts, config)
    rows = [[part, f"{size:.1f}"] for part, size in parts.items()]
    rows += [["context, fragmentation", f"{RESERVE:.1f}"], ["all", f"{total_memory(counts, config):.1f}"]]
    prompts = f"{config.train_batch_size} prompts at a time" if config.train_batch_size > 1 else "1 prompt at a time"
    lines = [f"Memory of a process, GB, {prompts}", grid(["", "GB"], rows)]
    return "\n".join([*lines, _fit_here(counts, config)])


def _fit_here(counts: StepCounts, config: TrainConfig) -> str:
    """Whether a process fits this machine; without a GPU what is offloaded is in the same memory."""
    name, size = this_device()
    if torch.cuda.is_available():
        return f"{name}, {size:.0f} GB: {_verdict(counts, config, size)}"
    options = replace(config.teacher_options, offload=False)
    needed = total_memory(counts, replace(config, offload_text_encoders=False, teacher_options=options))
    verdict = "fits" if needed <= size else "does not fit"
    return f"{name}, {size:.0f} GB: {needed:.1f} GB, offloaded parts included: {verdict}"


def _verdict(counts: StepCounts, config: TrainConfig, gigabytes: float) -> str:
    if total_memory(counts, config) <= gigabytes:
        return "fits"
    found = remedy(counts, config, gigabytes)
    return f"does not fit; {found}" if found.fits else str(found)


# -- time, disk --------------------------------------------------------------------------------------------------------


def _time(counts: StepCounts, config: TrainConfig) -> str:
    prompts, steps = prompts_per_process(config), config.max_train_steps
    parts = step_parts(counts, config)
    rows = [[part, f"{prompts * own.work.total:.4g}", own.dtype] for part, own in parts.items()]
    rows.append(["all", f"{prompts * sum(own.work.total for own in parts.values()):.4g}", ""])
    blocks = [f"TFLOP of a step in one process, {prompts} prompts", grid(["", "TFLOP", "precision"], rows)]
    rows = []
    for device in DEVICES:
        bound, measured = (step_seconds(counts, config, device, prompts, share) for share in (1.0, SHARES))
        hours = f"{bound * steps / 3600:.1f} to {measured * steps / 3600:.1f}"
        seconds, verdict = f"{bound:.3g} to {measured:.3g}", _verdict(counts, config, device.memory)
        rows.append([device.name, seconds, hours, verdict])
    title = f"Seconds per step and hours of {steps:,} steps: all at its peak, and at the shares measured on a CPU"
    blocks += [title, grid(["GPU, one per process", "s per step", "hours", "memory"], rows)]
    if config.max_train_minutes is not None:
        blocks.append(f"max_train_minutes={config.max_train_minutes:g}: steps are fitted to it, and no more is taken.")
    wanted = config.global_batch_size
    if wanted is not None and wanted != prompts:
        processes = f"{wanted / prompts:g} processes" if wanted % prompts == 0 else "another train_batch_size"
        more = config.gradient_accumulation_steps * wanted // prompts
        blocks.append(
            f"global_batch_size={wanted}: needs {processes} of {prompts} prompts; one process alone takes "
            f"{prompts}, or {wanted} in {wanted / prompts:g} times the hours with --gradient_accumulation_steps {more}."
        )
    return "\n".join(blocks)


def _disk(counts: StepCounts, config: TrainConfig) -> str:
    one, number = checkpoint_bytes(counts, config), checkpoints_at_once(config)
    folder = Path(config.output_dir).absolute()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    free, need = shutil.disk_usage(there).free, one * number + 4 * counts.trained
    verdict = "enough" if free > need else f"not enough for {need / 1e9:.1f} GB"
    return (
        f"Disk\n{number} checkpoints of {one / 1e6:.0f} MB at once (one is being written), the adapter "
        f"{4 * counts.trained / 1e6:.0f} MB; {free / 1e9:.1f} GB free in {there}: {verdict}"
    )


# -- what is missing ---------------------------------------------------------------------------------------------------


def _missing(config: TrainConfig, counts: StepCounts) -> str:
    faults, fetched = run_faults(config), list(_fetched(config))
    lines = [f"- {fault}" for fault in faults]
    lines += [f"- {place}: not on this machine; the Hub is asked for it" for place in fetched]
    return "\n".join(["Missing", *lines]) if lines else "Missing\nnothing"


def _fetched(config: TrainConfig) -> Iterator[str]:
    """Models that are to come from the Hub."""
    places = {"model.base": (config.model.base, "base")}
    for name, teacher in config.enabled_teachers.items():
        own = {key: getattr(teacher, key, None) for key in ("path", "adapter")}
        places |= {f"teachers.{name}.{key}": (place, name) for key, place in own.items() if place is not None}
    for key, (place, part) in places.items():
        if folder_of(place, part) is None and not Path(place).exists() and HUB_ID.fullmatch(place):
            yield f"{key}={place!r}"
