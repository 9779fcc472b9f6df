"""A textured mesh of the toy box, stage by stage: CPU seconds, charts, and the part of the texture that they use.

    python benchmarks/bench_meshing.py                       # eight shapes, two minutes at most
    python benchmarks/bench_meshing.py --shapes cube mug     # some of them

Each shape is generated once by the shipped toy model; what is measured is the way from the field to the .glb: extract,
clean (weld, drop pieces, close handles), decimate, cut into charts, pack, bake (vertex colours, texture), write. The
first call of the process, which loads or compiles numba's kernels, is measured apart. The alternative is xatlas
(`xatlas.parametrize` with its defaults, unwrapping alone) on the same triangles in the same run. Writes
results/meshing.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import numpy as np
import torch
import xatlas
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

from prd.fields.protocol import Field  # noqa: E402
from prd.meshes import mesh as meshing  # noqa: E402
from prd.meshes import texture  # noqa: E402
from prd.meshes.charts import charts_of  # noqa: E402
from prd.meshes.mesh import Mesh  # noqa: E402
from prd.meshes.options import MeshOptions  # noqa: E402
from prd.meshes.texture import used_area  # noqa: E402
from prd.pipelines.triplane_turbo import TriplaneTurbo  # noqa: E402
from prd.utils.files import write_atomic  # noqa: E402

SHAPES = ("cube", "sphere", "cone", "cylinder", "torus", "wedge", "arrow", "mug")
STAGES: tuple[tuple[str, ModuleType, tuple[str, ...]], ...] = (
    ("extract", meshing, ("extract_surfaces",)),
    ("clean", meshing, ("clean", "close_handles")),
    ("decimate", meshing, ("decimate", "merge_near")),
    ("cut", texture, ("cut_into_charts",)),
    ("pack", texture, ("pack",)),
    ("bake", meshing, ("texture_size", "fitted_colors", "texel_points", "paint")),
)
seconds: dict[str, float] = defaultdict(float)


def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that adds the CPU seconds of its calls to those of a stage."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **keywords)
        finally:
            seconds[stage] += time.process_time() - start

    return call


def textured(field: Field, folder: Path) -> tuple[Mesh, dict[str, float]]:
    """Return the mesh of a field, written to a folder as .glb, and the CPU seconds of each stage and of all."""
    seconds.clear()
    start, wall = time.process_time(), time.perf_counter()
    (mesh,) = meshing.extract_mesh(field)
    assert mesh is not None
    timed("write", mesh.export)(folder / "mesh.glb")
    spent = {"all": time.process_time() - start, "all_wall": time.perf_counter() - wall, **seconds}
    return mesh, {stage: round(value, 3) for stage, value in spent.items()}


def by_xatlas(mesh: Mesh) -> dict[str, Any]:
    """Return what xatlas makes of a mesh's triangles by its defaults."""
    _, first, merged = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    faces = merged.reshape(-1)[mesh.faces].astype(np.uint32)
    start = time.process_time()
    _, charted, uv = xatlas.parametrize(mesh.vertices[first], faces)
    spent = time.process_time() - start
    return {"unwrap_seconds": round(spent, 3), **layout(charted.astype(np.int64), uv)}


def layout(faces: NDArray[np.int64], uv: NDArray[np.float32]) -> dict[str, Any]:
    """Return the number of charts, the part of the texture in use and how many triangles are mirrored."""
    (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T.astype(np.float64) for k in (1, 2))
    signed = (a * d - b * c) / 2
    return {
        "charts": charts_of(faces, len(uv))[0],
        "used_area": round(float(np.abs(signed).sum()), 3),
        "mirrored_triangles": int((signed < -1e-9).sum()),
    }


def main() -> None:
    """Measure the shapes and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--color", default="red")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "meshing.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for stage, module, names in STAGES:
        for name in names:
            setattr(module, name, timed(stage, getattr(module, name)))
    pipe = TriplaneTurbo.from_pretrained("toybox")
    record: dict[str, Any] = {"machine": describe(), "options": vars(MeshOptions()), "shapes": {}}
    record["alternative"] = f"xatlas {version('xatlas')}, xatlas.parametrize, unwrapping alone"
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            prompt = f"a {args.color} {shape}"
            generator = torch.Generator().manual_seed(args.seed)
            output: Any = pipe(prompt, generator=generator, output_type="field")
            field = output.field
            if "first_call" not in record:
                record["first_call"] = textured(field, Path(folder))[1]
            mesh, spent = textured(field, Path(folder))
            assert mesh.uv is not None and used_area(mesh.faces, mesh.uv) > 0
            row = {"cpu_seconds": spent, "faces": len(mesh.faces), "is_watertight": mesh.is_watertight}
            record["shapes"][shape] = {**row, **layout(mesh.faces, mesh.uv), "xatlas": by_xatlas(mesh)}
            print(prompt, json.dumps(record["shapes"][shape]), flush=True)
    write_atomic(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
