r"""Cost of a training step of the toy box: the recipe, departures taken back, ways to be faster, more pixels.

    python benchmarks/bench_departures.py                                # the recipe and three departures; a minute
    python benchmarks/bench_departures.py --only default "teachers in bfloat16" "all in bfloat16" "teachers compiled" \
        "64 x 64 renderings" --output benchmarks/results/training_ways_cpu.json

Seconds of the processor, not of the clock, so that other work on the machine counts little: the least of some steps on
one thread, and its parts. Teachers see pictures of their own size, whatever is rendered. docs/toybox.md shows the
departures (results/training_departures_cpu.json) and the ways to be faster (results/training_ways_cpu.json).
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

ASD = ["--distillation.reference", "shifted", "--teachers.richdreamer.eta", "0.1"]
TEACHERS = ("stable_diffusion", "mvdream", "richdreamer")
PIXELS = [
    f"--renderers.{name}.{size}" for name in ("volume", "surface") for size in ("height", "width", "grid_resolution")
]
COMPILED = "teachers compiled"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "default": ("toybox", []),
    "ASD": ("toybox", ASD),
    "ASD, both renderers": ("toybox", [*ASD, "--renderer_schedule", "all"]),
    "toybox_paper": ("toybox_paper", []),
    "teachers in bfloat16": ("toybox", [f"--teachers.{name}.dtype=bfloat16" for name in TEACHERS]),
    "all in bfloat16": ("toybox", ["--mixed_precision", "bf16"]),
    COMPILED: ("toybox", []),
    "64 x 64 renderings": ("toybox", [f"{word}=64" for word in PIXELS]),
}
DEPARTURES = ["default", "ASD", "ASD, both renderers", "toybox_paper"]


def measure(recipe: str, words: list[str], folder: Path, steps: int, *, compiled: bool = False) -> dict[str, float]:
    """Processor seconds of the cheapest of some steps, after one that is not counted: all, and its parts.

    compiled  torch.compile of the teachers' U-Nets, which needs a C++ compiler; its seconds are those of the first step
    """
    import prd.training.objective as judging
    from prd.training.recipes import load_config
    from prd.training.trainer import Trainer

    own = ["--output_dir", str(folder / "run"), "--num_threads", "1", "--report_to", "null"]
    trainer, parts = Trainer(load_config(recipe, [*own, *words])), dict[str, float]()
    if compiled:
        for name in TEACHERS:
            trainer.parts.teachers[name].unet.compile()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*words: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*words, **named)
            finally:
                parts[name] = parts.get(name, 0.0) + time.process_time() - begun

        return run

    student, found = trainer.model, []
    with (
        mock.patch.object(student, "denoise", timed("denoise", student.denoise)),
        mock.patch.object(student, "decode", timed("decode", student.decode)),
        mock.patch.object(trainer.accelerator, "backward", timed("backward", trainer.accelerator.backward)),
        mock.patch.object(judging, "multi_teacher_loss", timed("teachers", judging.multi_teacher_loss)),
    ):
        for step in range(1 + steps):
            parts.clear()
            begun = time.process_time()
            trainer.train_step(step)
            found.append({"all": time.process_time() - begun, **parts})
    best = min(found[1:], key=lambda row: row["all"])
    return {name: round(seconds, 2) for name, seconds in {**best, "first step": found[0]["all"]}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training_departures_cpu.json")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=DEPARTURES, metavar="VARIANT")
    args = parser.parse_args()
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "steps": args.steps, "processor_seconds": {}}
    for name in args.only:
        recipe, words = VARIANTS[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder, compiled = Path(scratch), name == COMPILED
            report["processor_seconds"][name] = measure(recipe, words, folder, args.steps, compiled=compiled)
        print(name, report["processor_seconds"][name], flush=True)
    report["machine"] = describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
