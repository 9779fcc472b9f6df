"""Cost of a training step of the toy box, part by part, and against the sketch it grew from.

    python benchmarks/bench_training.py                                    # our step with its profile; a minute
    python benchmarks/bench_training.py --sketch FOLDER                    # and the sketch's, step about: minutes
    python benchmarks/bench_training.py --sketch FOLDER --steps 2 --warmup 1     # a smoke run; its figures mean nothing

FOLDER holds the sketch's `train_s.py`. Both train networks of the same sizes with the same batch, K, resolution
and renderer (the volume renderer: the sketch has no other), the same three teachers and as many threads; what the toy
box's weights are changes no time. The sketch runs in a process of its own and takes a step only when told to, so that
the two take turns and a busy machine slows both alike. JSON goes to benchmarks/results/training_toy_cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

BAR = 0.5  # ours over the sketch's, at most

# The sketch as it stands, with random weights in the place of its trained ones and without its cache of pictures: its
# optimiser's step is where it says how long the step took and waits for the word to go on.
DRIVER = """
import os, runpy, sys, time
folder, threads = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, folder)
os.environ["NOEV"] = "1"
import torch
torch.set_num_threads(threads)
torch.manual_seed(0)
import nets, world
place = os.environ["SPD"]
unet, text, vae = nets.make_unet(), nets.make_text(), nets.make_vae()
torch.save((vae.state_dict(), 1.0), place + "vae.pt")
torch.save((unet.state_dict(), text.state_dict()), place + "sd.pt")
torch.save((nets.make_unet(True).state_dict(),), place + "mv.pt")
torch.save((nets.make_nd().state_dict(), nets.make_text().state_dict()), place + "nd.pt")
world.build = lambda: {name: torch.zeros(1) for name in world.SHAPES}
inner, state = torch.optim.AdamW.step, {}
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

def step(self, *words, **named):
    out = inner(self, *words, **named)
    now = time.perf_counter()
    trained = sum(p.numel() for group in self.param_groups for p in group["params"])
    answers.write(f"{now - state.get('begun', now)} {trained}\\n")
    answers.flush()
    if sys.stdin.readline().strip() != "go":
        os._exit(0)
    state["begun"] = time.perf_counter()
    return out

torch.optim.AdamW.step = step
sys.argv = ["train_s.py", "--threads", str(threads), *sys.argv[3:]]
runpy.run_path(os.path.join(folder, "train_s.py"), run_name="__main__")
"""


class Sketch:
    """The sketch's training in another process, a step at a time."""

    def __init__(self, folder: Path, scratch: Path, threads: int, batch: int) -> None:
        if not (folder / "train_s.py").is_file():
            raise SystemExit(f"--sketch {folder}: holds no train_s.py")
        driver = scratch / "driver.py"
        driver.write_text(DRIVER, encoding="utf-8")
        # the same losses as ours: the estimate itself as reference, every teacher on; no end within the run
        options = ["--B", str(batch), "--K", "4", "--N", "40", "--mode", "sds", "--iters", "1000000", "--rgs", "0.1"]
        self.process = subprocess.Popen(
            [sys.executable, str(driver), str(folder), str(threads), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env={**os.environ, "SPD": f"{scratch}/", "OMP_NUM_THREADS": str(threads)},
        )
        self.parameters = self.answer()[1]  # of the first step, which has no beginning

    def answer(self) -> tuple[float, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the sketch ended: see what it wrote above")
        seconds, parameters = line.split()
        return float(seconds), int(parameters)

    def step(self) -> float:
        """Seconds of one optimiser step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def make_trainer(folder: Path, batch: int, renderers: str, threads: int) -> Any:
    """The toy box's recipe in a folder of its own."""
    from prd.training.recipes import load_config
    from prd.training.trainer import Trainer

    words = ["--output_dir", str(folder / "run"), "--train_batch_size", str(batch), "--renderer_schedule", renderers]
    return Trainer(load_config("toybox", [*words, "--num_threads", str(threads), "--report_to", "null"]))


def profiled(trainer: Any, step: int) -> dict[str, float]:
    """Seconds of the parts of one step; each is entered from outside only once, so that they add up."""
    parts: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*words: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*words, **named)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - begun

        return run

    from unittest import mock

    import prd.training.objective as judging

    student, text = trainer.model, trainer.parts.text_encoder
    patches = [
        mock.patch.object(student, "denoise", timed("student: U-Net", student.denoise)),
        mock.patch.object(student, "decode", timed("student: decoder", student.decode)),
        mock.patch.object(trainer.accelerator, "backward", timed("backward", trainer.accelerator.backward)),
        mock.patch.object(trainer.optimizer, "step", timed("optimizer", trainer.optimizer.step)),
        mock.patch.object(judging, "multi_teacher_loss", timed("teachers", judging.multi_teacher_loss)),
        mock.patch.object(text, "encode", timed("text", text.encode)),
    ]
    for patch in patches:
        patch.start()
    begun = time.perf_counter()
    try:
        trainer.train_step(step)
    finally:
        for patch in patches:
            patch.stop()
    total = time.perf_counter() - begun
    parts["rendering and the rest"] = total - sum(parts.values())
    return {**parts, "all": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketch", type=Path, help="folder of the sketch's train_s.py; default: not compared")
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training_toy_cpu.json")
    args = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "batch": args.batch, "K": 4, "steps": args.steps}
    with tempfile.TemporaryDirectory() as scratch:
        if args.sketch is not None:
            report["against_the_sketch"] = compare(args, Path(scratch))
        trainer = make_trainer(Path(scratch) / "recipe", args.batch, "alternate", args.threads)
        for step in range(args.warmup):
            trainer.train_step(step)
        plain = [trainer.train_step(step)["seconds"] for step in range(args.warmup, args.warmup + args.steps)]
        rows = [profiled(trainer, args.warmup + args.steps + i) for i in range(args.steps)]
    names = dict.fromkeys(name for row in rows for name in row)
    report["recipe"] = {
        "renderers": "alternate",
        "least_seconds": min(plain),
        "median_seconds": statistics.median(plain),
        "profile_median_seconds": {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names},
    }
    report["machine"] = describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Ours and the sketch's step, step about: the volume renderer alone, the same batch and K."""
    trainer = make_trainer(scratch, args.batch, "volume", args.threads)
    sketch = Sketch(args.sketch.resolve(), scratch, args.threads, args.batch)
    ours, theirs = [], []
    try:
        for step in range(args.warmup + args.steps):
            torch.set_num_threads(args.threads)
            ours.append(trainer.train_step(step)["seconds"])
            theirs.append(sketch.step())
    finally:
        sketch.close()
    ours, theirs = ours[args.warmup :], theirs[args.warmup :]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "renderers": "volume",
        "ours": {"least_seconds": min(ours), "median_seconds": statistics.median(ours)},
        "sketch": {"least_seconds": min(theirs), "median_seconds": statistics.median(theirs)},
        "trained_parameters": {"ours": sum(p.numel() for p in trainer.parameters), "sketch": sketch.parameters},
        "ratio_least": min(ours) / min(theirs),
        "ratio_median_of_turns": ratio,
        "bar": BAR,
        "met": ratio <= BAR,
    }


if __name__ == "__main__":
    main()
