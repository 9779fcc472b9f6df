"""Cost of an evaluation's pictures: seconds to read finished meshes, draw four views at 512 x 512 and keep them.

    python benchmarks/bench_evaluation.py                           # 415 meshes, as DreamFusion's prompts
    python benchmarks/bench_evaluation.py --meshes 40 --processes 2
    python benchmarks/bench_evaluation.py --against open3d          # the same views by another renderer

Meshes are made up: bumpy balls of --faces triangles with vertex colours, each another. The work is what a process of
`prd evaluate` does before a model looks at the pictures; processes share the meshes as in `accelerate launch`. Seconds
are of the clock, and of the processors. The JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh

from prd.evaluation.drawing import cameras_of, draw, normalised
from prd.evaluation.judges import save_picture
from prd.evaluation.protocols import PRD_PAPER, Pictures
from prd.meshes.files import FileMesh, read_file_mesh

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe  # noqa: E402

Images = Iterator[np.ndarray]


def write_meshes(folder: Path, count: int, faces: int) -> list[Path]:
    """Bumpy balls of about `faces` triangles, a .glb each."""
    side = max(4, round((faces / 2) ** 0.5))
    paths = []
    for k in range(count):
        ball = trimesh.creation.uv_sphere(count=[side, side])
        rng = np.random.default_rng(k)
        waves = np.sin(ball.vertices @ rng.normal(0, 4, (3, 5))).sum(axis=1, keepdims=True)
        colors = np.concatenate([ball.vertices * 100 + 128, np.full((len(ball.vertices), 1), 255)], axis=1)
        mesh = trimesh.Trimesh(ball.vertices * (1 + 0.05 * waves), ball.faces, process=False)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors.clip(0, 255).astype(np.uint8))
        paths.append(folder / f"{k:04d}.glb")
        mesh.export(paths[-1])
    return paths


def draw_open3d(mesh: FileMesh, pictures: Pictures) -> Images:
    """The same views by open3d's ray caster on the CPU."""
    import open3d

    scene = open3d.t.geometry.RaycastingScene()
    vertices, faces = normalised(mesh, pictures).float().numpy(), mesh.faces.astype(np.uint32)
    scene.add_triangles(vertices, faces)
    origins, directions = cameras_of(pictures).to(torch.float32).rays(pictures.size, pictures.size)
    for origin, direction in zip(origins[0].numpy(), directions[0].numpy(), strict=True):
        hit = scene.cast_rays(np.concatenate([origin, direction], axis=-1))
        face, uv = hit["primitive_ids"].numpy(), hit["primitive_uvs"].numpy()
        seen = face != scene.INVALID_ID
        u, v = uv[seen].T[..., None]
        a, b, c = (mesh.colors[mesh.faces[face[seen], corner]] for corner in range(3))
        image = np.full((pictures.size, pictures.size, 3), pictures.background, np.float32)
        image[seen] = a * (1 - u - v) + b * u + c * v
        yield (image.clip(0, 1) * 255).round().astype(np.uint8)


def work(function: Callable[[FileMesh, Pictures], Images], paths: list[Path], out: Path) -> float:
    """Draw the meshes of one process; returns the seconds of its processors."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    for path in paths:
        for view, image in enumerate(function(read_file_mesh(path), PRD_PAPER.pictures or Pictures())):
            save_picture(out / f"{path.stem}_{view}.png", image)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(function: Any, paths: list[Path], processes: int, out: Path) -> dict[str, float]:
    """Seconds for all meshes, with the processes warm."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(work, function, paths[:1]), [out] * processes))
        begun = time.perf_counter()
        parts = [paths[k::processes] for k in range(processes)]
        used = list(pool.map(partial(work, function), parts, [out] * processes))
        return {"seconds": time.perf_counter() - begun, "processor_seconds": sum(used)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", type=int, default=415)
    parser.add_argument("--faces", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--against", choices=("none", "open3d"), default="none")
    parser.add_argument("--output", default="benchmarks/results/evaluation.json")
    args = parser.parse_args()
    print(json.dumps(vars(args)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_meshes(folder, args.meshes, args.faces)
        result: dict[str, Any] = {"meshes": args.meshes, "faces": args.faces, "processes": args.processes}
        result["prd"] = measure(draw, paths, args.processes, folder)
        if args.against == "open3d":
            result["open3d"] = measure(draw_open3d, paths, args.processes, folder)
    result["machine"] = describe()
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
