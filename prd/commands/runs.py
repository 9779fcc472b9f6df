"""`prd runs`: the runs of a folder in a table."""

from __future__ import annotations

import argparse
from typing import Any


def add_runs(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    runs = commands.add_parser("runs", help="compare the training runs of a folder in a table")
    runs.add_argument("folder", help="a folder that holds run folders, at any depth")


def run_runs(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    from rich.console import Console

    from prd.evaluation.report import runs_table

    Console().print(runs_table(args.folder))
    return 0
