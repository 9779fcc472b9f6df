"""The generators side by side on the toy box, and what their papers claim of them.

    python benchmarks/bench_generators.py --folder runs/generators                 # hours: every run, two at a time
    python benchmarks/bench_generators.py --folder runs/generators --only AToM ATT3D --steps_scale 0.02   # a smoke run

Every run sees single objects alone (38 seen, 10 held out). Cost is the number of frames rendered a training prompt
(ATT3D, section 4.1.2). A run that is complete in the folder is not made again. Writes results/generators.json with the
scores of the runs (of every checkpoint of the four generators side by side), and docs/generators: the tables, the
curves and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

from prd.evaluation.comparison import Measured, at_frames, curves, markdown_table, measure_run, side_by_side  # noqa: E402
from prd.toybox.world import COLORS, SHAPES  # noqa: E402
from prd.utils.files import write_atomic  # noqa: E402

SINGLES = ["--prompts.stack_fraction", "0", "--prompts.open_fraction", "0"]
VOLUME, SURFACE = (
    ["--stages", "[]", "--renderer_schedule", "[volume]"],
    ["--stages", "[]", "--renderer_schedule", "[surface]"],
)
LATTE3D_STAGES = """[
  {{name: pretraining, until: 0.1, library: {{annealing: 0, reconstruction: 1000}},
   teachers: {{stable_diffusion: {{enabled: false}}, mvdream: {{enabled: false}}}}}},
  {{name: geometry, until: 0.5, library: {{annealing: {annealing}, alpha: {alpha}}},
   teachers: {{stable_diffusion: {{enabled: false}}}}}},
  {{name: text, until: 0.8, library: {{annealing: 1, alpha: {alpha}}},
   teachers: {{stable_diffusion: {{enabled: false}}}}}},
  {{name: texture, until: 1, renderer_schedule: [surface], trainable: [texture], library: {{annealing: 1}},
   teachers: {{stable_diffusion: {{weight: 0.1, controlnet: toybox}}}}}}]"""


def latte3d(annealing: str, alpha: float) -> list[str]:
    """LATTE3D's recipe with another annealing in its second stage and another weight of the mask loss."""
    return ["--stages", LATTE3D_STAGES.format(annealing=annealing, alpha=alpha)]


# half of the compositions: every colour and every shape is seen, each pair of neighbours once
HALF = [f"a {c} {s}" for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if (i + j) % 2]
PER_PROMPT = ("a red cube", "a cyan mug", "a yellow wedge", "a purple cone", "a green arrow", "a blue torus")
ONE = ["--max_train_steps", "126", "--train_batch_size", "1"]  # as many frames as the amortized run renders a prompt

RUNS: dict[str, tuple[str, list[str]]] = {
    "AToM": ("atom_toybox", []),
    "ATT3D": ("att3d_toybox", []),
    "LATTE3D": ("latte3d_toybox", []),
    "PRD": ("toybox", [*SINGLES, "--max_train_steps", "300"]),
    "AToM, mesh stage alone": ("atom_toybox", SURFACE),
    "AToM, volume stage alone": ("atom_toybox", VOLUME),
    "AToM's stage 1 with ATT3D's encoding": (
        "att3d_toybox",
        ["--model.representation", "sdf", "--regularizers.eikonal", "[25, 0]"],
    ),
    "AToM, half of the compositions": ("atom_toybox", ["--prompts.held_out", json.dumps(HALF)]),
    "LATTE3D without mask loss": ("latte3d_toybox", latte3d("[0, 1]", 0.0)),
    "LATTE3D, dummy from the second stage": ("latte3d_toybox", latte3d("1", 0.3)),
    **{
        f"AToM for {prompt!r} alone": ("atom_toybox", [*ONE, "--prompts.texts", f"[{prompt}]"]) for prompt in PER_PROMPT
    },
}
SIDE_BY_SIDE = ("PRD", "AToM", "ATT3D", "LATTE3D")
SHOWN = [*PER_PROMPT, "a blue wedge", "a green mug", "a red arrow"]  # the last three are held out


def place(folder: Path, name: str) -> Path:
    """The run folder of a run."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def train(name: str, args: argparse.Namespace) -> None:
    """Make a run in a process of its own, unless it is complete."""
    recipe, overrides = RUNS[name]
    run = place(args.folder, name)
    if (run / "scores.json").is_file():
        return
    words = ["--config", recipe, "--output_dir", str(run), "--num_threads", str(args.threads), "--report_to", "null"]
    words += ["--checkpoints_total_limit", "null", "--validation.every_steps", "null", "--validation.stacks", "1"]
    words += ["--max_train_minutes", "null", *overrides]
    steps = round(args.steps_scale * recipe_steps(recipe, overrides))
    words += ["--max_train_steps", str(max(4, steps)), "--checkpointing_steps", str(max(1, steps // args.points))]
    if (run / "metrics.jsonl").is_file():
        words += ["--resume_from_checkpoint", "latest", "--start_afresh"]
    args.folder.mkdir(parents=True, exist_ok=True)
    with (args.folder / f"{run.name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "prd.cli", "train", *words], stdout=log, stderr=log, cwd=HERE.parent
        )
    print(f"{name}: {'trained' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)


def one_prompt(name: str) -> bool:
    """Whether a run is one for a single prompt."""
    return "--prompts.texts" in RUNS[name][1]


def made(name: str, args: argparse.Namespace) -> list[Measured]:
    """Make a run and measure it; a run for one prompt has measured itself."""
    train(name, args)
    if one_prompt(name):
        return []
    return measure_run(place(args.folder, name), name, last=None if name in SIDE_BY_SIDE else 1)


def recipe_steps(recipe: str, overrides: list[str]) -> int:
    """The optimiser steps that a run is to take."""
    from prd.training.recipes import load_config

    return load_config(recipe, overrides).max_train_steps


def own_scores(name: str, folder: Path) -> dict[str, Any]:
    """The score of the one prompt that a per-prompt run was trained for."""
    prompt = RUNS[name][1][-1][1:-1]
    splits = json.loads((place(folder, name) / "scores.json").read_text(encoding="utf-8"))
    (score,) = [s for part in splits.values() for s in part["scores"] if s["prompt"] == prompt]
    return score


def chosen(only: list[str] | None) -> list[str]:
    """Return the runs asked for, by their names or by words that their names hold; ValueError for a word of none."""
    words = [word for word in only or [] if word not in RUNS]
    for word in words:
        if not any(word.lower() in name.lower() for name in RUNS):
            raise ValueError(f"--only {word!r}: no run has this in its name; the runs are {', '.join(RUNS)}")
    return [n for n in RUNS if only is None or n in only or any(word.lower() in n.lower() for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="receives the runs")
    parser.add_argument("--only", nargs="+", default=None, help="runs by name (AToM), or by words (atom: all of it)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--points", type=int, default=6, help="checkpoints a run, each of them measured")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies every number of steps")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "generators")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "generators.json")
    args = parser.parse_args()
    try:
        names = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows: list[Measured] = sum(pool.map(lambda name: made(name, args), names), [])
    alone = {n: own_scores(n, args.folder) for n in names if one_prompt(n)}
    report = {
        "command": " ".join(sys.argv),
        "runs": {name: {"recipe": RUNS[name][0], "overrides": RUNS[name][1]} for name in names},
        "checkpoints": [asdict(row) for row in rows],
        "per_prompt": alone,
        "machine": describe(),
    }
    write_atomic(args.output, json.dumps(report, indent=1) + "\n")
    args.docs.mkdir(parents=True, exist_ok=True)
    frames = min(max(row.frames_per_prompt for row in rows if row.run == name) for name in {row.run for row in rows})
    equal = at_frames(rows, frames)
    four = [row for row in equal if row.run in SIDE_BY_SIDE]
    others = [row for row in equal if row.run not in SIDE_BY_SIDE]
    print(markdown_table(four), markdown_table(others), json.dumps(alone, indent=1), sep="\n\n")
    write_atomic(args.docs / "table.md", f"{markdown_table(four)}\n\n{markdown_table(others)}\n")
    write_atomic(args.docs / "curves.html", curves(rows))
    shown = [name for name in SIDE_BY_SIDE if name in names]
    if shown:
        side_by_side([place(args.folder, n) for n in shown], SHOWN, args.docs / "sheet.png", shown)


if __name__ == "__main__":
    main()
