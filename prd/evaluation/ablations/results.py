"""Results of a table as plain values: figures of every run, means over seeds, paired differences, verdicts.

A file of results grows: figures of seeds whose run folders are gone stay in it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prd.errors import ConfigError
from prd.evaluation.ablations.plan import Plan, differing, read_finished, record_of, settled
from prd.evaluation.ablations.statistics import interval, paired, verdict
from prd.evaluation.ablations.tables import Ablation
from prd.evaluation.report import Run, thinned
from prd.utils.files import read_json, write_atomic

POINTS = 60  # of a curve
POINT = re.compile(r"\[\s+([-+.\deE]+),\s+([-+.\deE]+)\s+\]")  # two numbers, which stand on a line of their own
Figures = dict[str, dict[str, float]]  # by split and name


def collect(
    plan: Plan,
    before: Mapping[str, Any] | None = None,
    command: str = "",
    failed: Mapping[Path, str] | None = None,
) -> dict[str, Any]:
    """Return the results of all finished runs of a table's cells, whatever their seeds.

    before   results of earlier, whose seeds are kept where there is no run folder
    command  that made them, recorded with each run
    failed   last lines of runs that failed, by folder: recorded until the run succeeds

    Raises ConfigError if those of earlier are of another configuration.
    """
    table = plan.table
    configs = {name: settled(config) for name, config in plan.configs.items()}
    shared = configs[table.baseline]
    if before is not None:
        _check_same(before, configs)
    cells: dict[str, Any] = {}
    for name, cell in table.cells.items():
        earlier = (before or {}).get("cells", {}).get(name, {})
        runs, prefix = dict(earlier.get("runs", {})), plan.folders[name]
        for folder, seed in _seeds([path.name for path in prefix.parent.glob("*")], prefix.name):
            if (run := read_finished(prefix.with_name(folder))) is not None:
                runs[seed] = _measured(run, table, runs.get(seed, {}).get("command") or command)
        ended = {folder.name: fault_of(lines) for folder, lines in (failed or {}).items()}
        failures = {**earlier.get("failed", {}), **{seed: ended[f] for f, seed in _seeds(ended, prefix.name)}}
        own = {key: value for key, value in configs[name].items() if shared.get(key, "absent") != value}
        cells[name] = {
            "claimed": cell.claimed if name != table.baseline_of(name) else None,
            "baseline": table.baseline_of(name),
            "paper": cell.paper,
            "note": cell.note,
            "config": own,
            "runs": dict(sorted(runs.items(), key=lambda entry: int(entry[0]))),
            "failed": {seed: line for seed, line in failures.items() if seed not in runs},
        }
    _summarise(table, cells)
    head = {key: getattr(table, key) for key in ("title", "claim", "quote", "source", "note", "baseline")}
    return {"table": table.name, **head, "decides": asdict(table.decides), "cells": cells, "config": shared}


def read_results(path: Path) -> dict[str, Any] | None:
    """Return the results of a file; None without one, ConfigError for a file that holds none."""
    if not path.is_file():
        return None
    values = read_json(path, None)
    if not isinstance(values, dict) or not {"table", "cells", "config"} <= values.keys():
        raise ConfigError(f"json={str(path)!r}: is no file of `prd ablate`; name another one, or remove it")
    return values


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Write results as JSON; a reader meets the file before or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, POINT.sub(r"[\1, \2]", text) + "\n")


def fault_of(lines: str) -> str:
    """Return what a run that failed said of it in its last lines: the last that names the command, else the last."""
    every = lines.splitlines() or ["no output"]
    return next((line for line in reversed(every) if line.startswith("prd ")), every[-1])


def figures_of(run: Run, captions: Mapping[str, tuple[str, ...]]) -> Figures:
    """Return the figures of every split that a run measured, and the means over captions of a table's own splits.

    A split of which not all captions were measured is left out.
    """
    splits = {
        name: {key: float(value) for key, value in summary.items() if _is_figure(key, value)}
        for name, summary in run.scores.items()
    }
    parts = read_json(run.folder / "scores.json", {}).values()
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for part in parts for row in part.get("scores", ())):
        rows.setdefault(row["prompt"], row)  # the first split that has it: later ones may draw it several times
    known = {key for figures in splits.values() for key in figures}
    for name, texts in captions.items():
        if set(texts) <= rows.keys():
            own = [
                {{"recognised": "r_at_1"}.get(key, key): value for key, value in rows[text].items()} for text in texts
            ]
            keys = [key for key in own[0] if key in known and all(row.get(key) is not None for row in own)]
            splits[name] = {key: statistics.fmean(float(row[key]) for row in own) for key in keys}
    return splits


def _seeds(folders: Iterable[str], prefix: str) -> list[tuple[str, str]]:
    """Return the names of run folders that begin with a prefix, each with its seed."""
    found = [(name, name.removeprefix(prefix)) for name in sorted(folders) if name.startswith(prefix)]
    return [(name, seed) for name, seed in found if seed.isdigit()]


def _is_figure(key: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return key != "count" and is_number and math.isfinite(value)


def _measured(run: Run, table: Ablation, command: str) -> dict[str, Any]:
    """Return what is recorded of a finished run."""
    session = run.sessions[-1] if run.sessions else {}
    hardware, record = session.get("hardware", {}), record_of(run.folder) or {}
    return {
        "folder": run.folder.name,
        "command": command,
        "steps": record.get("train_steps", run.steps),
        "seconds_in_steps": round(run.seconds, 2),
        "minutes": record.get("minutes"),
        "machine": {
            "processor": hardware.get("cpu"),
            "cores": hardware.get("cores"),
            "threads": session.get("threads"),
            "torch": session.get("packages", {}).get("torch"),
            "commit": (session.get("git") or {}).get("commit"),
        },
        "figures": figures_of(run, table.captions),
        "curves": _curves(run),
    }


def told_commits(results: Mapping[str, Any]) -> str:
    """Return of which versions of the code the runs of a table are, with their cells; "" where it is one or unknown."""
    found: dict[str, list[str]] = {}
    for name, cell in results["cells"].items():
        for run in cell["runs"].values():
            if commit := run["machine"].get("commit"):
                cells = found.setdefault(commit[:7], [])
                cells += [] if repr(name) in cells else [repr(name)]
    told = "; ".join(f"{commit}: {', '.join(cells)}" for commit, cells in found.items())
    return f"{len(found)} versions of the code ({told})" if len(found) > 1 else ""


def _curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return what the run measured of its shapes over the steps, else its losses: {name: [(step, value)]}."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in run.metrics:
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                lines.setdefault(name, []).append((int(row["step"]), value))
    shapes = {name: points for name, points in lines.items() if name in ("r_at_1", "gallery/iou", "gallery/r_at_1")}
    losses = {name: points for name, points in lines.items() if name.startswith("distillation/")}
    return {
        name: [(int(step), float(f"{value:.5g}")) for step, value in thinned(points, POINTS)]
        for name, points in (shapes or losses).items()
    }


def _check_same(before: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError if results of earlier are of a cell that is not there, or of other values of a key that both know."""
    for name, cell in before["cells"].items():
        if cell.get("runs"):
            if name not in configs:
                raise ConfigError(f"json: has runs of {name!r}, which is no cell of the table; name another file")
            old, new = {**before["config"], **cell["config"]}, configs[name]
            if other := differing(old, new, [key for key in new if key in old]):
                raise ConfigError(
                    f"json: {name!r} there is of another configuration ({'; '.join(other[:3])}); name another file, "
                    "or give the same options"
                )


def _by_seed(cell: Mapping[str, Any], split: str, figure: str) -> dict[int, float]:
    """Return a figure of a cell's runs by their seeds."""
    return {
        int(seed): run["figures"][split][figure]
        for seed, run in cell["runs"].items()
        if figure in run["figures"].get(split, {})
    }


def _summarise(table: Ablation, cells: Mapping[str, dict[str, Any]]) -> None:
    """Write means, differences and verdicts into the cells."""
    decides = table.decides
    for cell in cells.values():
        names = {(split, key) for run in cell["runs"].values() for split, own in run["figures"].items() for key in own}
        cell["figures"], cell["differences"] = {}, {}
        for split, figure in sorted(names):
            values, others = _by_seed(cell, split, figure), _by_seed(cells[cell["baseline"]], split, figure)
            mean = interval(list(values.values()))
            cell["figures"].setdefault(split, {})[figure] = None if mean is None else asdict(mean)
            if cell is not cells[cell["baseline"]] and (difference := paired(values, others)) is not None:
                cell["differences"].setdefault(split, {})[figure] = asdict(difference)
        if cell["claimed"] is not None:
            difference = paired(
                _by_seed(cell, decides.split, decides.figure),
                _by_seed(cells[cell["baseline"]], decides.split, decides.figure),
            )
            cell["verdict"] = verdict(difference, cell["claimed"], decides.better)
