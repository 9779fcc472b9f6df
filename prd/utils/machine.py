"""The machine and the packages of this process, as plain values."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "prd-3d"
PACKAGES = (
    *(DISTRIBUTION, "torch", "diffusers", "peft", "accelerate", "transformers", "datasets", "safetensors"),
    *("huggingface_hub", "trimesh", "numpy", "numba", "scipy", "fast-simplification", "pillow"),
)


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor()


def processor_flags() -> set[str] | None:
    """Return the instruction sets that the system lists of its processor; None where it lists none (not on Linux)."""
    found = _cpuinfo("flags") or _cpuinfo("Features")
    return set(found.split()) if found else None


def memory_bytes() -> int:
    """Return the main memory of the machine; 0 where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(key: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None
