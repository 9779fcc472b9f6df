"""Description of the machine that every benchmark reports, and its limits of time and memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine: processor, cores, memory, device, versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "amx": bool(features.get("amx_tile", False)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: str, size: int = 4096, repeats: int = 5) -> float:
    """Floating-point operations a second of the best of a few size^3 matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class PeakMemory:
    """Peak memory by stage: of the process (Linux's VmHWM, set back between stages) or of the CUDA device.

    peaks  {stage: gigabytes}; where the peak cannot be set back, that of the process so far
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def lap(self, stage: str) -> None:
        """Note the peak since the last reset or lap."""
        if self.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self.device)
        elif not Path("/proc/self/status").exists():
            unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        else:
            status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        self.peaks[stage] = round(peak / 1e9, 3)
        self.reset()
