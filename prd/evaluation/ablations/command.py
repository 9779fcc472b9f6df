"""The command `prd ablate`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prd.errors import ConfigError
from prd.evaluation.ablations.page import terminal_table, write_page
from prd.evaluation.ablations.plan import Plan, plan_runs, state_of
from prd.evaluation.ablations.results import collect, fault_of, read_results, told_commits, write_results
from prd.evaluation.ablations.runner import train_runs
from prd.evaluation.ablations.tables import Ablation, check_cells, load_table, shipped_tables
from prd.evaluation.report import duration, shown
from prd.training.recipes import load_config
from prd.training.run.places import place_faults
from prd.training.run.processes import cores
from prd.training.run.resume import flat
from prd.utils.arguments import MAX_SEED, check_int, check_writable_file, check_writable_folder, expanded_path

DESCRIPTION = """Rerun a table of a paper: each cell and seed is an ordinary training run.

  prd ablate --list                                  tables, cells, what each changes, about how long it takes
  prd ablate k --seeds 3 --json k.json               train what is not trained yet, and write the results
  prd ablate k --only K=1 K=4 --steps 50             some cells, shorter
  prd ablate k --report --json k.json                collect what is there
  prd ablate --page docs/ablations.md                write the page from all results

Every other word --section.key VALUE is an override of the recipe, for all cells. Runs that are finished are not made
again, others are resumed. The exit status is 1 if a run failed.
"""


def ablate(words: Sequence[str]) -> int:
    """Run the command with its words; returns the exit status. Raises ConfigError for what cannot be done."""
    parser = _parser()
    own, overrides = _split(parser, words)
    args = parser.parse_args(own)
    jobs = cores() if args.jobs is None else check_int("jobs", args.jobs, 1)
    check_int("seeds", args.seeds, 1)
    check_int("seed_start", args.seed_start, 0, MAX_SEED - args.seeds)
    if args.steps is not None:
        check_int("steps", args.steps, 1)
    if args.minutes is not None and not args.minutes > 0:
        raise ConfigError(f"minutes={args.minutes}: must be above 0")
    if overrides and (args.list or args.page is not None):
        raise ConfigError(f"{overrides[0]}: has no meaning beside --list and --page; leave it out")
    if args.list:
        return _list(args, jobs)
    if args.page is not None:
        if args.table is not None:
            raise ConfigError(f"table={args.table!r}: --page writes the page of all tables; leave it out")
        return _page(args)
    if args.table is None:
        raise ConfigError(f"table: none is given; give {', '.join(shipped_tables())}, a YAML file, or --list")
    path = None if args.json is None else expanded_path(args.json, "json")
    if path is not None:
        check_writable_folder("json", path.parent)  # which is made
        if path.suffix.lower() != ".json" or path.is_dir():
            raise ConfigError(f"json={args.json!r}: must be a file that ends in .json")
    table = load_table(args.table)
    before = None if path is None else read_results(path)
    plan = plan_runs(
        table,
        args.output_dir,
        seeds=range(args.seed_start, args.seed_start + args.seeds),
        only=args.only,
        overrides=overrides,
        steps=args.steps,
        minutes=args.minutes,
    )
    command = shlex.join(["prd", "ablate", *words])
    collect(plan, before, command)  # before hours of training: results of earlier must fit
    if not args.report:
        _check_places(plan)
    failed = {} if args.report else train_runs(plan.runs, jobs)
    return _report(plan, before, command, path, failed)


def _check_places(plan: Plan) -> None:
    """Raise ConfigError if a run that is to be trained lacks a model or a file; before others take their hours."""
    for run in plan.runs:
        if state_of(run.folder) != "finished" and (fault := next(place_faults(run.config), None)) is not None:
            raise ConfigError(f"{plan.table.name}, {run.cell}: {fault}; docs/ablations.md says what a table needs")


def _report(plan: Plan, before: dict[str, Any] | None, command: str, path: Path | None, failed: dict[Path, str]) -> int:
    """Show and write the results; returns the exit status."""
    results = collect(plan, before, command, failed)
    Console().print(terminal_table(results))
    if told := told_commits(results):
        print(f"WARNING: the runs are of {told}; a difference may be of the code")
    if path is not None:
        write_results(results, path)
        print(path)
    for folder, lines in failed.items():
        print(f"FAILED: {folder}: {fault_of(lines)}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prd ablate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", nargs="?", help="a name of --list, or a YAML file")
    parser.add_argument("--list", action="store_true", help="show tables and cells")
    parser.add_argument("--report", action="store_true", help="collect what has been trained, and train nothing")
    parser.add_argument("--page", default=None, metavar="FILE.md", help="write the page of all results")
    parser.add_argument("--results", default="benchmarks/results/ablations", help="folder of JSON files, for --page")
    parser.add_argument("--only", nargs="+", default=None, metavar="CELL", help="cells to train (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per cell")
    parser.add_argument("--seed_start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time, one thread each (default: cores)")
    parser.add_argument("--output_dir", default="runs/ablations", help="folder of all run folders")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=None, help="of each run, in the place of the table's")
    length.add_argument("--minutes", type=float, default=None, help="of each run, in the place of the table's")
    parser.add_argument("--json", default=None, metavar="FILE.json", help="write the results, to those there before")
    return parser


def _split(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the command itself, and those that override values of the recipe."""
    known = set(parser._option_string_actions)
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in known:
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


# -- the list and the page ---------------------------------------------------------------------------------------------


def seconds_of(table: Ablation, cell: str, steps: int | None = None, minutes: float | None = None) -> float:
    """Return about how long a run of a cell takes on one core, seconds."""
    settings = {**flat(table.settings), **flat(table.cells[cell].changes)}
    limit = minutes if minutes is not None or steps is not None else settings.get("max_train_minutes")
    if limit is not None:
        return 60.0 * limit
    count = steps or settings.get("max_train_steps") or load_config(table.recipe_of(cell)).max_train_steps
    return count * (table.cells[cell].seconds_per_step or table.seconds_per_step)


def _list(args: argparse.Namespace, jobs: int) -> int:
    for name in shipped_tables() if args.table is None else [args.table]:
        table = load_table(name)
        seconds = {cell: seconds_of(table, cell, args.steps, args.minutes) for cell in table.cells}
        chosen = check_cells(table, args.only)
        total = args.seeds * sum(seconds[cell] for cell in chosen) / jobs
        print(f"{table.name}: {table.title} ({table.source})\n  {table.claim}")
        for cell in chosen:
            changes = ", ".join(f"{key}={_short(value)}" for key, value in flat(table.cells[cell].changes).items())
            recipe = f"{table.recipe_of(cell)}: " if table.recipe_of(cell) != table.recipe else ""
            mark = " (baseline)" if cell == table.baseline_of(cell) else ""
            print(f"    {cell}{mark}: {recipe}{changes or 'the recipe as it is'}; {duration(seconds[cell])}")
        runs = f"{len(chosen)} cells x {args.seeds} seeds"
        print(f"  about {duration(total)} for {runs}, {jobs} at a time, without measuring\n")
    return 0


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _page(args: argparse.Namespace) -> int:
    path = check_writable_file("page", args.page, (".md",))
    tables = [load_table(name) for name in shipped_tables()]
    folder = expanded_path(args.results, "results")
    found = {table.name: read_results(folder / f"{table.name}.json") for table in tables}
    results = {name: values for name, values in found.items() if values is not None}
    write_page(tables, results, path, expanded_path(args.output_dir, "output_dir"))
    print(json.dumps({"page": str(path), "run": [*results], "not run": sorted(found.keys() - results.keys())}))
    return 0
