"""Files that are whole or not there, whatever kills the process that writes them, and what is read from them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file aside, force it to the disk and give it the name `path`, in whose place it comes."""
    aside = path.with_name(f".{path.name}.part")
    write(aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text: a reader, or a process that starts after this one was killed, meets the old file or this one."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path, absent: Any) -> Any:
    """Read a JSON file of a run; return `absent` without one, and with a warning if it is damaged.

    For what is shown of a run: training must not end because of it.
    """
    if not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        logger.warning("%s is damaged (%s): left out", path, error)
        return absent
