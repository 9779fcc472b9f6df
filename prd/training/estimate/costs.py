"""Seconds, gigabytes and disk of a run from what was counted of its step, on GPUs by their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from prd.rendering.volume import VolumeConfig
from prd.training.config import HALF, TrainConfig
from prd.training.estimate.counts import StepCounts, TeacherCount
from prd.training.optimizers import MOMENTS
from prd.training.parts import offloaded
from prd.training.precision import PRECISIONS
from prd.utils.counting import Work

# Share of a processor's matrix rate that networks reached where they ran (two CPU cores with AMX, bfloat16; written by
# benchmarks/bench_generator.py), by kind of network. That a GPU reaches the same is an assumption.
SHARES = {"unet": 0.38, "autoencoder": 0.71, "renderer": 0.28}
FLOAT32 = "float32"
MAX_RAYS = 4096


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet."""

    name: str
    memory: float  # gigabytes
    half: float  # TFLOP/s of dense tensor cores in bfloat16 and float16, accumulated in float32
    tf32: float  # TFLOP/s of dense tensor cores in TF32, as torch computes convolutions of float32
    fp32: float  # TFLOP/s outside of them, as torch computes matrix products of float32
    bandwidth: float  # terabytes per second
    link: float  # gigabytes per second to a neighbour, each way


H20 = Device("H20 96 GB", 96, 148, 74, 44, 4.0, 450)
DEVICES = (
    Device("RTX 4090 24 GB", 24, 165, 82.6, 82.6, 1.01, 25),
    Device("A100 80 GB", 80, 312, 156, 19.5, 2.04, 300),
    Device("H100 80 GB", 80, 989, 494, 67, 3.35, 450),
    H20,
    Device("H200 141 GB", 141, 989, 494, 67, 4.8, 450),
)


@dataclass(frozen=True)
class Part:
    """A part of a step: its work for one prompt, the precision it is done in, and its kind (a key of `SHARES`)."""

    work: Work
    dtype: str
    kind: str


def renders_per_estimate(config: TrainConfig) -> float:
    """Renderings of an estimate; of renderers that take turns, one."""
    schedule = config.renderer_schedule
    if isinstance(schedule, tuple):
        return len(schedule)
    return len(config.renderers) if schedule == "all" else 1


def step_parts(counts: StepCounts, config: TrainConfig) -> dict[str, Part]:
    """The parts of an optimiser step, for one prompt."""
    s, k, shown = counts.student, config.num_denoising_steps, renders_per_estimate(config)
    student = str(PRECISIONS[config.mixed_precision]).removeprefix("torch.")
    parts = {
        f"student's {s.network}": Part(k * (s.denoise + s.denoise_backward), student, "unet"),
        "student's decoder": Part(k * (s.decode + s.decode_backward), student, "autoencoder"),
    }
    for name, t in counts.teachers.items():
        judged = k * shown
        parts[f"{name}: U-Net, {t.passes} passes"] = Part(judged * t.passes * t.one_pass, t.dtype, "unet")
        if t.encode.total > 1e-3 * t.one_pass.total:
            parts[f"{name}: encoder"] = Part(judged * (t.encode + t.encode_backward), t.dtype, "autoencoder")
    work = sum((r.work for r in counts.renderers.values()), Work())
    parts["renderers"] = Part(k * _turns(counts, config) * work, FLOAT32, "renderer")
    return parts


def _turns(counts: StepCounts, config: TrainConfig) -> float:
    """Share of the renderers that an estimate is shown to."""
    return renders_per_estimate(config) / max(1, len(config.renderers))


def step_seconds(
    counts: StepCounts, config: TrainConfig, device: Device, prompts: int, share: Mapping[str, float] | float
) -> float:
    """One optimiser step of some prompts; plane lookups from memory; nothing overlaps.

    share  of the rates on the data sheet, by kind of part or of all
    """
    seconds = 0.0
    for part in step_parts(counts, config).values():
        reached = share if isinstance(share, float | int) else share[part.kind]
        half = part.dtype != FLOAT32
        convolutions, products = (device.half, device.half) if half else (device.tf32, device.fp32)
        seconds += prompts * (part.work.convolutions / convolutions + part.work.products / products) / reached
    lookups = sum(r.lookup_bytes for r in counts.renderers.values()) * _turns(counts, config)
    return seconds + config.num_denoising_steps * prompts * lookups / (device.bandwidth * 1e12)


def prompts_per_process(config: TrainConfig) -> int:
    """Prompts of an optimiser step that one process takes."""
    return config.train_batch_size * config.gradient_accumulation_steps


# -- memory ------------------------------------------------------------------------------------------------------------


def teacher_bytes(counts: StepCounts, offload: bool, offload_texts: bool = False) -> int:
    """Bytes of the teachers' weights on the device: of the largest, or of all with each text encoder once."""
    teachers = counts.teachers.values()
    if offload:
        return max((t.weight_bytes for t in teachers), default=0)
    texts = {(t.text, t.dtype): t.text_bytes for t in teachers}
    return sum(t.weight_bytes for t in teachers) + (0 if offload_texts else sum(texts.values()))


def memory(counts: StepCounts, config: TrainConfig) -> dict[str, float]:
    """Gigabytes of a process by part; the graph of the estimates at a time, both renderers' and one teacher's work."""
    s, renderers = counts.student, counts.renderers.values()
    prompts = config.train_batch_size * config.rollout_batch_size
    away, offload_texts = config.teacher_options.offload, offloaded(config)["offload_texts"]
    work = [
        s.network_bytes,
        *(t.activation_bytes for t in counts.teachers.values()),
        *(r.backward_bytes for r in renderers),
    ]
    visits = [t.text_bytes for t in counts.teachers.values() if away or offload_texts]  # each for the time of a call
    decoder = s.decoder_bytes * (
        1 if config.model.gradient_checkpointing else prompts
    )  # one plane of all, or every one
    precisions = ", ".join(dict.fromkeys(t.dtype for t in counts.teachers.values()))
    base = ", ".join(dict.fromkeys((config.model.base_dtype or FLOAT32, *([] if offload_texts else [FLOAT32]))))
    student = s.weight_bytes + (0 if offload_texts else s.text_bytes)
    copies = 1 + optimizer_copies(config) + (config.ema_decay is not None)  # the first: the gradient
    return {
        f"student{'' if offload_texts else ' and its text encoder'}, {base}": student / 1e9,
        f"gradients, {config.optimizer.name}": 4 * copies * counts.trained / 1e9,
        f"teachers, {precisions}": teacher_bytes(counts, away, offload_texts) / 1e9,
        "graphs kept": prompts * (s.kept_bytes + sum(r.kept_bytes for r in renderers)) / 1e9,
        "largest at work": max(decoder, prompts * max(work), *visits) / 1e9,
    }


def optimizer_copies(config: TrainConfig) -> int:
    """Tensors of a parameter's size in the optimiser's state: Adan's moments and last gradient, AdamW's two moments."""
    return len(MOMENTS) + 1 if config.optimizer.name == "adan" else 2


@dataclass(frozen=True)
class Switch:
    """A change of a config that lowers its memory: the words that make it, and the config with it.

    exact  whether the numbers of the training stay what they were
    """

    words: str
    config: TrainConfig
    exact: bool = True


def switches(config: TrainConfig) -> list[Switch]:
    """The changes that lower a config's memory and are not made yet, the cheapest first, each on top of the last."""
    found: list[Switch] = []

    def last() -> TrainConfig:
        return found[-1].config if found else config

    def add(words: str, exact: bool = True, **changes: Any) -> None:
        found.append(Switch(words, replace(last(), **changes), exact))

    if not config.model.gradient_checkpointing:
        add("--model.gradient_checkpointing true", model=replace(config.model, gradient_checkpointing=True))
    if not config.teacher_options.checkpoint_vae:
        options = replace(config.teacher_options, checkpoint_vae=True)
        add("--teacher_options.checkpoint_vae true", teacher_options=options)
    own = {n: r for n, r in config.renderers.items() if isinstance(r, VolumeConfig) and r.max_rays is None}
    if own:
        words = " ".join(f"--renderers.{name}.max_rays {MAX_RAYS}" for name in own)
        add(words, renderers={**config.renderers, **{n: replace(r, max_rays=MAX_RAYS) for n, r in own.items()}})
    half = next((dtype for dtype, way in HALF.items() if way == config.mixed_precision), None)
    if half is not None and config.model.base_dtype is None and not config.model.full:
        add(f"--model.base_dtype {half}", model=replace(last().model, base_dtype=half))
    if not offloaded(config)["offload_texts"]:
        add("--offload_text_encoders true", offload_text_encoders=True)
    if config.rollout_batch_size > 1:
        add("--rollout_batch_size 1", rollout_batch_size=1)
    if config.train_batch_size > 1:
        steps = prompts_per_process(config)
        words = f"--train_batch_size 1 --gradient_accumulation_steps {steps}"
        add(words, train_batch_size=1, gradient_accumulation_steps=steps)
    if not config.teacher_options.offload:
        add("--teacher_options.offload true", teacher_options=replace(last().teacher_options, offload=True))
    whole = {n: t for n, t in config.enabled_teachers.items() if t.dtype == FLOAT32}
    if whole:
        words = " ".join(f"--teachers.{name}.dtype float16" for name in whole)
        halved = {name: replace(teacher, dtype="float16") for name, teacher in whole.items()}
        add(words, exact=False, teachers={**config.teachers, **halved})
    return found


def recounted(before: TrainConfig, after: TrainConfig) -> bool:
    """Return True if a change of a config changes what is counted, rather than how often."""
    vae = before.teacher_options.checkpoint_vae != after.teacher_options.checkpoint_vae
    return before.model != after.model or vae or before.renderers != after.renderers


def in_precision(counts: StepCounts, config: TrainConfig) -> StepCounts:
    """The counts with the bytes of teachers whose own `dtype` is another half or whole precision than counted."""
    changed = {
        name: _in_dtype(t, own)
        for name, t in counts.teachers.items()
        if (own := getattr(config.teachers.get(name), "dtype", None)) not in (None, t.dtype)
    }
    return replace(counts, teachers={**counts.teachers, **changed})


def _in_dtype(count: TeacherCount, dtype: str) -> TeacherCount:
    before, after = (getattr(torch, name).itemsize for name in (count.dtype, dtype))
    sizes = {n: getattr(count, n) * after // before for n in ("activation_bytes", "weight_bytes", "text_bytes")}
    return replace(count, dtype=dtype, **sizes)


# -- disk --------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(counts: StepCounts, config: TrainConfig) -> int:
    """Bytes of one checkpoint: trained weights, the optimiser's state, the average of the weights if there is one."""
    return 4 * counts.trained * (1 + optimizer_copies(config) + (config.ema_decay is not None))


def checkpoints_at_once(config: TrainConfig) -> int:
    """Most checkpoints that lie in the run folder: those kept, and the one that is being written."""
    written = -(-config.max_train_steps // config.checkpointing_steps)
    kept = written if config.checkpoints_total_limit is None else min(written, config.checkpoints_total_limit)
    return kept + 1


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
