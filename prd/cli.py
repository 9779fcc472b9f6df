"""The command line: `prd generate "a red cube" -o cube.glb`, `prd train --config toybox`, `prd convert FILE OUT`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from prd.commands.completion import add_completion, run_completion
from prd.commands.convert import add_convert, run_convert
from prd.commands.doctor import add_doctor, run_doctor
from prd.commands.embed import add_embed, run_embed
from prd.commands.generate import add_generate, run_generate
from prd.commands.info import add_info, run_info
from prd.commands.runs import add_runs, run_runs
from prd.commands.train import run_train
from prd.evaluation.command import add_evaluate, run_evaluate
from prd.serving.command import add_demo, add_serve, run_demo, run_serve
from prd.utils.printing import keep_printing

INTERRUPTED = 128 + 2  # what shells report of a process that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user and Ctrl-C are one sentence on standard error."""
    keep_printing()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:  # of `train` before and after its steps alone: in them it saves a checkpoint
        print(f"prd {' '.join(words[:1])}: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `train` and `ablate` read their own words."""
    parser = argparse.ArgumentParser(prog="prd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adders = (add_generate, add_serve, add_demo, add_info, add_doctor, add_convert, add_runs, add_embed, add_evaluate)
    for add in (*adders, add_completion):
        add(commands)
    train = commands.add_parser("train", help="train; the same as examples/train_prd.py", add_help=False)
    train.add_argument("overrides", nargs=argparse.REMAINDER)
    commands.add_parser("ablate", help="rerun tables of the paper with several seeds", add_help=False)
    return parser


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["train"]:
        return run_train(words[1:])
    try:
        if words[:1] == ["ablate"]:
            from prd.evaluation.ablations.command import ablate

            return ablate(words[1:])
        args = build_parser().parse_args(words)
        run = {
            "completion": lambda args: run_completion(args, build_parser()),
            "convert": run_convert,
            "demo": run_demo,
            "doctor": run_doctor,
            "embed": run_embed,
            "evaluate": run_evaluate,
            "generate": run_generate,
            "info": run_info,
            "runs": run_runs,
            "serve": run_serve,
        }
        return run[args.command](args)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"prd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
