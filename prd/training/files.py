"""Files that are whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file aside, force it to the disk and give it the name `path`, in whose place it comes."""
    aside = path.with_name(f".{path.name}.part")
    write(aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text: a reader, or a process that starts after this one was killed, meets the old file or this one."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
