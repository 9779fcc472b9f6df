"""Splats against meshes in the toy box: likeness to the exact renders, seconds per view, bytes on disk.

    python benchmarks/bench_splats.py                   # six minutes of one processor's time, four of them training
    python benchmarks/bench_splats.py --minutes 20 --train 48 --test 16

The shipped toy model generates a field for each caption once. On the fields of the training captions a splat head is
trained, and nothing else: it sees the planes, and its splats are pulled towards the renders of the field's own mesh,
so that no exact shape is used. Measured are the fields of other captions, against sphere-traced renders of the exact
shapes and against the finest mesh of the same field: the mesh, splats without heads and splats with the trained head,
at several grids of the isosurface. One seed: an indication. Writes results/splats.json and docs/splats.jpg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

from prd.cameras import Cameras, CamerasConfig, orbit_cameras  # noqa: E402
from prd.fields.triplane import TriplaneField, TriplaneHeads  # noqa: E402
from prd.isosurface.extract import extract_isosurface  # noqa: E402
from prd.isosurface.marching_cubes import Surface  # noqa: E402
from prd.meshes.mesh import extract_mesh  # noqa: E402
from prd.pipelines.triplane_turbo import TriplaneTurbo  # noqa: E402
from prd.rendering.sphere_trace import SphereTracer  # noqa: E402
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer  # noqa: E402
from prd.rendering.views import Views  # noqa: E402
from prd.splats.renderer import SplatConfig, SplatRenderer, draw_splats  # noqa: E402
from prd.splats.splats import splats_on  # noqa: E402
from prd.toybox.world import FORMS, ExactField, all_captions  # noqa: E402
from prd.utils.files import write_atomic  # noqa: E402

SIZE = 96  # pixels per side
GREY = 0.5
MESH_GRIDS = (32, 64, 160)
SPLAT_GRIDS = (32, 64, 96)
TRAIN_GRIDS = (32, 64)
FINEST = SurfaceRenderer(SurfaceConfig(grid_resolution=160, supersample=4))
CAMERAS = CamerasConfig(views=4, elevation=(-30.0, 60.0), relative_distance=(1.12, 1.12), fovy=50.0)
LR = 2e-3


@dataclass(frozen=True)
class Shape:
    """A generated field with what it is compared to."""

    prompt: str
    field: TriplaneField
    cameras: Cameras
    own: Views  # of its finest mesh


def make_shapes(pipe: TriplaneTurbo, prompts: list[str], seed: int, sets: int) -> list[Shape]:
    """Generate a field for each prompt and render its finest mesh from `sets` orbits of four views."""
    found = []
    for number, prompt in enumerate(tqdm(prompts, desc="fields")):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        output: Any = pipe(prompt, generator=generator, output_type="field")
        uniforms = torch.rand(sets, CAMERAS.num_draws, generator=generator)
        orbits = CAMERAS.sample(uniforms)
        cameras = Cameras(orbits.camera_to_world.flatten(0, 1)[None], orbits.fovy.flatten(0, 1)[None])
        with torch.no_grad():
            own = FINEST(output.field, cameras, height=SIZE, width=SIZE, background=GREY)
        found.append(Shape(prompt, output.field, cameras, own))
    return found


def with_head(shape: Shape, heads: TriplaneHeads) -> TriplaneField:
    return TriplaneField(shape.field.planes, heads, shape.field.bias_radius)


def surface_of(field: TriplaneField, resolution: int) -> list[Surface]:
    with torch.no_grad():
        return extract_isosurface(field, resolution)


def train(shapes: list[Shape], heads: TriplaneHeads, minutes: float, seed: int) -> dict[str, Any]:
    """Train the splat head on the fields' own renders, for so many minutes of this thread; returns the record."""
    assert heads.splats is not None
    optimizer = torch.optim.Adam(heads.splats.parameters(), lr=LR)
    surfaces = {grid: [surface_of(shape.field, grid) for shape in shapes] for grid in TRAIN_GRIDS}
    generator, renderer = torch.Generator().manual_seed(seed), SplatRenderer(SplatConfig())
    start, losses, share = time.process_time(), [], 0.0
    with tqdm(total=100, desc="train") as bar:
        while share < 1:
            for group in optimizer.param_groups:
                group["lr"] = LR * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
            number = int(torch.randint(len(shapes), (), generator=generator))
            shape, grid = shapes[number], TRAIN_GRIDS[len(losses) % len(TRAIN_GRIDS)]
            views = torch.randperm(shape.cameras.views, generator=generator)[:2]
            cameras = shape.cameras.select(views[None])
            drawn = renderer.draw_views(
                with_head(shape, heads), surfaces[grid][number], cameras, height=SIZE, width=SIZE, background=GREY
            )
            loss = F.l1_loss(drawn.rgb, shape.own.rgb[:, views]) + F.l1_loss(drawn.opacity, shape.own.opacity[:, views])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            share = (time.process_time() - start) / (60 * minutes)
            bar.n = min(100, int(100 * share))
            bar.set_postfix(step=len(losses), loss=f"{np.mean(losses[-50:]):.4f}")
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "loss_first_tenth": round(float(np.mean(losses[:tenth])), 5),
        "loss_last_tenth": round(float(np.mean(losses[-tenth:])), 5),
    }


def psnr(image: Tensor, truth: Tensor) -> float:
    return -10 * math.log10(float(F.mse_loss(image, truth)))


def iou(opacity: Tensor, truth: Tensor) -> float:
    mine, exact = opacity > 0.5, truth > 0.5
    return float((mine & exact).sum() / (mine | exact).sum())


def timed(call: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of the fastest of a few calls."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def compared(views: Views, truth: Views, own: Views) -> dict[str, float]:
    return {
        "psnr": psnr(views.rgb, truth.rgb),
        "silhouette_iou": iou(views.opacity, truth.opacity),
        "psnr_to_own_mesh": psnr(views.rgb, own.rgb),
        "silhouette_iou_to_own_mesh": iou(views.opacity, own.opacity),
    }


@torch.no_grad()
def measure_mesh(shape: Shape, truth: Views, grid: int, folder: Path) -> dict[str, float]:
    """The field's mesh, coloured by the field pixel by pixel; its file has a colour per vertex and all triangles."""
    renderer, surfaces = SurfaceRenderer(SurfaceConfig(grid_resolution=grid)), surface_of(shape.field, grid)
    one = shape.cameras.select(torch.tensor([[0]]))

    def draw(cameras: Cameras, size: int) -> Views:
        return renderer.draw_views(shape.field, surfaces, cameras, height=size, width=size, background=GREY)

    views = draw(shape.cameras, SIZE)
    options: dict[str, Any] = {"isosurface_resolution": grid, "target_faces": None, "texture_size": None}
    (mesh,) = extract_mesh(shape.field, **options)
    assert mesh is not None
    bytes_of = {suffix: mesh.export(folder / f"mesh.{suffix}").stat().st_size for suffix in ("glb", "ply")}
    return {
        **compared(views, truth, shape.own),
        "count": len(surfaces[0][1]),
        "seconds_96": timed(lambda: draw(one, 96)),
        "seconds_512": timed(lambda: draw(one, 512)),
        "glb_bytes": bytes_of["glb"],
        "ply_bytes": bytes_of["ply"],
    }


@torch.no_grad()
def measure_splats(
    shape: Shape, truth: Views, grid: int, heads: TriplaneHeads | None, folder: Path
) -> dict[str, float]:
    """Splats of the field, with a trained head or none."""
    field = shape.field if heads is None else with_head(shape, heads)
    renderer, surfaces = SplatRenderer(SplatConfig(grid_resolution=grid)), surface_of(shape.field, grid)
    one = shape.cameras.select(torch.tensor([[0]]))
    views = renderer.draw_views(field, surfaces, shape.cameras, height=SIZE, width=SIZE, background=GREY)
    (splats,) = splats_on(field, surfaces)
    return {
        **compared(views, truth, shape.own),
        "count": len(splats),
        "seconds_make": timed(lambda: splats_on(field, surfaces)),
        "seconds_96": timed(lambda: draw_splats(splats, one, 96, 96)),
        "seconds_512": timed(lambda: draw_splats(splats, one, 512, 512)),
        "splat_bytes": splats.export(folder / "one.splat").stat().st_size,
        "ply_bytes": splats.export(folder / "one.ply").stat().st_size,
    }


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(f"{np.mean([row[key] for row in rows]):.4g}") for key in rows[0]}


def exact_views(shape: Shape) -> Views:
    return SphereTracer(4)(ExactField([shape.prompt]), shape.cameras, height=SIZE, width=SIZE, background=GREY)


def measure(shapes: list[Shape], heads: TriplaneHeads) -> dict[str, dict[str, float]]:
    """Rows of the table, means over the shapes."""
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in tqdm(shapes, desc="measure"):
            truth = exact_views(shape)
            for grid in MESH_GRIDS:
                rows.setdefault(f"mesh, grid {grid}", []).append(measure_mesh(shape, truth, grid, folder))
            for label, own in (("splats", None), ("splats, trained head", heads)):
                for grid in SPLAT_GRIDS:
                    found = measure_splats(shape, truth, grid, own, folder)
                    rows.setdefault(f"{label}, grid {grid}", []).append(found)
    return {label: mean_of(found) for label, found in rows.items()}


@torch.no_grad()
def sheet(shapes: list[Shape], heads: TriplaneHeads, size: int = 144) -> Image.Image:
    """One row per shape: exact, mesh, splats without heads and with the trained one, these at the coarsest grid."""
    rows, grid = [], SPLAT_GRIDS[0]
    for number, shape in enumerate(shapes):
        cameras = orbit_cameras(torch.tensor([[25.0]]), torch.tensor([[35.0 + 40 * number]]), 2.4, 50.0)
        surfaces, renderer = surface_of(shape.field, grid), SplatRenderer(SplatConfig(grid_resolution=grid))
        asked: dict[str, Any] = {"height": size, "width": size, "background": 1.0}
        row = [
            SphereTracer(4)(ExactField([shape.prompt]), cameras, **asked),
            SurfaceRenderer(SurfaceConfig(grid_resolution=160, supersample=2))(shape.field, cameras, **asked),
            renderer.draw_views(shape.field, surfaces, cameras, **asked),
            renderer.draw_views(with_head(shape, heads), surfaces, cameras, **asked),
        ]
        rows.append(torch.cat([views.rgb[0, 0] for views in row], dim=1))
    pixels = torch.cat(rows).clamp(0, 1).mul(255).round().byte().numpy()
    return Image.fromarray(pixels)


def chosen_prompts(train_count: int, test_count: int, seed: int) -> tuple[list[str], list[str]]:
    """Captions with one right answer, half of them stacks; those of training and, others, those measured."""
    closed = [caption for caption in all_captions() if caption.is_stack or caption.words[0][1] not in FORMS]
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for stack in (False, True):
        kind = [caption.text for caption in closed if caption.is_stack == stack]
        picks.append([kind[i] for i in torch.randperm(len(kind), generator=generator)])
    counts = train_count // 2, test_count // 2
    first = [text for kind in picks for text in kind[: counts[0]]]
    return first, [text for kind in picks for text in kind[counts[0] : sum(counts)]]


def main() -> None:
    """Train, measure, and write the JSON and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="of CPU time, of the training")
    parser.add_argument("--train", type=int, default=36, help="captions, at most 68")
    parser.add_argument("--test", type=int, default=12, help="other captions; both together at most 72")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "splats.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "splats.jpg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = TriplaneTurbo.from_pretrained("toybox")
    pipe.set_progress_bar_config(disable=True)
    first, others = chosen_prompts(args.train, args.test, args.seed)
    record: dict[str, Any] = {"machine": describe(), "seed": args.seed, "size": SIZE, "views": CAMERAS.views}
    print(json.dumps(record), flush=True)
    shapes = make_shapes(pipe, first, args.seed, sets=1)
    torch.manual_seed(args.seed)
    own = pipe.model.heads
    heads = TriplaneHeads(own.channels, own.width, splats=True).requires_grad_(False)
    heads.load_state_dict({**heads.state_dict(), **own.state_dict()})
    assert heads.splats is not None
    heads.splats.requires_grad_(True)
    record["training"] = {"captions": len(first), **train(shapes, heads, args.minutes, args.seed)}
    record["training"]["parameters"] = sum(parameter.numel() for parameter in heads.splats.parameters())
    print(json.dumps(record["training"]), flush=True)
    tests = make_shapes(pipe, others, args.seed + 1, sets=1)
    record["captions"], record["table"] = others, measure(tests, heads)
    for label, row in record["table"].items():
        print(label, json.dumps(row), flush=True)
    write_atomic(args.json, json.dumps(record, indent=1) + "\n")
    sheet(tests[:: max(1, len(tests) // 4)][:4], heads).save(args.sheet, quality=88)


if __name__ == "__main__":
    main()
