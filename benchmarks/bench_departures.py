"""What a training step of the toy box costs as the recipe stands, and with departures from the paper taken back.

    python benchmarks/bench_departures.py                # four variants; some minutes

Seconds of the processor, not of the clock, so that other work on the machine counts little: the least of some steps on
one thread, and its parts. The JSON goes to benchmarks/results/training_departures_cpu.json; docs/toybox.md shows it.
"""

from __future__ import annotations

import argparse
import functools
import json
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
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "default": ("toybox", []),
    "ASD": ("toybox", ASD),
    "ASD, both renderers": ("toybox", [*ASD, "--renderer_schedule", "all"]),
    "toybox_paper": ("toybox_paper", []),
}


def measure(recipe: str, words: list[str], folder: Path, steps: int) -> dict[str, float]:
    """Processor seconds of the cheapest of some steps, after one that is not counted: all, and its parts."""
    import prd.training.objective as judging
    from prd.training.recipes import load_config
    from prd.training.trainer import Trainer

    own = ["--output_dir", str(folder / "run"), "--num_threads", "1", "--report_to", "null"]
    trainer, parts = Trainer(load_config(recipe, [*own, *words])), dict[str, float]()

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
    return {name: round(seconds, 2) for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training_departures_cpu.json")
    args = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "steps": args.steps, "processor_seconds": {}}
    for name, (recipe, words) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            report["processor_seconds"][name] = measure(recipe, words, Path(scratch), args.steps)
        print(name, report["processor_seconds"][name], flush=True)
    report["machine"] = describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
