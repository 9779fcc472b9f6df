"""Runs of a table: each cell and seed an ordinary training run in a folder that its configuration names.

A run folder is named by the recipe, a hash of the resolved configuration and the seed: cells of several tables that are
the same run share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prd.errors import ConfigError
from prd.evaluation.ablations.tables import Ablation, check_cells
from prd.evaluation.report import Run, RunError, read_run
from prd.training.command_line import split_words
from prd.training.config import TrainConfig
from prd.training.recipes import load_config
from prd.training.run.resume import comparable, flat
from prd.utils.arguments import check_writable_folder
from prd.utils.files import read_json

logger = logging.getLogger(__name__)

ALONE = ("--num_threads=1", "--report_to=null", "--checkpoints_total_limit=1")  # of every run: one core each
RESUMED = ("--resume_from_checkpoint=latest", "--start_afresh")
FREE = (  # top-level keys that make no other run
    *("seed", "output_dir", "fits", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("start_afresh", "allow_config_change", "report_to", "num_threads"),
)
OWN = {  # keys that the command sets by itself, and what to give instead
    "config": "the table names its recipe",
    "seed": "give --seeds and --seed_start",
    "output_dir": "give it as --output_dir, the folder of all runs",
    "num_threads": "each run has one; give --jobs for the runs at a time",
    "max_train_steps": "give --steps",
    "max_train_minutes": "give --minutes",
    **dict.fromkeys(("resume_from_checkpoint", "start_afresh"), "unfinished runs are always resumed"),
    **dict.fromkeys(("report_to", "checkpoints_total_limit", "allow_config_change"), "it is the same for all runs"),
}


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run of a cell with a seed."""

    cell: str
    folder: Path
    words: tuple[str, ...]  # of the command line of `prd train`
    config: TrainConfig
    seconds_per_step: float  # an estimate

    @property
    def seed(self) -> int:
        """The seed of every draw of the run."""
        return self.config.seed


@dataclass(frozen=True)
class Plan:
    """Runs that a table asks for, and the configuration of every cell.

    runs     of the cells and seeds asked for; cells that are the same run have one together
    configs  by cell, of all cells; the seed in them means nothing
    folders  by cell: what the names of its run folders begin with
    """

    table: Ablation
    runs: list[PlannedRun]
    configs: dict[str, TrainConfig]
    folders: dict[str, Path]


def plan_runs(
    table: Ablation,
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = range(3),
    only: list[str] | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    minutes: float | None = None,
) -> Plan:
    """Resolve every cell of a table, and plan the runs of some cells and seeds, all cells of a seed before the next.

    overrides       words of a training command line, for all cells
    steps, minutes  of each run, in the place of the table's

    Raises ConfigError for a value that is not allowed, a key that the cells are there to change, and a folder that
    holds a run of another configuration.
    """
    output = check_writable_folder("output_dir", output_dir)
    cells = check_cells(table, only)
    words = [*_words(table.settings), *_length(table, steps, minutes), *_checked(table, overrides)]
    configs, folders, given = {}, {}, {}
    for name, cell in table.cells.items():
        given[name] = (*words, *_words(cell.changes), *ALONE)
        configs[name] = _load(table, name, given[name])
        recipe = Path(table.recipe_of(name)).stem
        folders[name] = output / f"{recipe}-{config_id(configs[name])}-seed"
    runs: dict[Path, PlannedRun] = {}
    for seed in seeds:
        for name in cells:
            folder = Path(f"{folders[name]}{seed}")
            config = replace(configs[name], seed=seed, output_dir=str(folder))
            own = (f"--config={table.recipe_of(name)}", *given[name], f"--seed={seed}", f"--output_dir={folder}")
            seconds = table.cells[name].seconds_per_step or table.seconds_per_step
            runs.setdefault(folder, PlannedRun(name, folder, (*own, *RESUMED), config, seconds))
    for run in runs.values():
        check_folder(run.folder, run.config)
    return Plan(table, list(runs.values()), configs, folders)


def config_id(config: TrainConfig) -> str:
    """Return twelve hexadecimal digits that name a configuration, whatever its seed and its folder."""
    text = json.dumps(settled(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settled(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration by dotted key, without what makes no other run."""
    config = replace(config, schedule_steps=config.total_steps)
    return flat({key: value for key, value in comparable(config).items() if key not in FREE})


def differing(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str] | None = None) -> list[str]:
    """Return "key: before -> after" for every value that differs; keys: those to compare, None: all."""
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in ({**before, **after} if keys is None else keys)
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def state_of(folder: Path) -> Literal["new", "unfinished", "finished"]:
    """Return how far a run is: finished once its model has been saved and measured."""
    if not (folder / "config.yaml").is_file():
        return "new"
    is_finished = bool(read_json(folder / "scores.json", {})) and record_of(folder) is not None
    return "finished" if is_finished else "unfinished"


def record_of(folder: Path) -> dict[str, Any] | None:
    """Return the record beside the weights of a finished run; None without one."""
    records = [read_json(path, None) for path in sorted(folder.glob("*/record.json"))]
    return next((record for record in records if isinstance(record, dict) and "train_steps" in record), None)


def read_finished(folder: Path) -> Run | None:
    """Return a run that is finished; None for any other, with a warning for one that cannot be read."""
    try:
        return read_run(folder) if state_of(folder) == "finished" else None
    except RunError as error:
        logger.warning("left out: %s", error)
        return None


def check_folder(folder: Path, config: TrainConfig) -> None:
    """ConfigError for a folder that holds a run of another configuration, or what is none."""
    if not (folder / "config.yaml").is_file():
        return
    try:
        found = load_config(folder / "config.yaml")
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder}: its config.yaml cannot be read ({reason}); remove the folder") from None
    before = {**settled(found), "seed": found.seed}
    if other := differing(before, {**settled(config), "seed": config.seed}):
        raise ConfigError(
            f"{folder}: holds a run of another configuration ({'; '.join(other[:3])}); remove the folder, or name "
            "another --output_dir"
        )


def _load(table: Ablation, cell: str, words: Sequence[str]) -> TrainConfig:
    """Return the configuration of a cell; notes of the loader are about words that the user has not written."""
    notes = logging.getLogger("prd.training.recipes")
    before = notes.level
    notes.setLevel(logging.ERROR)
    try:
        config = load_config(table.recipe_of(cell), words)
    except ConfigError as error:
        raise ConfigError(f"{table.name}, {cell}: {error}") from None
    finally:
        notes.setLevel(before)
    if config.benchmark is None:
        raise ConfigError(f"{table.name}, {cell}: benchmark=null: nothing would be measured; name a benchmark")
    return config


def _words(values: Mapping[str, Any]) -> list[str]:
    """Return nested values as words of a training command line."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=list)}"
        for key, value in flat(values).items()
    ]


def _length(table: Ablation, steps: int | None, minutes: float | None) -> list[str]:
    """Return the words for runs of so many steps or minutes."""
    for name, given in (("steps", steps), ("minutes", minutes)):
        if given is not None and table.equal not in (None, name):
            raise ConfigError(
                f"{name}={given}: the cells of {table.name} are compared at equal {table.equal}; give --{table.equal}"
            )
    if minutes is not None:
        return [f"--max_train_minutes={minutes}"]
    return [] if steps is None else [f"--max_train_steps={steps}", "--max_train_minutes=null"]


def _checked(table: Ablation, overrides: Sequence[str]) -> list[str]:
    """Return overrides as words `--key=value`; ConfigError for one of a key that is not free."""
    changed = {key: name for name, cell in table.cells.items() for key in flat(cell.changes)}
    words = []
    for key, value in split_words(overrides):
        if key in OWN:
            raise ConfigError(f"{key}={value}: is no override of an ablation: {OWN[key]}")
        if clash := next((own for own in changed if f"{own}.".startswith(f"{key}.")), None):
            raise ConfigError(
                f"{key}={value}: {table.name} changes {clash} in its cell {changed[clash]!r}; leave it out, or write a "
                "table of your own"
            )
        words.append(f"--{key}={value}")
    return words
