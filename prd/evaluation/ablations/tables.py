"""Tables of ablations as data: one YAML file per table, those of the package in configs/ablations.

extends: k                          # another table: its values, but not its cells
title: Rank of the adapters
claim: Rank 16 beats rank 8 and rank 32.
source: arXiv:2503.21694, supplement E, Table 6
recipe: toybox
settings: {max_train_steps: 132}    # of the recipe, for all cells
decides: {split: single_held_out, figure: iou, better: higher}
baseline: rank=16
cells:
  rank=8: {changes: {model: {rank: 8}}, paper: {R@1: 15.6}}
  rank=16: {extends: K=4, paper: {R@1: 32.3}}       # that cell's changes, in the table that this one extends
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from prd.errors import ConfigError
from prd.training.recipes import merged, read_yaml
from prd.utils.arguments import expanded_path, has_suffix
from prd.utils.checked_types import CHECKS, Float, Positive, Prompt

SHARED = ("recipe", "changes", "seconds_per_step")  # what a cell takes from the cell that it extends


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Deciding:
    """The figure by which a claim is judged."""

    split: str  # of captions: one that the benchmark measures, or one of the table's `captions`
    figure: str  # of the summary of a split: "iou", "r_at_1", ...
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Cell:
    """A row of a table: what it changes of the recipe, and what the paper says of it."""

    recipe: str | None = None  # null: the table's
    changes: dict[str, Any] = field(default_factory=dict)  # nested values of the recipe
    paper: dict[str, Float] = field(default_factory=dict)  # the paper's figures, by their names there
    claimed: Literal["worse", "better"] | None = "worse"  # than the baseline; null: nothing is claimed
    baseline: str | None = None  # the cell that it is compared with; null: the table's
    seconds_per_step: Positive | None = None  # an estimate for one core; null: the table's
    note: str = ""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Ablation:
    """A table of ablations: the claim of a paper, and the cells that are trained to examine it."""

    name: str  # of its file
    title: str
    claim: str
    source: str  # paper, section, table
    recipe: str
    decides: Deciding
    baseline: str  # the cell that the others are compared with
    cells: dict[str, Cell]
    quote: str = ""  # of the paper, word for word
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # nested values of the recipe, of all cells
    equal: Literal["steps", "minutes"] | None = None  # what the claim compares at; null: the steps, but others may be
    captions: dict[str, tuple[Prompt, ...]] = field(default_factory=dict)  # splits of the table's own
    seconds_per_step: Positive = 1.0  # an estimate for one core

    def baseline_of(self, cell: str) -> str:
        """Return the cell that a cell is compared with; a baseline is its own."""
        return self.cells[cell].baseline or self.baseline

    def recipe_of(self, cell: str) -> str:
        """Return the recipe of a cell."""
        return self.cells[cell].recipe or self.recipe


def shipped_tables() -> list[str]:
    """Return the names of the tables in the package."""
    folder = resources.files("prd.configs") / "ablations"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_table(name: str | Path) -> Ablation:
    """Read a table: of the package by its name, or a YAML file.

    Raises ConfigError for a table that is not there, or whose values are not as they must be.
    """
    values, path = _read(name)
    try:
        table = TypeAdapter(Ablation).validate_python(
            {**{str(key): value for key, value in values.items()}, "name": path.stem}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for baseline in (table.baseline, *map(table.baseline_of, table.cells)):
        if baseline not in table.cells:
            raise ConfigError(
                f"{path}: baseline={baseline!r}: must be a cell: {', '.join(table.cells) or 'none is there'}"
            )
    return table


def check_cells(table: Ablation, names: list[str] | None) -> list[str]:
    """Return the cells of these names, all for None; ConfigError for a name that is no cell."""
    for name in names or ():
        if name not in table.cells:
            raise ConfigError(f"only={name!r}: {table.name} has no such cell; give {', '.join(table.cells)}")
    return [cell for cell in table.cells if names is None or cell in names]


def _find(name: str | Path, beside: Path | None = None) -> Path:
    path = expanded_path(name, "table")
    if beside is not None and (near := beside / path).is_file():
        return near
    if path.is_file() and has_suffix(path, (".yaml", ".yml")):
        return path
    if str(name) in shipped_tables():
        return Path(str(resources.files("prd.configs") / "ablations" / f"{name}.yaml"))
    raise ConfigError(f"table={str(name)!r}: is no table; give {', '.join(shipped_tables())}, or a YAML file")


def _read(name: str | Path, beside: Path | None = None, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Path]:
    """Return the values of a table with those of the one that it extends, and its file."""
    path = _find(name, beside)
    if path in seen:
        raise ConfigError(f"{path}: extends={str(name)!r}: extends itself")
    values = read_yaml(path)
    extended = values.pop("extends", None)
    base = _read(extended, path.parent, (*seen, path))[0] if extended is not None else {}
    cells = values.get("cells")
    if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
        raise ConfigError(f"{path}: cells={cells!r}: must be a mapping of names to mappings")
    places = {"settings": values.get("settings"), **{f"{key}.changes": c.get("changes") for key, c in cells.items()}}
    for place, given in places.items():
        if not isinstance(given, dict | None):
            raise ConfigError(f"{path}: {place}={given!r}: must be a mapping of keys of the recipe to values")
    values["cells"] = {str(key): _extended(cell, base.get("cells", {}), path) for key, cell in cells.items()}
    settings = merged(base.get("settings", {}), values.get("settings") or {})
    return {**base, **values, "settings": settings}, path


def _extended(cell: Mapping[str, Any], others: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a cell with what it takes from the cell that its `extends` names."""
    if "extends" not in cell:
        return {**cell, "changes": cell.get("changes") or {}}
    own = {key: value for key, value in cell.items() if key != "extends"}
    if cell["extends"] not in others:
        raise ConfigError(
            f"{path}: extends={cell['extends']!r}: must be a cell of the table that this one extends: "
            f"{', '.join(others) or 'it extends none'}"
        )
    base = {key: value for key, value in others[cell["extends"]].items() if key in SHARED}
    return {**base, **own, "changes": merged(base.get("changes", {}), own.get("changes") or {})}
