"""The folder of a run before its first step: that it is free, who writes into it, and where the run took place."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from prd.errors import ConfigError, PrdError
from prd.training.run.checkpoints import named_checkpoint
from prd.training.run.launcher import read_launch
from prd.training.run.places import check_places, place_faults
from prd.utils.arguments import check_writable_folder
from prd.utils.environment import in_force
from prd.utils.files import LOCK, folder_lock, read_json, write_atomic
from prd.utils.machine import PACKAGES, memory_bytes, processor, version_of
from prd.utils.memory import release_freed_memory

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"


def check_run(config: TrainConfig) -> None:
    """Raise for what a run reads, writes or reports to that cannot be used; loads no model.

    What the user named comes first: the output folder may be the recipe's. Raises ConfigError and CorpusError.
    """
    check_named(config)
    check_output_folder(config)
    folder = Path(config.output_dir)
    if os.environ.get("RANK", "0") == "0" and (folder / LOCK).is_file():  # of the processes of a run, the one that asks
        with run_lock(folder):
            pass


def check_named(config: TrainConfig) -> None:
    """Raise for a place or a tracker that the config names and that is not there; ConfigError and CorpusError."""
    check_places(config)
    check_tracker(config)


def run_faults(config: TrainConfig) -> list[str]:
    """Every reason for which `check_run` would raise, in one sentence each; writes nothing."""
    found = [str(error) for error in place_faults(config)]
    for check in (check_tracker, check_output_folder):
        try:
            check(config)
        except PrdError as error:
            found.append(str(error))
    return found


def check_output_folder(config: TrainConfig) -> None:
    """`ConfigError` if `output_dir` cannot be written, or holds a run that this one does not continue."""
    folder = check_writable_folder("output_dir", config.output_dir)
    name = config.resume_from_checkpoint
    if name == "latest" or (name is not None and named_checkpoint(name, folder).resolve().parent == folder.resolve()):
        return
    if found := _traces_of_a_run(folder):
        raise ConfigError(
            f"output_dir={config.output_dir!r}: holds another run ({found}); continue it with "
            "--resume_from_checkpoint latest, or name another folder"
        )


def _traces_of_a_run(folder: Path) -> str:
    """Describe in words the files that a run has left in a folder; empty if it has not taken a step there."""
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        return metrics.name
    if found := next((name for name in ("adapter", "generator") if (folder / name).exists()), ""):
        return found
    return next((path.name for path in sorted(folder.glob("checkpoint-*")) if path.is_dir()), "")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, as its main process does while it trains; the system frees it however the process ends.

    Raises ConfigError if another process holds it: two that train into one folder destroy each other's checkpoints.
    """
    with folder_lock(folder, "output_dir", "training"):
        yield


def check_tracker(config: TrainConfig) -> None:
    """`ConfigError` for a `report_to` that Accelerate does not know or whose package is not installed."""
    name = config.report_to
    if name is None or name == "all":
        return
    known = sorted(str(logger) for logger in LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ConfigError(f"report_to={name!r}: no tracker of Accelerate; allowed are null, all, {', '.join(known)}")
    if name not in {str(logger) for logger in get_available_trackers()}:
        raise ConfigError(f"report_to={name!r}: its package is not installed; pip install {name}, or --report_to null")


def environment(num_processes: int = 1) -> dict[str, Any]:
    """Package versions, git revision, hardware, variables and command of this process, as JSON can hold them."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": git_revision(Path(__file__).resolve().parents[3]),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "hardware": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "memory_gigabytes": round(memory_bytes() / 1e9, 1),
            "devices": [{"name": d.name, "memory_gigabytes": round(d.total_memory / 1e9, 1)} for d in devices],
            "cuda": torch.version.cuda,
        },
        "processes": num_processes,
        "launcher": read_launch().told(),
        "threads": torch.get_num_threads(),
        "variables": in_force(),
    }


def write_environment(folder: Path, num_processes: int = 1) -> None:
    """Write `environment.json`; a resumed run's goes to the end of the list, since it may be another machine."""
    path = folder / ENVIRONMENT
    earlier = read_json(path, [])
    write_atomic(path, json.dumps([*earlier, environment(num_processes)], indent=1) + "\n")


def note_first_step(folder: Path, seconds: float) -> None:
    """Add to `environment.json` how many seconds after its start the process had taken its first step."""
    path = folder / ENVIRONMENT
    *earlier, own = read_json(path, []) or [{}]
    if isinstance(own, dict):
        own["seconds_to_first_step"] = round(seconds, 1)
        write_atomic(path, json.dumps([*earlier, own], indent=1) + "\n")


def open_metrics(path: Path, steps: int) -> TextIO:
    """metrics.jsonl, ready for the line after `steps`.

    Lines of later steps, from before a resume, are dropped, and a last line that a full disk or a kill cut short.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if steps and path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
    write_atomic(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def metrics_line(steps: int, values: Mapping[str, float]) -> str:
    """Return the measures after `steps`, to five digits, as a line of metrics.jsonl; null if not a finite number."""
    rounded = {name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": steps, **rounded}, allow_nan=False) + "\n"


def git_revision(root: Path) -> dict[str, Any] | None:
    """Commit of the work tree whose top is `root`, and whether files differ from it; None outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # an installed copy inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory(device: torch.device) -> float:
    """Gigabytes at the process's peak so far: allocated on its CUDA device, or resident in main memory.

    NaN where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (place := Path("/proc/self/clear_refs")).exists():
        release_freed_memory()
        with suppress(OSError):
            place.write_text("5", encoding="utf-8")
