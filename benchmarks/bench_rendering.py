"""Measure the renderers against the prototypes they grew from and against what the machine allows.

    python benchmarks/bench_rendering.py --sketches FOLDER            # the prototypes are the bar; minutes
    python benchmarks/bench_rendering.py                              # without them: our own figures alone
    python benchmarks/bench_rendering.py --only raster isosurface     # some of the sections
    python benchmarks/bench_rendering.py --quick                      # a smoke run, seconds; its figures mean nothing

Sections: raster (numba z-buffer), isosurface (marching cubes and tetrahedra), grid (a field on a dense grid), neus
(memory of a training render), memory (an isosurface of 512^3 nodes, minutes). Whatever is compared is timed in turn,
repetition by repetition, so that other work on the machine meets both; the least and the median are kept. The JSON
names the machine, the threads and what bounds each figure; it is written after every section, so that a run that is
stopped keeps what it has measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import numba
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import PeakMemory, describe, matmul_rate  # noqa: E402

from prd.cameras import orbit_cameras  # noqa: E402
from prd.distillation.regularizers import eikonal_loss  # noqa: E402
from prd.fields.dense_head import _first_hidden, _tiles  # noqa: E402
from prd.fields.planes import plane_coordinates, plane_lattices  # noqa: E402
from prd.fields.triplane import TriplaneField, TriplaneHeads, colour_from_features  # noqa: E402
from prd.isosurface.coarse_to_fine import extract_coarse_to_fine  # noqa: E402
from prd.isosurface.extract import extract_isosurface  # noqa: E402
from prd.isosurface.marching_cubes import marching_cubes  # noqa: E402
from prd.isosurface.marching_tetrahedra import marching_tetrahedra  # noqa: E402
from prd.rendering.protocol import SampleDraws  # noqa: E402
from prd.rendering.rasterize import rasterize  # noqa: E402
from prd.rendering.volume import VolumeConfig, VolumeRenderer  # noqa: E402

Record = dict[str, Any]
VIEWS = 4
HEADS = ("sdf", "deformation", "rgb")


def interleaved(ways: dict[str, Callable[[], object]], threads: int, repeats: int) -> dict[str, Record]:
    """Milliseconds of each way, least and median of `repeats`, taken in turn after one unmeasured call each."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            torch.set_num_threads(threads)  # numba's OpenMP layer, when it starts, sets this for torch too
            start = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - start) * 1e3)
    torch.set_num_threads(threads)
    return {
        name: {"least_ms": round(min(t), 3), "median_ms": round(statistics.median(t), 3)} for name, t in times.items()
    }


def ratios(record: Record, ours: str, bar: str, most: float) -> None:
    """Add ours / bar, and whether it stays within the bar."""
    if bar in record:
        for figure in ("least_ms", "median_ms"):
            record[f"ratio_{figure[:-3]}"] = round(record[ours][figure] / record[bar][figure], 3)
        record["bar"] = most
        record["met"] = record["ratio_least"] <= most


def sketch(folder: Path | None, name: str) -> tuple[Any, str]:
    """A prototype's module, or None and the reason."""
    if folder is None:
        return None, "no --sketches given"
    path = folder / f"{name}.py"
    if not path.is_file():
        return None, f"{path} does not exist"
    sys.path.append(str(folder))  # numba's cache finds compiled code by the module's name
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{path} needs a package that is missing: {error}"


def bandwidth() -> float:
    """Bytes a second read and written by the best of a few copies of 256 MB."""
    source, target = torch.empty(1 << 26), torch.empty(1 << 26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def bumpy_ball(resolution: int) -> torch.Tensor:
    """A signed distance-like field [R, R, R] with a closed bumpy surface."""
    axis = torch.linspace(-1, 1, resolution)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    return (x.square() + y.square() + z.square()).sqrt() - 0.7 + 0.1 * (7 * x).sin() * (6 * y).sin() * (5 * z).sin()


def smooth_field(batch: int, channels: int = 32, size: int = 256) -> TriplaneField:
    """Planes whose features vary over a sixteenth of their side, as trained ones do."""
    torch.manual_seed(0)
    coarse = 0.3 * torch.randn(batch * 6, channels, 16, 16)
    planes = F.interpolate(coarse, (size, size), mode="bicubic").view(batch, 6, channels, size, size)
    return TriplaneField(planes, TriplaneHeads(channels, 64))


def bench_raster(args: argparse.Namespace, rates: Record) -> list[Record]:
    """Four views of closed meshes of about 20k and 200k triangles at 128^2 and 512^2, milliseconds a call."""
    grids = (66,) if args.quick else (66, 205)
    return [raster_record(args, rates, grid, size) for grid in grids for size in (128, 512)]


def raster_record(args: argparse.Namespace, rates: Record, grid: int, size: int) -> Record:
    module, missing = sketch(args.sketches, "raster_numba")
    vertices, faces = marching_cubes(bumpy_ball(grid))
    vertices = vertices * (2 / (grid - 1)) - 1
    cameras = orbit_cameras(torch.full((1, VIEWS), 20.0), torch.arange(VIEWS)[None] * 90.0 + 10, 2.4, 50.0)
    matrices = (cameras.projection(1.0) @ cameras.world_to_camera())[0]
    clip = vertices @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
    clip_array, face_array = clip.numpy(), faces.int().numpy()
    ways: dict[str, Callable[[], object]] = {"ours": lambda: rasterize(clip, faces, size, size, backend="numba")}
    if module is not None:
        ways["sketch"] = lambda: module.raster(clip_array, face_array, size, size)
    record: Record = {"triangles": len(faces), "pixels": size, "views": VIEWS}
    record |= interleaved(ways, args.threads, 2 if args.quick else 30)
    moved = VIEWS * (clip[0].numel() * 4 + faces.numel() * 8 + size * size * 24)
    record["floor_ms"] = round(moved / rates["bytes_per_second"] * 1e3, 3)
    record["bound_by"] = (
        "arithmetic a triangle (setup and culling of all faces, in float64) and a pixel of the bounding boxes; the "
        "floor is reading clip-space vertices and faces and writing the buffers once"
    )
    ratios(record, "ours", "sketch", 1.0)
    return record if module is not None else record | {"sketch_missing": missing}


def bench_isosurface(args: argparse.Namespace, rates: Record) -> list[Record]:
    """Marching cubes with deformation at 128^3 and 160^3, forward and forward + backward; tetrahedra beside it."""
    module, missing = sketch(args.sketches, "marching_cubes")
    records = []
    for grid in (64,) if args.quick else (128, 160):
        sdf, deformation = bumpy_ball(grid), 0.1 * torch.randn(grid, grid, grid, 3)
        for backward in (False, True):

            def march(function: Any, backward: bool = backward, sdf: Any = sdf, deformation: Any = deformation) -> None:
                values, offsets = sdf.detach().requires_grad_(backward), deformation.detach().requires_grad_(backward)
                vertices, _ = function(values, offsets)
                if backward:
                    vertices.square().sum().backward()

            ways: dict[str, Callable[[], object]] = {
                "ours": lambda march=march: march(marching_cubes),
                "tetrahedra": lambda march=march: march(marching_tetrahedra),
            }
            if module is not None:
                ways["sketch"] = lambda march=march: march(module.marching_cubes)
            record: Record = {"grid": grid, "backward": backward}
            record |= interleaved(ways, args.threads, 2 if args.quick else 20)
            # forward: read sdf, write and read a bool a node, a byte a cell; backward: zero and write both gradients
            moved = grid**3 * (4 + 2 + 2 + (16 if backward else 0))
            record["floor_ms"] = round(moved / rates["bytes_per_second"] * 1e3, 3)
            record["bound_by"] = (
                "passes of bytes over all nodes (signs, cut edges of three directions, cases, and finding the active "
                "among them); vertices and faces are some 2 % of the cells"
            )
            ratios(record, "ours", "sketch", 1.0)
            records.append(record if module is not None else record | {"sketch_missing": missing})
    return records


@torch.no_grad()
def bench_grid(args: argparse.Namespace, rates: Record) -> list[Record]:
    """Six 256^2 planes of 32 channels at 160^3 nodes, against F.grid_sample in its default layout.

    Two comparisons: lookup against lookup (without heads), and whole against whole (with the same heads, which then
    take grid_sample's features chunk by chunk, colours through the same sigmoid). The bar is on the whole evaluation.
    """
    grid = 48 if args.quick else 160
    field = smooth_field(1)
    axis = torch.linspace(-1, 1, grid)
    points = torch.cartesian_prod(axis, axis, axis)
    coordinates = plane_coordinates(points[None])[0]  # [3, N, 2]
    coordinates = torch.cat([coordinates, coordinates])[:, None]
    planes = field.planes[0]

    def lookup() -> None:
        """Resample the planes and make the first layers' inputs at all nodes: the grid's way without lookups."""
        for head, kind in zip(HEADS, (field.planes[:, :3], field.planes[:, :3], field.planes[:, 3:]), strict=True):
            lattices = plane_lattices(kind, axis)
            first = getattr(field.heads, head).get_parameter("0.weight")
            shares = first.split(32, dim=1) if first.shape[1] > 32 else (first,) * 3
            sums = [F.linear(lattice, share) for lattice, share in zip(lattices, shares, strict=True)]
            for x, y in _tiles(sums[0]):
                _first_hidden(*sums, x, y)

    def plain() -> list[torch.Tensor]:
        """The whole grid by F.grid_sample: the same features, heads, bias and colours at the same nodes."""
        sampled = F.grid_sample(planes, coordinates, align_corners=False)[:, :, 0].unflatten(0, (2, 3))
        parts = []
        for nodes, geometry, texture in zip(*(x.split(1 << 16, -1) for x in (points.t(), *sampled)), strict=True):
            shared = geometry.sum(0).t()
            sdf = field.heads.sdf(shared) + field._bias(nodes.t())
            rgb = colour_from_features(field.heads.rgb(texture.flatten(0, 1).t())).clamp(0, 1)
            parts.append((sdf, rgb, field.heads.deformation(shared)))
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    for one, other in zip(field.grid(grid), plain(), strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-4, atol=1e-4)

    ways: dict[str, Callable[[], object]] = {
        "ours_lookup": lookup,
        "grid_sample_lookup": lambda: F.grid_sample(planes, coordinates, align_corners=False),
        "ours_whole": lambda: field.grid(grid),
        "grid_sample_whole": plain,
    }
    record: Record = {"grid": grid, "planes": 6, "channels": 32, "plane_size": 256}
    record |= interleaved(ways, args.threads, 1 if args.quick else 5)
    for figure in ("least_ms", "median_ms"):
        for part in ("lookup", "whole"):
            faster = record[f"grid_sample_{part}"][figure] / record[f"ours_{part}"][figure]
            record[f"times_faster_{part}_{figure[:-3]}"] = round(faster, 2)
    record["bar"] = 4.0
    record["bar_is_on"] = "times_faster_whole_least: the whole grid against F.grid_sample's default layout and heads"
    record["met"] = record["times_faster_whole_least"] >= 4
    record["met_by_lookup"] = record["times_faster_lookup_least"] >= 4
    operations = grid**3 * 2 * sum(64 * 64 + 64 * outputs for outputs in (1, 3, 3))
    moved = grid**3 * 4 * (1 + 3 + 3)  # the values written; tiles stay in the cache
    additions = grid**3 * 3 * 64 * 2
    record["floor_lookup_ms"] = round(additions / rates["flops_per_second"] * 1e3, 1)
    record["floor_whole_ms"] = round(
        (operations / rates["flops_per_second"] + moved / rates["bytes_per_second"]) * 1e3, 1
    )
    record["bound_by"] = (
        "lookup: two additions a node and hidden channel of three heads, and the calls that make them in tiles that "
        "fit the cache; whole: the 64 x 64 layers' matrix products. F.grid_sample reads 32 channels a plane apart for "
        "each corner of each node, and the heads then take 96 channels at all nodes"
    )
    return [record]


def child(name: str, *arguments: object) -> Record:
    """Run one memory measurement in a process of its own, so that nothing else counts."""
    command = [sys.executable, __file__, "--child", name, *(str(a) for a in arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def bench_neus(args: argparse.Namespace, rates: Record) -> list[Record]:
    """Peak memory above the model of a NeuS training render: four views, 128^2, 128 + 64 samples."""
    rays = (1 << 10,) if args.quick else (1 << 11, 1 << 13, 0)
    return [child("neus", 24 if args.quick else 128, most, torch.get_num_threads()) for most in rays]


def bench_memory(args: argparse.Namespace, rates: Record) -> list[Record]:
    """Time and peak memory above the model of isosurfaces of 512^3 nodes, in slabs and coarse to fine."""
    grid = 64 if args.quick else 512
    return [child("memory", grid, way, torch.get_num_threads()) for way in ("slabs", "coarse_to_fine")]


def child_neus(size: int, max_rays: int, threads: int) -> Record:
    torch.set_num_threads(threads)
    field = smooth_field(1)
    field.planes.requires_grad_()
    renderer = VolumeRenderer(VolumeConfig(num_samples=64, num_importance_samples=128, max_rays=max_rays or None))
    cameras = orbit_cameras(torch.full((1, VIEWS), 20.0), torch.arange(VIEWS)[None] * 90.0, 2.4, 50.0)
    memory = PeakMemory("cpu")
    memory.lap("model")
    start = time.perf_counter()
    draws = SampleDraws([torch.Generator().manual_seed(0)])
    rendered = renderer.render(field, cameras, (size, size), 0.5, draws)
    views = rendered.views
    assert rendered.samples is not None
    loss = views.rgb.mean() + views.normal.mean() + views.disparity.mean() + eikonal_loss(rendered.samples)
    loss.backward()
    seconds = time.perf_counter() - start
    memory.lap("render")
    above = memory.peaks["render"] - memory.peaks["model"]
    return {
        "size": size, "views": VIEWS, "samples": 192, "max_rays": max_rays or None, "seconds": round(seconds, 2),
        "gigabytes_above_model": round(above, 3), "bar": 3.0, "met": above <= 3.0, "eikonal_loss": True,
        "bound_by": "the activations of one chunk's samples (features of three planes, gradients twice) in the graph",
    }  # fmt: skip


@torch.no_grad()
def child_memory(grid: int, way: str, threads: int) -> Record:
    torch.set_num_threads(threads)
    field = smooth_field(1)
    memory = PeakMemory("cpu")
    memory.lap("model")
    start = time.perf_counter()
    if way == "slabs":
        ((vertices, faces),) = extract_isosurface(field, grid)
    else:
        ((vertices, faces),) = extract_coarse_to_fine(field, grid, factor=8)
    seconds = time.perf_counter() - start
    memory.lap("mesh")
    return {
        "grid": grid, "way": way, "seconds": round(seconds, 1), "vertices": len(vertices), "faces": len(faces),
        "gigabytes_above_model": round(memory.peaks["mesh"] - memory.peaks["model"], 3),
        "gigabytes_of_the_grids": round(grid**3 * 16 / 1e9, 3),
        "bound_by": "slabs: the heads' matrix products at all nodes; coarse to fine: lookups at scattered points",
    }  # fmt: skip


SECTIONS = {
    "raster": bench_raster,
    "isosurface": bench_isosurface,
    "grid": bench_grid,
    "neus": bench_neus,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketches", type=Path, help="folder with raster_numba.py and marching_cubes.py")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rendering.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *rest = args.child
        if name == "neus":
            print(json.dumps(child_neus(*(int(value) for value in rest))))
        else:
            print(json.dumps(child_memory(int(rest[0]), rest[1], int(rest[2]))))
        return
    numba.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    rates: Record = {"bytes_per_second": bandwidth(), "flops_per_second": matmul_rate(torch.float32, "cpu", 1024)}
    report: Record = {"machine": describe(), "quick": args.quick, "measured": rates}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(args.only):
        report[name] = SECTIONS[name](args, rates)
        tqdm.write(json.dumps(report[name], indent=1))
        args.out.write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )  # a run that is stopped keeps these sections
    print(f"{args.out}: {report['machine']}")


if __name__ == "__main__":
    main()
