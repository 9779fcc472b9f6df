"""Cost of other processes on the same cores, by how long OpenMP's threads spin at a barrier.

    python benchmarks/bench_contention.py                                   # the toy box's training step; minutes
    python benchmarks/bench_contention.py --work generation renderer        # a pipeline's call; the volume renderer
    python benchmarks/bench_contention.py --settings unset 1000 0 --seconds 8
    python benchmarks/bench_contention.py --seconds 1 --settings 1000       # a smoke run; its figures mean nothing

Each setting is measured in a process of its own, since libgomp reads its variables when it is loaded: first on an idle
machine, then beside as many busy loops as there are cores. Each loop has normal priority and a session of its own, as
other users' work has; the kernel shares the cores between sessions. With as many loops as cores the fair share of a
process is half of the machine: FAIR = 2 times the idle time. JSON goes to benchmarks/results/contention.json, one entry
per work and setting; entries of other works and settings stay.

Settings: a GOMP_SPINCOUNT, `unset` (libgomp's default), `passive` (OMP_WAIT_POLICY=PASSIVE), `prd` (what the library
sets by itself).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
FAIR = 2.0  # times the idle time, beside as many busy loops as cores
BAR = 3.0
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PRD_SET_VARIABLES")
WORKS = ("step", "renderer", "generation")


def variables(setting: str) -> dict[str, str]:
    """The environment of a measured process."""
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    if setting == "passive":
        return {**clean, "OMP_WAIT_POLICY": "PASSIVE"}
    return clean if setting in ("prd", "unset") else {**clean, "GOMP_SPINCOUNT": setting}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run `loops` processes that compute without end, each in a session of its own."""
    # a loop ends with its parent, however that ended
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"
    words = [sys.executable, "-c", loop]
    processes = [subprocess.Popen(words, start_new_session=True) for _ in range(loops)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make_work(name: str, folder: Path, threads: int) -> Callable[[], object]:
    """Return a call that does one unit of the work."""
    import torch

    torch.set_num_threads(threads)
    if name == "step":
        from bench_training import make_trainer

        trainer = make_trainer(folder, 4, "alternate", threads)
        steps = iter(range(10**9))
        return lambda: trainer.train_step(next(steps))
    from prd import TriplaneTurbo, orbit_cameras

    pipe = TriplaneTurbo.from_pretrained("toybox")

    def generate(kind: str) -> Any:
        return pipe("a red cube", generator=torch.Generator().manual_seed(0), output_type=kind)

    if name == "generation":
        return lambda: generate("mesh")
    from prd.rendering.volume import VolumeRenderer

    field, renderer = generate("field").field, VolumeRenderer()
    azimuth = torch.arange(0.0, 360.0, 90.0)[None]
    cameras = orbit_cameras(torch.full_like(azimuth, 15.0), azimuth, distance=2.5, fovy=40.0)

    def render() -> object:
        with torch.no_grad():
            return renderer(field, cameras, height=64, width=64)

    return render


def measure(call: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Seconds per call, over at least two calls and `seconds`."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return {"median_seconds": statistics.median(times), "least_seconds": min(times), "calls": len(times)}


def child(args: argparse.Namespace) -> None:
    """Measure one work under the setting that this process was started with; JSON on the last line of its output."""
    if args.unset:
        import torch  # noqa: F401  # before the library can set a variable
    from prd.utils.environment import in_force  # sets the variables

    from machine import describe  # isort: skip  # imports torch

    with tempfile.TemporaryDirectory() as scratch:
        call = make_work(args.child, Path(scratch), args.threads)
        for _ in range(args.warmup):
            call()
        idle = measure(call, args.seconds)
        with busy(args.loops):
            call()
            beside = measure(call, args.seconds)
    ratio = beside["median_seconds"] / idle["median_seconds"]
    found = {"idle": idle, "busy": beside, "ratio": ratio, "variables": in_force(), "machine": describe()}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--work", nargs="+", choices=WORKS, default=["step"])
    parser.add_argument("--settings", nargs="+", default=["unset", "prd"], help="see above")
    parser.add_argument("--seconds", type=float, default=10.0, help="least time of a measurement, idle and busy each")
    parser.add_argument("--warmup", type=int, default=3, help="calls before the idle measurement")
    parser.add_argument("--loops", type=int, default=cores, help="busy loops; default: as many as cores")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "contention.json")
    parser.add_argument("--child", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--unset", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    path: Path = args.output
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"results": {}}
    report |= {"fair_ratio": (args.loops + cores) / cores, "bar": BAR}
    numbers = ["--seconds", str(args.seconds), "--warmup", str(args.warmup), "--loops", str(args.loops)]
    for work in args.work:
        for setting in args.settings:
            words = [sys.executable, __file__, "--child", work, "--threads", str(args.threads), *numbers]
            words += ["--unset"] if setting == "unset" else []
            done = subprocess.run(words, env=variables(setting), stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            report["machine"] = found.pop("machine")
            report["results"].setdefault(work, {})[setting] = {**found, "loops": args.loops}
            idle, beside = found["idle"]["median_seconds"], found["busy"]["median_seconds"]
            print(
                f"{work:10} {setting:8} idle {idle:.3f} s, busy {beside:.3f} s: {found['ratio']:.2f} times", flush=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
