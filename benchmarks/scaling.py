"""Cost of a training step at Stable Diffusion 2.1's size, from counted operations and measured parts.

    python benchmarks/scaling.py --count      # count anew: a minute on a CPU, 4 GB; then write the tables
    python benchmarks/scaling.py              # the counts kept, the measured parts read anew: seconds

The counts are those of `prd train --dry-run` (`prd.training.estimate`): networks on the meta device, by running the
trainer's own calls of the student and of every teacher, backward passes and recomputation included; renderers by
running a few rays on the CPU. They go to benchmarks/results/training_sd21_counts.json, the tables between the markers
in docs/scaling.md. All times are estimates: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

from pydantic import TypeAdapter

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

from prd.training.config import TrainConfig  # noqa: E402
from prd.training.estimate.costs import (  # noqa: E402
    DEVICES,
    H20,
    SHARES,
    grid,
    memory,
    prompts_per_process,
    step_parts,
    step_seconds,
    teacher_bytes,
)
from prd.training.estimate.counts import StepCounts, count_step  # noqa: E402
from prd.training.recipes import load_config  # noqa: E402

COUNTS, RESULTS = "training_sd21_counts.json", HERE / "results"
GENERATOR = "generator_sd21_bf16_cpu.json"  # measured parts
DOCUMENT, BEGIN, END = HERE.parent / "docs" / "scaling.md", "<!-- tables -->", "<!-- end of tables -->"
RECIPE = "triplane_turbo_sd21"
THREE = ("stable_diffusion", "mvdream", "richdreamer")
HALF = ("--mixed_precision=bf16", "--model.base_dtype=bfloat16", *(f"--teachers.{name}.dtype=null" for name in THREE))
PAPER_HOURS = 40  # paper 4.1, on 8 H20
ETHERNET = 25 / 8  # gigabytes per second between machines: 25 Gbit/s


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def counted() -> tuple[StepCounts, StepCounts]:
    """The counts kept: of the recipe as it is, and in half precision."""
    kept, reader = load(COUNTS), TypeAdapter(StepCounts)
    return reader.validate_python(kept["released"]), reader.validate_python(kept["half"])


def configs() -> tuple[TrainConfig, TrainConfig]:
    """The recipe as it is, and in half precision."""
    return load_config(RECIPE), load_config(RECIPE, HALF)


def shares(measured: dict[str, Any]) -> dict[str, float]:
    """Share of the processor's own matrix rate that the networks reached where they were measured, by kind."""
    reached, best = measured["pipeline"]["floor_seconds"], measured["pipeline"]["best"]
    return {
        "unet": reached["step"] / min(best["steps"]),
        "autoencoder": reached["decode"] / best["decode"],
        "renderer": reached["isosurface"] / best["isosurface"],
    }


def paper_share(counts: StepCounts, config: TrainConfig) -> float:
    """The one share at which the paper's run would take the paper's time, its lookups at full bandwidth; at most 1."""
    low, high = 1e-3, 1.0
    target = PAPER_HOURS * 3600 / config.max_train_steps
    for _ in range(60):
        middle = (low * high) ** 0.5
        slow = step_seconds(counts, config, H20, prompts_per_process(config), middle) > target
        low, high = (middle, high) if slow else (low, middle)
    return low


def exchange_seconds(size: float, processes: int, rate: float) -> float:
    """A ring all-reduce of `size` bytes at `rate` gigabytes per second each way."""
    return 2 * (processes - 1) / processes * size / (rate * 1e9)


def operations(counts: StepCounts, config: TrainConfig) -> str:
    parts = step_parts(counts, config)
    total = sum(part.work.total for part in parts.values())
    rows = [
        [name, f"{part.work.total:.1f}", f"{part.work.total / total:.0%}", part.dtype, f"{SHARES[part.kind]:.2f}"]
        for name, part in parts.items()
    ]
    rows.append(["all", f"{total:.1f}", "", "", ""])
    return grid(["part", "TFLOP", "of all", "precision", "share of the matrix rate, measured (CPU)"], rows)


def times(counts: StepCounts, config: TrainConfig) -> str:
    prompts, paper = prompts_per_process(config), paper_share(counts, config)
    rows = []
    for device in DEVICES:
        row = [device.name]
        for share in (1.0, SHARES, paper):
            seconds = step_seconds(counts, config, device, prompts, share)
            row.append(f"{seconds:.1f} s, {seconds * config.max_train_steps / 3600:.0f} h")
        rows.append(row)
    columns = ["bound: all at its peak", "at the shares measured", f"at {paper:.2f}, the paper's hours"]
    return grid(["GPU", *columns], rows)


def gigabytes(counts: StepCounts, config: TrainConfig) -> str:
    one = dataclasses.replace(config, train_batch_size=1)
    options = dataclasses.replace(config.teacher_options, offload=True)
    lean = dataclasses.replace(one, teacher_options=options, offload_text_encoders=True)
    columns = [memory(counts, own) for own in (one, lean, config)]
    names = [" / ".join(dict.fromkeys(row)) for row in zip(*columns, strict=True)]
    parts = zip(names, *(column.values() for column in columns), strict=True)
    rows = [[name, *(f"{size:.1f}" for size in sizes)] for name, *sizes in parts]
    rows.append(["all", *(f"{sum(column.values()):.1f}" for column in columns)])
    return grid(["", "1 prompt", "1 prompt, `teacher_options.offload`, `offload_text_encoders`", "2 prompts"], rows)


def tables() -> str:
    """The tables of docs/scaling.md."""
    (released, half), (config, lean) = counted(), configs()
    prompts, k = prompts_per_process(config), config.num_denoising_steps
    blocks = [f"**Operations** of one step for one prompt (K = {k}, both renderers)."]
    blocks.append(operations(released, config))
    title = f"of {config.max_train_steps} steps with {prompts} prompts per GPU"
    blocks += [f"**Seconds per step** and hours {title}, in the released precision.", times(released, config)]
    blocks += ["The same with `mixed_precision: bf16` for the student and all teachers.", times(half, lean)]
    blocks += ["**Memory** per process, gigabytes, in the released precision.", gigabytes(released, config)]
    blocks += [
        "The same with `mixed_precision: bf16` for all teachers, and `model.base_dtype: bfloat16`.",
        gigabytes(half, lean),
    ]
    moved = prompts * k * len(config.renderers) * teacher_bytes(half, offload=False, offload_texts=True)
    blocks.append(
        f"`teacher_options.offload` copies {moved / 1e9:.0f} GB per step to a GPU that takes {prompts} prompts "
        f"one at a time in half precision: {moved / 1e9 / DEVICES[0].link:.1f} s more at {DEVICES[0].link} GB/s."
    )
    size = 4 * released.trained
    blocks.append(f"**Exchange**: {size / 1e6:.1f} MB of float32 gradients per step; a ring all-reduce.")
    rows = []
    step = step_seconds(half, lean, DEVICES[2], prompts, SHARES)
    for name, processes, rate in (
        ("8 GPUs, NVLink 450 GB/s", 8, 450.0),
        ("8 GPUs, PCIe 25 GB/s", 8, 25.0),
        ("2 x 8 GPUs, 25 Gbit/s Ethernet", 16, ETHERNET),
        ("8 x 8 GPUs, 25 Gbit/s Ethernet", 64, ETHERNET),
    ):
        seconds = exchange_seconds(size, processes, rate)
        rows.append([name, f"{1e3 * seconds:.1f} ms", f"{seconds / (seconds + step):.1%}"])
    blocks.append(grid(["", "per step", "of an H100's step (half precision, at the shares measured)"], rows))
    return "\n\n".join(blocks)


def write_tables(document: Path = DOCUMENT) -> None:
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count anew before writing the tables")
    args = parser.parse_args()
    if args.count:
        released, half = (dataclasses.asdict(count_step(config)) for config in configs())
        kept = {"machine": describe(), "released": released, "half": half}
        (RESULTS / COUNTS).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_tables()
    print(DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0])


if __name__ == "__main__":
    main()
