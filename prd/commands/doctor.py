"""`prd doctor`: whether this machine and its packages are fit, and how fast they are."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prd.commands.info import size
from prd.utils.environment import in_force
from prd.utils.machine import DISTRIBUTION, PACKAGES, cores, memory_bytes, processor, processor_flags, version_of

IMPORTED = {  # which break where a wheel does not fit
    "torch": lambda: importlib.import_module("torch"),
    "diffusers": lambda: importlib.import_module("diffusers"),
    "transformers": lambda: importlib.import_module("transformers"),
    "numba": lambda: importlib.import_module("numba"),
}
IMPORT_TORCH = ("diffusers", "transformers")  # and fail where it does, whole as they may be
FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_tile": "AMX", "amx_bf16": "AMX BF16"}
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES", "HF_HOME")
MATRICES = (256, 1024)  # sides
MATRIX_SECONDS = 0.5  # of each precision
SPEED_SECONDS = 10.0  # of the whole test; the second generation is left out where it would take longer
PROMPT, SMALL = "a red cube", {"isosurface_resolution": 64, "target_faces": 1000, "texture_size": None}


@dataclass(frozen=True)
class Extra:
    """An optional package: the module that it is found by, what it gives, and how it is installed."""

    module: str
    gives: str
    install: str
    only: str = ""  # sys.platform


def _extra(name: str) -> str:
    return f"pip install '{DISTRIBUTION}[{name}]'"


EXTRAS = {
    "DracoPy": Extra("DracoPy", "compressed geometry in .glb", _extra("draco")),
    "usd-core": Extra("pxr", "meshes as .usdz", _extra("usd")),
    "imageio-ffmpeg": Extra("imageio_ffmpeg", "previews as .mp4", _extra("video")),
    "shtab": Extra("shtab", "completion in the shell, prd completion", _extra("completion")),
    "open_clip_torch": Extra("open_clip", "open_clip's models in prd evaluate", _extra("eval")),
    "fastapi": Extra("fastapi", "meshes over HTTP, prd serve", _extra("serve")),
    "uvicorn": Extra("uvicorn", "meshes over HTTP, prd serve", _extra("serve")),
    "gradio": Extra("gradio", "a page in the browser, prd demo", _extra("demo")),
    "xformers": Extra("xformers", "attention that takes less memory on CUDA", _extra("cuda"), only="linux"),
    "nvdiffrast": Extra(
        "nvdiffrast",
        "a faster rasteriser on CUDA",
        "pip install --no-build-isolation git+https://github.com/NVlabs/nvdiffrast",
    ),
}


def add_doctor(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    doctor = commands.add_parser("doctor", help="versions, devices, threads, memory, missing extras, a speed test")
    doctor.add_argument("--json", action="store_true", help="everything, as one JSON object")
    doctor.add_argument("--no-speed-test", action="store_true", help="leave the ten seconds of measuring out")


def run_doctor(args: argparse.Namespace) -> int:
    """Print what is found; returns 0, and 2 where something that is required is broken."""
    found = examine(speed=not args.no_speed_test)
    print(json.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))
    return 2 if found["broken"] else 0


def examine(*, speed: bool = True) -> dict[str, Any]:
    """Return plain values about packages, processor, devices, threads, memory and disk; `broken`: what to mend."""
    broken = [*_unfit_versions(), *_unfit_imports()]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "processor": _processor(),
        "memory": _memory(),
        "disk": _disk(),
        "extras": _extras(),
    }
    if "torch" not in "".join(broken):
        found |= {"devices": _devices(), "backends": _backends(), "threads": _threads()}
    if speed and not broken:
        try:
            found["speed"] = _speed()
        except Exception as error:  # whatever it is, it is what the user came to learn
            broken.append(f"a toy generation failed: {type(error).__name__}: {' '.join(str(error).split())}")
    return found | {"broken": broken}


def _unfit_versions() -> Iterator[str]:
    """Yield the requirements of the installed distribution that are not met, one sentence each."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout
        required = []
    from packaging.requirements import Requirement

    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, wanted = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None:
            yield f"{requirement.name} is not installed; pip install '{wanted}'"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, {requirement.specifier} is needed; pip install '{wanted}'"


def _unfit_imports() -> Iterator[str]:
    without: tuple[str, ...] = ()
    for name, load in IMPORTED.items():
        if name in without:
            continue
        try:
            load()
        except Exception as error:  # of a broken installation, of any class
            without = IMPORT_TORCH if name == "torch" else without
            reason = " ".join(str(error).split())[:300]
            yield f"{name} cannot be imported ({type(error).__name__}: {reason}); pip install --force-reinstall {name}"


def _processor() -> dict[str, Any]:
    flags = processor_flags()
    known = None if flags is None else {label: flag in flags for flag, label in FLAGS.items()}
    return {"name": processor(), "cores": os.cpu_count(), "cores_for_this_process": cores(), "flags": known}


def _memory() -> dict[str, int | None]:
    """Bytes in all, those that are free now, and the limit of a container."""
    import psutil  # of accelerate

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return {
        "total": memory_bytes() or None,
        "available": psutil.virtual_memory().available,
        "limit": int(text) if text.isdigit() else None,
    }


def _disk() -> dict[str, dict[str, Any]]:
    """Free bytes where models are kept, where temporary files are, and here."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    places = {"models of the Hub": home, "temporary files": Path(tempfile.gettempdir()), "this folder": Path.cwd()}
    found = {}
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
        found[name] = {"place": str(place), "free": free, "writable": writable}
    return found


def _extras() -> dict[str, dict[str, Any]]:
    return {
        name: {
            "installed": importlib.util.find_spec(extra.module) is not None,
            "version": version_of(name),
            "gives": extra.gives,
            "install": extra.install,
        }
        for name, extra in EXTRAS.items()
        if not extra.only or sys.platform.startswith(extra.only)
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "capability": torch.backends.cpu.get_cpu_capability()}]
    for k in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(k)
        found.append({"name": f"cuda:{k}", "card": card.name, "memory": card.total_memory, "cuda": torch.version.cuda})
    if torch.backends.mps.is_available():
        found.append({"name": "mps"})
    return found


def _backends() -> dict[str, str]:
    """Name the rasteriser, the attention and the precision of large models on this machine."""
    import torch

    has_cuda = torch.cuda.is_available()
    return {
        "rasteriser": "nvdiffrast" if has_cuda and importlib.util.find_spec("nvdiffrast") else "numba",
        "attention": "torch; xformers on request" if importlib.util.find_spec("xformers") else "torch",
        "matrix products": "MKL" if torch.backends.mkl.is_available() else "without MKL",
        "convolutions": "oneDNN" if torch.backends.mkldnn.is_available() else "without oneDNN",
    }


def _threads() -> dict[str, Any]:
    import torch

    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    ours = {name: entry["value"] for name, entry in in_force().items() if entry["value"] is not None}
    return {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(), "variables": ours | variables}


def _speed() -> dict[str, Any]:
    """Rates of matrix products, and seconds of a toy generation; the generation is repeated where time is left."""
    import torch

    from prd.hub.shipped import shipped_names
    from prd.pipelines.auto import load_pipeline

    name, begun = shipped_names()[0], time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {kind: _matrix_rate(getattr(torch, kind), device) for kind in ("float32", "bfloat16")}
    loading = time.perf_counter()
    pipe: Any = load_pipeline(name, device=device)
    loaded = time.perf_counter() - loading
    seconds: list[float] = []  # the first compiles kernels that numba has not kept
    while not seconds or len(seconds) < 2 and time.perf_counter() - begun + seconds[0] < SPEED_SECONDS:
        start = time.perf_counter()
        pipe(PROMPT, **SMALL)
        seconds.append(round(time.perf_counter() - start, 2))
    return {
        "device": device,
        "model": name,
        "matrix_gflops": rates,
        "load_seconds": round(loaded, 2),
        "first_generation_seconds": seconds[0],
        "next_generation_seconds": seconds[1] if len(seconds) > 1 else None,
    }


def _matrix_rate(dtype: Any, device: str) -> float:
    """10^9 operations per second of matrix products; of small ones where large ones take too long."""
    rate = _rate_of(MATRICES[0], dtype, device, seconds=0.1)
    large = MATRICES[1]
    return _rate_of(large, dtype, device, MATRIX_SECONDS) if 2 * large**3 < 0.2 * MATRIX_SECONDS * rate * 1e9 else rate


def _rate_of(side: int, dtype: Any, device: str, seconds: float) -> float:
    import torch

    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.mm(a, b)
    wait()
    count, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds or not count:
        torch.mm(a, b)
        wait()
        count += 1
    return round(2 * side**3 * count / passed / 1e9, 1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    cpu, memory = found["processor"], found["memory"]
    yield f"python       {found['python']} on {found['system']}"
    yield f"packages     {', '.join(f'{name} {version}' for name, version in found['packages'].items())}"
    yield f"processor    {cpu['name']}: {cpu['cores']} cores, {cpu['cores_for_this_process']} for this process"
    if cpu["flags"] is not None:
        yield f"  has        {', '.join(name for name, there in cpu['flags'].items() if there) or 'none of these'}"
        yield f"  lacks      {', '.join(name for name, there in cpu['flags'].items() if not there) or 'none of these'}"
    for device in found.get("devices", ()):
        yield "device       " + ", ".join(size(v) if k == "memory" else str(v) for k, v in device.items())
    for name, value in found.get("backends", {}).items():
        yield f"  {name}: {value}"
    if (threads := found.get("threads")) is not None:
        yield f"threads      torch {threads['torch']}, between operations {threads['interop']}"
        if threads["torch"] < cpu["cores_for_this_process"]:
            yield "  note       fewer than cores; OMP_NUM_THREADS or MKL_NUM_THREADS says otherwise"
        yield "  variables  " + " ".join(f"{name}={value}" for name, value in sorted(threads["variables"].items()))
    limit = "" if memory["limit"] is None else f", of which this container may use {size(memory['limit'])}"
    yield f"memory       {size(memory['total'] or 0)}{limit}; {size(memory['available'])} free"
    for name, disk in found["disk"].items():
        yield f"disk         {size(disk['free'])} free for {name}{'' if disk['writable'] else ' (cannot be written)'}"
    for name, extra in found["extras"].items():
        state = f"{extra['version'] or 'installed'}" if extra["installed"] else f"missing: {extra['install']}"
        yield f"extra        {name} ({extra['gives']}): {state}"
    if (speed := found.get("speed")) is not None:
        rates = ", ".join(f"{name} {rate} GFLOP/s" for name, rate in speed["matrix_gflops"].items())
        yield f"speed        {speed['device']}: {rates}"
        later = speed["next_generation_seconds"]
        again = "" if later is None else f", the next in {later} s"
        made = f"loaded in {speed['load_seconds']} s, a mesh in {speed['first_generation_seconds']} s{again}"
        yield f"  {speed['model']:11s}{made}"
    for fault in found["broken"]:
        yield f"BROKEN       {fault}"
    yield "nothing that is required is broken" if not found["broken"] else f"{len(found['broken'])} things to mend"
