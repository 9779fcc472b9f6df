"""Process settings of a training run: its share of the cores, its answer to signals, its end with the launcher."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import ProjectConfiguration

from prd.errors import ConfigError
from prd.training.run.launcher import ABLATION, LAUNCHED, launched_by, read_launch, warn_of_differences
from prd.utils.machine import cores
from prd.utils.memory import keep_freed_memory
from prd.utils.printing import keep_printing

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
SHARDING = tuple(f"ACCELERATE_USE_{way}" for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"))
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def begin_process(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """The accelerator of this process, and the config with its number of threads settled.

    Raises ConfigError for a precision that the device does not compute in.
    """
    keep_printing()
    launch, given = read_launch(), config
    config = replace(config, num_threads=choose_threads(config.num_threads))
    keep_freed_memory()
    end_with_launcher()
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision='fp16': needs a CUDA device; use bf16 or no")
    places = ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / "trackers"))
    run_data_parallel()
    train_together()
    if is_initialized() and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # of an earlier run in this process, which keeps a copy
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=config.report_to, project_config=places)
    accelerator.gradient_accumulation_steps = 1  # the trainer divides by its own; else by the launcher's as well
    if accelerator.is_main_process:
        warn_of_differences(launch, given, accelerator.num_processes)
    assert config.num_threads is not None
    torch.set_num_threads(config.num_threads)  # Accelerate may have set another number
    return accelerator, config


def choose_threads(asked: int | None) -> int:
    """torch's threads for this process: as asked, else as the user set OMP_NUM_THREADS, else its share of the cores."""
    if asked is not None:
        return asked
    if (threads := threads_of_user(os.environ, Path(f"/proc/{os.getppid()}"))) is not None:
        return threads
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, cores() // processes)


def threads_of_user(environment: Mapping[str, str], parent: Path) -> int | None:
    """OMP_NUM_THREADS if the user set it, None if it is unset or set by the launcher of the processes alone.

    Launchers put OMP_NUM_THREADS=1 into the environment of what they launch. It is the user's if the launcher had it
    itself, or was told a number: `parent` is the launcher's folder in /proc. Without /proc a launcher's 1 counts as its
    own.
    """
    value = environment.get(THREADS, "")
    if not value.isdigit() or int(value) < 1:
        return None
    if value == "1" and any(name in environment for name in LAUNCHED):
        try:
            theirs = (parent / "environ").read_bytes().split(b"\0")
            words = (parent / "cmdline").read_bytes()
        except OSError:
            return None
        if not any(entry.startswith(f"{THREADS}=".encode()) for entry in theirs) and b"num_cpu_threads" not in words:
            return None
    return int(value)


def end_with_launcher() -> bool:
    """Have the system send SIGTERM when the launcher of this process dies; whether it will (Linux, where there is one).

    `accelerate launch` of one process dies of a SIGTERM without passing it on, and nothing passes on a kill -9: without
    this the run would go on unseen, in the way of the one that is resumed.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not launched_by(os.environ, Path(f"/proc/{parent}")):
        return False
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent or os.environ.get(ABLATION, str(parent)) != str(parent):  # it died before it was watched
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def run_data_parallel() -> None:
    """Turn Accelerate's ways to shard off, with a warning: only adapters are trained, and nothing is wrapped.

    To be called before the `Accelerator` is made.
    """
    for name in SHARDING:
        if os.environ.get(name, "false").lower() in ("true", "1"):
            os.environ[name] = "false"
            logger.warning("%s: the trainer exchanges its few gradients by itself; running as data parallel", name)


def train_together() -> None:
    """Have the processes of a launcher train together on the CPU, where each would take itself for the only one.

    Accelerate counts the processes of a machine without an accelerator where it is told to use the CPU alone. To be
    called before the `Accelerator` is made.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


class StopRequest:
    """SIGTERM and Ctrl-C as a request that the loop grants after its step.

    with StopRequest() as stop:
        ...
        if stop.name: save and leave

    Signals that follow the first change nothing: launchers pass on what the terminal has already sent.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            logger.warning("%s: finishing the step, then saving a checkpoint", self.name)
