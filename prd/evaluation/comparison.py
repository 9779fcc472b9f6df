"""Runs of several models side by side, at equal numbers of rendered frames per prompt (ATT3D's measure of cost).

    rows = [row for run in runs for row in measure_run(run)]
    write_comparison(rows, "docs/generators", frames=400)

Every checkpoint that a run kept is measured by the run's benchmark, on captions seen and held out; splits that are a
sample, as the toy box's stacks, are left out. A run that keeps all checkpoints is one with
`--checkpoints_total_limit null`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prd.data.prompts import load_corpus
from prd.errors import ConfigError
from prd.evaluation.benchmark import Benchmark, measured_splits, resolve_benchmark
from prd.evaluation.pictures import save_sheet
from prd.evaluation.report import STYLE, chart, shown
from prd.fields.fast import one_sample
from prd.hub.find import METRICS
from prd.text.encoders import PromptEncoder
from prd.training.config import TrainConfig
from prd.training.galleries import generate_fields, sheet_views, shown_background
from prd.training.parts import build_model
from prd.training.recipes import load_config
from prd.training.run.checkpoints import checkpoint_folders, load_checkpoint
from prd.training.validation import measure
from prd.utils.arguments import expanded_path
from prd.utils.files import write_atomic

SIDES = ("seen", "held_out")  # what a split's name ends in


@dataclass(frozen=True)
class Measured:
    """Cost and scores of a checkpoint of a run."""

    run: str
    step: int
    frames_per_prompt: float
    scores: dict[str, dict[str, Any]]  # summary by split


def measure_run(folder: str | Path, name: str | None = None, *, last: int | None = None) -> list[Measured]:
    """Measure the checkpoints of a run, in the order of their steps.

    name  of the run in what is written, None: the folder's
    last  how many, counted from the end, None: all

    Raises ConfigError or CheckpointError for a folder that holds no run with a benchmark, or no whole checkpoint.
    """
    folder = expanded_path(folder, "folder")
    config = load_config(folder / "config.yaml")
    benchmark = resolve_benchmark(config.benchmark, config.prompts.source, config.prompts.texts)
    if benchmark is None:
        raise ConfigError(f"{folder}: it has no benchmark that measures it; give a run whose benchmark is not null")
    generator, encoder = build_model(config)
    prompts = len(load_corpus(config.prompts, config.seed).prompts)
    rows = []
    for place in tqdm(checkpoint_folders(folder)[-last if last else 0 :], desc=name or folder.name):
        checkpoint = load_checkpoint(place)
        generator.load_trained_state_dict(checkpoint.tensors[generator.folder_name])
        generator.eval()
        scores = score_splits(generator, encoder, config, benchmark)
        rows.append(Measured(name or folder.name, checkpoint.step, checkpoint.state["frames"] / prompts, scores))
    return rows


def score_splits(
    generator: Any, encoder: PromptEncoder, config: TrainConfig, benchmark: Benchmark
) -> dict[str, dict[str, Any]]:
    """Return the summary of each split that is measured whole; one that holds no prompt is left out."""
    seed, steps = config.seed, config.validation.num_inference_steps
    return {
        split: benchmark.summary(measure(generator, encoder, prompts, benchmark, seed=seed, num_inference_steps=steps))
        for split, prompts in measured_splits(benchmark, config.prompts, 0).items()
    }


def at_frames(rows: Sequence[Measured], frames: float) -> list[Measured]:
    """Pick of each run the checkpoint whose rendered frames per prompt are nearest to `frames`."""
    runs: dict[str, list[Measured]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)
    return [min(part, key=lambda row: abs(row.frames_per_prompt - frames)) for part in runs.values()]


def markdown_table(rows: Sequence[Measured]) -> str:
    """Return a line per row: frames per prompt, steps, and the figures as "seen / held out", "-" for none."""
    heads = ("", "frames per prompt", "steps", *METRICS.values())
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.run, f"{row.frames_per_prompt:.0f}", str(row.step)]
        for figure in METRICS:
            values = [_side(row, side).get(figure) for side in SIDES]
            cells.append(" / ".join("-" if value is None else f"{value:.2f}" for value in values))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(rows: Sequence[Measured]) -> str:
    """Return an HTML page with a chart per figure and split: a line per run, over the frames rendered per prompt."""
    charts = []
    for split in dict.fromkeys(split for row in rows for split in row.scores):
        for figure in ("r_at_1", "iou"):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if figure in row.scores.get(split, {}):
                    lines.setdefault(row.run, []).append((row.frames_per_prompt, row.scores[split][figure]))
            if lines:
                charts.append(chart(f"{figure}, {split.replace('_', ' ')}", lines, axis="frames per prompt"))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Models</title><style>{STYLE}</style>'
        f'</head><body><h1>Models at equal cost</h1><div class="charts">{"".join(charts)}</div></body></html>\n'
    )


def write_comparison(rows: Sequence[Measured], folder: str | Path, frames: float) -> str:
    """Write comparison.json, table.md and curves.html to a folder; returns the table at equal `frames` per prompt."""
    folder = expanded_path(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown_table(at_frames(rows, frames))
    write_atomic(folder / "comparison.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    write_atomic(folder / "table.md", table + "\n")
    write_atomic(folder / "curves.html", curves(rows))
    return table


@torch.no_grad()
def side_by_side(runs: Sequence[str | Path], prompts: Sequence[str], path: str | Path, names: Sequence[str]) -> None:
    """Draw the last weights of several runs on a sheet: a row per prompt, two views and a normal map per run."""
    pictures: list[list[Tensor]] = [[] for _ in prompts]
    for run in runs:
        config = load_config(expanded_path(run, "run") / "config.yaml")
        generator, encoder = build_model(config)
        checkpoint = load_checkpoint(checkpoint_folders(expanded_path(run, "run"))[-1])
        generator.load_trained_state_dict(checkpoint.tensors[generator.folder_name])
        steps, row = config.validation.num_inference_steps, iter(pictures)
        batches = generate_fields(
            generator.eval(), encoder, prompts, seed=config.seed, num_inference_steps=steps, batch_size=8
        )
        for part, field in batches:
            for i in range(len(part)):
                drawn = sheet_views(one_sample(field, i, len(part)), config, generator.device)
                size = config.validation.resolution
                images = torch.full((3, 3, size, size), shown_background(config), dtype=torch.float32, device="cpu")
                if drawn is not None:
                    chosen = [drawn.rgb[0, 0], drawn.rgb[0, 1], (drawn.camera_normal()[0, 1] + 1) / 2]
                    images = torch.stack(chosen).permute(0, 3, 1, 2)
                next(row).append(images)
    labels = [f"{prompt}   ({', '.join(names)})" if i == 0 else prompt for i, prompt in enumerate(prompts)]
    tiles = torch.cat([torch.cat(row) for row in pictures])
    save_sheet(tiles, path, columns=3 * len(runs), scale=1, labels=labels)


def summary_line(row: Measured) -> str:
    """Return a row in words."""
    values = ", ".join(f"{split} R@1 {shown(summary['r_at_1'])}" for split, summary in row.scores.items())
    return f"{row.run} step {row.step}, {row.frames_per_prompt:.0f} frames per prompt: {values}"


def _side(row: Measured, side: str) -> dict[str, Any]:
    """The summary of the first split whose name ends in "seen" or "held_out"."""
    return next((summary for split, summary in row.scores.items() if split.endswith(side)), {})
