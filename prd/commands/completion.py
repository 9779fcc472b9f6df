"""`prd completion`: a script that completes this command in a shell, made by shtab."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from prd.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
FILES = ("output", "prompts", "preview", "source", "reference", "checkpoint", "folder", "model", "base")  # by `dest`


def add_completion(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    completion = commands.add_parser("completion", help='complete this command: eval "$(prd completion bash)"')
    completion.add_argument("shell", choices=SHELLS)


def run_completion(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the script that completes the commands of a parser; ConfigError without shtab."""
    if importlib.util.find_spec("shtab") is None:
        raise ConfigError(
            f"completion={args.shell!r}: needs shtab, which is not installed; pip install 'prd-3d[completion]'"
        )
    import shtab

    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in {id(found): found for found in commands.choices.values()}.values():
        for action in command._actions:
            if action.dest in FILES and action.choices is None:
                action.complete = shtab.FILE
    print(shtab.complete(parser, args.shell))
    return 0
