"""Measure how far CLIP's R@1 agrees with the truth, the same shapes judged by pictures and by the toy box's volumes.

    prd ablate k --output_dir runs/ablations                     # or any other runs of toy recipes
    python benchmarks/bench_clip_truth.py runs/ablations/*-seed* --clip toybox

Every finished run draws its single objects once more, each from its own noise. The benchmark compares a shape with
every exact one (`prd.toybox.score`); `prd evaluate --protocol prd-paper` asks the CLIP for the caption of its pictures
among those of all single objects and stacks. Reported are rank correlations (Spearman's) over the runs, and over the
shapes of all runs the correlation with the IoU and the AUC for "recognised by the truth"; intervals resample runs. The
JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from prd import TriplaneTurbo
from prd.evaluation.benchmark import find_benchmark
from prd.evaluation.formulas import auc
from prd.evaluation.inputs import Item
from prd.evaluation.run import EvaluationConfig, evaluate
from prd.evaluation.statistics import RESAMPLES
from prd.meshes.mesh import extract_mesh
from prd.toybox.world import single_captions

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe  # noqa: E402

CLIP = ("clip_score", "r_at_1")
TRUTH = ("recognised", "iou")
Shape = dict[str, float]


def judge(run: Path, clip: str, output: Path, resolution: int) -> list[Shape]:
    """Judge a run's single objects by the CLIP and by the truth."""
    world = find_benchmark("toybox")
    assert world is not None
    pipe: Any = TriplaneTurbo.from_pretrained(run / "adapter")
    prompts = [caption.text for caption in single_captions()]
    items, truth = [], []
    for k, prompt in enumerate(prompts):
        field = pipe(prompt, generator=torch.Generator().manual_seed(k), output_type="field").field
        truth += world.score(field, [prompt])
        (mesh,) = extract_mesh(
            field, isosurface_resolution=resolution, texture_size=None, target_faces=None, on_empty="flag"
        )
        path = output / f"{k}.glb"
        if mesh is not None:
            mesh.export(path)
        items.append(Item(path.name, prompt, mesh=path))
    queries = tuple(world.captions())
    config = EvaluationConfig(protocol="prd-paper", output=output / "report", clip=clip, queries=queries)
    rows = evaluate(items, config)["rows"]
    return [
        {key: float(row.get(key, 0.0)) for key in CLIP} | {"recognised": float(one.recognised), "iou": one.iou}
        for row, one in zip(rows, truth, strict=True)
    ]


def agreement(runs: list[list[Shape]]) -> dict[str, float]:
    """Rank correlations over runs and over shapes; those of what does not vary are left out."""
    means = [{key: float(np.mean([shape[key] for shape in run])) for key in (*CLIP, *TRUTH)} for run in runs]
    shapes = [shape for run in runs for shape in run]
    found = {}
    for rows, name in ((means, "runs"), (shapes, "shapes")):
        for one in CLIP:
            for other in TRUTH:
                a, b = ([row[key] for row in rows] for key in (one, other))
                if len(set(a)) > 1 and len(set(b)) > 1:
                    found[f"{name}: {one} and {other}"] = float(spearmanr(a, b).statistic)
    split = [[shape["clip_score"] for shape in shapes if shape["recognised"] == value] for value in (1, 0)]
    return found | {"shapes: AUC of clip_score for recognised": auc(*split) if all(split) else float("nan")}


def resampled(runs: list[list[Shape]], draws: int) -> dict[str, list[float]]:
    """95 % intervals of the agreement over draws of the runs."""
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        for key, value in agreement([runs[k] for k in generator.integers(0, len(runs), len(runs))]).items():
            found.setdefault(key, []).append(value)
    return {key: [float(q) for q in np.nanquantile(values, (0.025, 0.975))] for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of toy recipes; unfinished ones are left out")
    parser.add_argument("--clip", default="toybox", help="as --clip of `prd evaluate`")
    parser.add_argument("--resolution", type=int, default=64, help="nodes per axis of the isosurface grid")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/clip_truth.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = [run for run in args.runs if (run / "adapter" / "record.json").is_file()]
    if len({run.name for run in folders}) < max(1, len(folders)):
        parser.error(
            f"{len(folders)} of the {len(args.runs)} folders are finished runs; give at least one, each name once"
        )
    known: dict[str, list[Shape]] = {}
    for run in tqdm(folders):
        with tempfile.TemporaryDirectory() as name:
            known[run.name] = judge(run, args.clip, Path(name), args.resolution)
    runs = [known[run.name] for run in folders]
    found, intervals = agreement(runs), resampled(runs, RESAMPLES // 10)
    result = {
        "machine": describe(),
        "options": {"clip": args.clip, "resolution": args.resolution},
        "agreement": {key: {"value": value, "interval": intervals[key]} for key, value in found.items()},
        "runs": {
            run.name: {key: float(np.mean([shape[key] for shape in known[run.name]])) for key in (*CLIP, *TRUTH)}
            for run in folders
        },
        "shapes": {
            run.name: [{k: round(v, 4) for k, v in shape.items()} for shape in known[run.name]] for run in folders
        },
    }
    text = re.sub(
        r"\{[^{}\[\]]*\}", lambda flat: " ".join(flat[0].split()), json.dumps(result, indent=1)
    )  # a line each
    args.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("agreement", "runs")}, indent=1))


if __name__ == "__main__":
    main()
