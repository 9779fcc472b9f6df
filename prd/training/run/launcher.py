"""The words that `accelerate launch` or torchrun was given, and those that a run follows.

`mixed_precision` and `gradient_accumulation_steps` are taken from the launcher where neither the recipe nor the command
line of the training sets them. What differs from the training config, or what the trainer does not do, is warned of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)

ABLATION = "PRD_ABLATION"  # set by `prd ablate` for its runs: its process id
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", ABLATION)  # set by accelerate launch and torchrun
FOLLOWED = ("mixed_precision", "gradient_accumulation_steps")
ENTRY_POINTS = ("accelerate-launch", "accelerate.commands.launch", "launch.py")  # words before the launcher's own
COMMANDS = ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py")  # the same, and a word `launch`


@dataclass(frozen=True)
class Launch:
    """The words of a launcher, by its command line, its config file or the variables it set; None: there are none."""

    mixed_precision: str | None = None  # "no" if its command line says so; that is what it takes by itself too
    gradient_accumulation_steps: int | None = None
    num_processes: int | None = None
    num_cpu_threads_per_process: int | None = None
    dynamo_backend: str | None = None

    def told(self) -> dict[str, Any]:
        """The values that it was told, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_launch(environment: Mapping[str, str] | None = None, parent: Path | None = None) -> Launch:
    """Return what the launcher of this process was told; `parent` is the launcher's folder in /proc."""
    environment = os.environ if environment is None else environment
    parent = parent or Path(f"/proc/{os.getppid()}")
    given = _given(parent) if launched_by(environment, parent) else {}
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # set by --use_deepspeed alone
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return Launch(
        given.get("mixed_precision") or (precision if precision != "no" else None),
        given.get("gradient_accumulation_steps") or (int(steps) if steps.isdigit() and steps != "1" else None),
        given.get("num_processes"),
        given.get("num_cpu_threads_per_process"),
        dynamo if dynamo != "no" else None,
    )


def launched_by(environment: Mapping[str, str], parent: Path) -> bool:
    """Return True if the parent, a folder in /proc, is the launcher: it set variables that it had not itself."""
    try:
        theirs = (parent / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    names = {entry.partition(b"=")[0].decode(errors="replace") for entry in theirs}
    return any(name in environment and name not in names for name in LAUNCHED)


def _given(parent: Path) -> dict[str, Any]:
    """Return the options of an `accelerate launch`, and of its config file what its command line leaves out."""
    try:
        words = _own_words((parent / "cmdline").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return {}
    if words is None:
        return {}
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        given = vars(launch_command_parser().parse_args(words))
        if given["config_file"] is not None or (Path(default_config_file).is_file() and not given["cpu"]):
            processes = getattr(load_config_from_file(given["config_file"]), "num_processes", None)
            given["num_processes"] = given["num_processes"] or processes
    except (SystemExit, OSError, ValueError, KeyError):  # of another version, or a file that is gone
        return {}
    return given


def _own_words(command: list[str]) -> list[str] | None:
    """Return the words of a command line that `accelerate launch` reads; None if it is another command."""
    for i, word in enumerate(command[:4]):
        name = PurePath(word).name
        if name in ENTRY_POINTS:
            return command[i + 1 : -1]  # the last one is empty: each ends with a zero byte
        if name in COMMANDS and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 : -1]
    return None


def with_launcher(values: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """Return the values of a recipe, with the launcher's where they set none."""
    told = launch.told()
    return {**{name: told[name] for name in FOLLOWED if name in told}, **values}


def warn_of_differences(launch: Launch, config: TrainConfig, num_processes: int) -> None:
    """Say who decides where the launcher was told something else than the run does.

    config         as the user gave it, its number of threads not settled yet
    num_processes  that train together
    """
    for name, option in (*((name, name) for name in FOLLOWED), ("num_threads", "num_cpu_threads_per_process")):
        ours, theirs = getattr(config, name), getattr(launch, option)
        if None not in (ours, theirs) and ours != theirs:
            logger.warning(
                "%s=%s of the training config decides, not the launcher's %s %s; write --%s %s after the script's name",
                *(name, ours, option, theirs, name, theirs),
            )
    prompts = num_processes * config.gradient_accumulation_steps * config.train_batch_size
    if config.global_batch_size not in (None, prompts):
        logger.warning(
            "%d prompts per step, and optimizer.lr=%g is for the %d of global_batch_size: start %s, set "
            "--gradient_accumulation_steps, or choose another learning rate and --global_batch_size %d",
            *(prompts, config.optimizer.lr, config.global_batch_size),
            *(_processes_for(config), prompts),
        )
    if launch.dynamo_backend is not None:
        logger.warning("the launcher's dynamo_backend %s is ignored: training compiles nothing", launch.dynamo_backend)
    if launch.num_processes is not None and launch.num_processes > num_processes:
        logger.warning(
            "the launcher was told num_processes %d and started %d, as Accelerate does on a CPU: each step takes %s of "
            "the prompts; start them by `torchrun --nproc_per_node %d SCRIPT`, or write --gradient_accumulation_steps "
            "%d for the same prompts per step",
            *(launch.num_processes, num_processes, f"{num_processes}/{launch.num_processes}", launch.num_processes),
            config.gradient_accumulation_steps * launch.num_processes // num_processes,
        )


def _processes_for(config: TrainConfig) -> str:
    """Say how many processes take the config's global batch."""
    number, rest = divmod(config.global_batch_size or 0, config.gradient_accumulation_steps * config.train_batch_size)
    return f"{number} processes (accelerate launch --num_processes {number})" if not rest else "other processes"
