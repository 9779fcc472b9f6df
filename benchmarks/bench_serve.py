"""`prd serve` under load: many clients at once, nothing lost, memory flat.

    python benchmarks/bench_serve.py                                     # 50 clients, 500 meshes of the toy box, CPU
    python benchmarks/bench_serve.py --clients 8 --requests 16           # a smoke run
    python benchmarks/bench_serve.py --url http://127.0.0.1:8000         # a service that runs already

Each client asks for a mesh, waits, reads its file and asks again. Meshes are coarse and of one denoising step, so that
what is measured is the service. Every prompt and seed is compared with what the file says of its making. Memory is that
of the service's process, as its /metrics says. Writes results/serve.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from machine import describe  # noqa: E402

from prd.utils.files import write_atomic  # noqa: E402

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("cube", "sphere", "cone", "cylinder", "torus", "wedge", "arrow", "mug")
WAIT = 300  # seconds that a client waits for a mesh
SAMPLES = 20  # of memory


def ask(url: str, body: Any = None) -> tuple[int, bytes]:
    """Return status and body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT + 30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def memory(url: str) -> float:
    """Return the resident memory of the service, megabytes."""
    found = re.search(r"^process_resident_memory_bytes (\d+)", ask(f"{url}/metrics")[1].decode(), re.M)
    return round(int(found[1]) / 1e6, 1) if found else float("nan")


def one_mesh(url: str, number: int, options: dict[str, Any]) -> str:
    """Ask for a mesh and read it; returns what became of it."""
    prompt = f"a {COLORS[number % 6]} {SHAPES[number // 6 % 8]}"
    while True:
        status, body = ask(f"{url}/v1/meshes?wait={WAIT}", {"prompt": prompt, "seed": number, "options": options})
        if status != 429:
            break
        time.sleep(1)
    if status != 202:
        return f"status {status}"
    job = json.loads(body)
    if job["status"] != "done":
        return str(job["status"])
    status, data = ask(url + job["file"])
    if status != 200:
        return f"file: status {status}"
    made = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])["asset"]["extras"]
    return "done" if (made["prompt"], made["seed"]) == (prompt, number) else "another client's mesh"


def load_test(url: str, clients: int, requests: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `clients` clients that ask for `requests` meshes together saw."""
    lock, became, seconds, samples = threading.Lock(), Counter[str](), list[float](), list[list[float]]()
    every, begin = max(1, requests // SAMPLES), time.perf_counter()

    def client(number: int) -> None:
        start = time.perf_counter()
        result = one_mesh(url, number, options)
        with lock:
            became[result] += 1
            seconds.append(time.perf_counter() - start)
            count = len(seconds)
        if count % every == 0:
            samples.append([count, memory(url)])
            print(f"{count} of {requests}: {samples[-1][1]} MB", flush=True)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(requests)))
    elapsed, ordered = time.perf_counter() - begin, sorted(seconds)
    settled = [megabytes for count, megabytes in samples if count >= requests / 5]
    return {
        "clients": clients,
        "requests": requests,
        "became": dict(became),
        "lost": requests - became["done"],
        "seconds": round(elapsed, 1),
        "meshes_per_second": round(requests / elapsed, 3),
        "latency_seconds": {
            f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 95, 99)
        },
        "memory_megabytes": samples,
        "memory_after_a_fifth_megabytes": {"least": min(settled), "most": max(settled), "last": settled[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=None, help="of a service that runs; default: one is started")
    parser.add_argument("--model", default="toybox", help="of the service that is started")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--resolution", type=int, default=24, help="nodes per axis of the isosurface grid")
    parser.add_argument(
        "--steps", type=int, default=1, help="denoising steps; 0: as trained, and for single-pass models"
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--cpu", default=None, help="words for the processor, in the place of what the system says")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serve.json")
    args = parser.parse_args()
    options = {"resolution": args.resolution, "faces": 500, "vertex_colors": True, "steps": args.steps or None}
    service = None
    if args.url is None:
        command = [sys.executable, "-m", "prd.cli", "serve", "--port", "0", "--rate", "0", "--model", args.model]
        command += ["--batch-size", str(args.batch_size)]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert service.stdout is not None
        args.url = service.stdout.readline().split(": ")[0]
    try:
        while ask(f"{args.url}/health")[0] != 200:
            time.sleep(1)
        result = load_test(args.url, args.clients, args.requests, options)
    finally:
        status = None
        if service is not None:
            service.terminate()
            status = service.wait(60)
    machine = describe() | ({"cpu": args.cpu} if args.cpu else {})
    report = {"machine": machine, "model": args.model, "options": options, "batch_size": args.batch_size, **result}
    report["exit_status"] = status
    write_atomic(args.output, json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("became", "lost", "seconds", "latency_seconds")}, indent=1))


if __name__ == "__main__":
    main()
